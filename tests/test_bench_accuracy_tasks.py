"""The data of the accuracy benchmark: parts that share no file, pairs, encodings, digits, code."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy.tasks import code, docstrings, sources
from bench.accuracy.tasks.base import remembered
from bench.accuracy.tasks.digits import augmented, load_splits
from slimfit_fx.demo.data import digits


def make_library(folder, name: str, count: int):
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("def f(:")
    (package / "tests").mkdir()
    (package / "tests" / "test_it.py").write_text('def f():\n    """' + "tested " * 20 + '"""\n')
    for index in range(count):
        functions = [
            f'def f{k}(self, a{k}, *, b=1):\n    """Function {k} of module {index} in {name}, {"long " * 15}text."""\n'
            for k in range(5)
        ]
        (package / f"m{index}.py").write_text("\n".join(functions))
    return package


def test_no_file_is_in_two_parts(tmp_path, monkeypatch):
    make_library(tmp_path, "somelib", 80)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(sources.documented("somelib", per_module=3))
    assert len(found) == 80 * 3
    parts: dict[str, set[str]] = {}
    for one in found:
        parts.setdefault(one.module, set()).add(one.part)
    assert all(len(of_module) == 1 for of_module in parts.values())
    counts = {part: sum(of_module == {part} for of_module in parts.values()) for part in sources.PARTS}
    assert counts["train"] > counts["test"] > 5 and counts["validation"] > 3
    assert found == list(sources.documented("somelib", per_module=3))
    assert not any("tested" in one.docstring for one in found)


def test_signatures_and_names():
    assert sources.blank_names("NumPy and np.array, not numpyx", ("np", "numpy")) == (
        "library and library.array, not numpyx"
    )
    with pytest.raises(ModuleNotFoundError, match="reads the sources of no_such_library"):
        sources.library_folder("no_such_library")


def test_pairs_are_balanced_and_stay_in_their_module(tmp_path, monkeypatch):
    make_library(tmp_path, "otherlib", 30)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = list(docstrings._paired(sources.documented("otherlib", per_module=4), 0))
    assert len(made) == 30 * 4
    assert sum(label for _, _, label in made) == 30 * 2
    assert made[0][1][0].startswith("def f") and "self" not in made[0][1][0]
    for _, (signature, text), label in made:
        belongs = text.split()[1] == signature[len("def f") : signature.index("(")]
        assert belongs == bool(label)
    modules_of = {text.split()[4]: part for part, (_, text), _ in made}
    assert all(modules_of[text.split()[4]] == part for part, (_, text), _ in made)


def test_texts_and_pairs_are_encoded(tmp_path, monkeypatch):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "?": 1, "the": 2, "[SEP]": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(docstrings, "minilm_folder", lambda: tmp_path)
    found = docstrings.encode([(("the x", "the the"), 1), (("x", "the"), 0)], length=8)
    assert found.inputs["input_ids"].tolist() == [[2, 1, 3, 2, 2, 3, 0, 0], [1, 3, 2, 3, 0, 0, 0, 0]]
    assert found.inputs["token_type_ids"].tolist()[0] == [0, 0, 0, 1, 1, 1, 0, 0]
    assert found.labels.tolist() == [1, 0]
    single = docstrings.encode([(("the the the the",), 5)], length=3)
    assert single.inputs["input_ids"].tolist() == [[2, 2, 3]]


def test_digits_are_on_one_side_only():
    splits = load_splits()
    _, test = digits()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (899, 299, 599)
    assert torch.equal(splits.test.inputs["pixel_values"], test.inputs["pixel_values"])
    held_out = {tuple(image.flatten().tolist()) for image in splits.validation.inputs["pixel_values"]}
    trained = {tuple(image.flatten().tolist()) for image in splits.train.inputs["pixel_values"]}
    assert not held_out & trained and (len(held_out), len(trained)) == (299, 899)


def test_augmentation_moves_and_keeps_the_image():
    images = torch.full((200, 1, 8, 8), -1.0)
    images[:, :, 4, 4] = 1.0
    found = augmented(images, torch.Generator().manual_seed(0))
    brightest = found.flatten(1).argmax(1)
    places = {(int(k) // 8, int(k) % 8) for k in brightest}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert found.shape == images.shape


def test_code_is_cut_into_pieces():
    class Letters:
        def encode(self, text):
            return type("Encoded", (), {"ids": [ord(c) for c in text]})

    found = code.windows(["abc", "defg"], Letters(), count=5, length=4)
    assert found.labels.tolist() == [[97, 98, 99, 0], [100, 101, 102, 103]]
    assert len(code.windows(["a" * 100], Letters(), count=3, length=4)) == 3
    with pytest.raises(ValueError, match="give 3 tokens, fewer than one piece of 4"):
        code.windows(["ab"], Letters(), count=1, length=4)


def test_tokenizer_is_made_once(tmp_path):
    path = tmp_path / "new" / "bpe.json"
    made = code.tokenizer_of(path, ["def f(x): return x\n"] * 20)
    again = code.tokenizer_of(path, [])
    text = "def g(y): return é"
    assert made.encode(text).ids == again.encode(text).ids
    assert again.decode(again.encode(text).ids) == text


def test_weights_are_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"w": torch.ones(2)}

    path = tmp_path / "new" / "weights.pt"
    assert torch.equal(remembered(path, make)["w"], torch.ones(2))
    assert torch.equal(remembered(path, make)["w"], torch.ones(2))
    assert len(calls) == 1 and [p.name for p in path.parent.iterdir()] == ["weights.pt"]
