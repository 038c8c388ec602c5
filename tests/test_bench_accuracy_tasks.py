"""The data of the accuracy benchmark: parts that share no file, pairs, encodings, digits, code."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy.tasks import code, docstrings, sources
from bench.accuracy.tasks.base import remembered
from bench.accuracy.tasks.digits import KNOWN, augmented, digits_task, load_splits, pretrain


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


def images_of(split) -> set[tuple[float, ...]]:
    return {tuple(image.flatten().tolist()) for image in split.inputs["pixel_values"]}


def test_digits_are_on_one_side_only():
    """Whatever the seed, and as many on each; all seeds choose by the same images, and no seed tests on them."""
    all_tested, chosen_by = [], []
    for seed in range(3):
        splits = load_splits(seed)
        train, validation, test = map(images_of, (splits.train, splits.validation, splits.test))
        assert not train & validation and not train & test and not validation & test
        assert (len(train), len(validation), len(test)) == (899, 299, 599)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (899, 299, 599)
        counts = [torch.bincount(split.labels, minlength=10) for split in (splits.train, splits.test)]
        assert min(counts[0]) > 75 and min(counts[1]) > 50
        all_tested.append(test)
        chosen_by.append(validation)
    assert all_tested[0] != all_tested[1] != all_tested[2] != all_tested[0]
    assert chosen_by[0] == chosen_by[1] == chosen_by[2]
    assert images_of(load_splits(1).test) == all_tested[1]


def test_digits_are_pretrained_on_what_the_seed_trains_on(tmp_path, monkeypatch):
    seen = []

    def pretrained(examples):
        seen.append(examples)
        return pretrain(examples, steps=1)

    monkeypatch.setattr("bench.accuracy.tasks.digits.pretrain", pretrained)
    task = digits_task("quick", tmp_path)
    for seed in (0, 1, 0):
        task.make_model(seed)
    assert len(seen) == 2  # kept on disk
    for seed, examples in enumerate(seen):
        assert images_of(examples) < images_of(task.load(seed).train) and max(examples.labels) == KNOWN - 1


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
