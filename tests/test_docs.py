"""The examples of the pages run as they stand there; docs/compatibility.md names tests that exist."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import Tiny, tokens
from torch import nn

import slimfit_fx
import slimfit_fx.api
import slimfit_fx.codecs.base
import slimfit_fx.schedule.base

DOCS = pathlib.Path(__file__).parent.parent / "docs"
TESTS = pathlib.Path(__file__).parent


def sections() -> dict[str, list[str]]:
    """Heading -> its Python blocks."""
    parts = re.split(r"^## (.+)$", (DOCS / "training.md").read_text(), flags=re.MULTILINE)[1:]
    found = {parts[i]: re.findall(r"```python\n(.*?)```", parts[i + 1], re.DOTALL) for i in range(0, len(parts), 2)}
    return {heading: blocks for heading, blocks in found.items() if blocks}


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32)
    config.problem_type = "single_label_classification"
    return transformers.BertForSequenceClassification(config)


def texts() -> Any:
    datasets = pytest.importorskip("datasets")
    words = torch.randint(1, 40, (12, 8), generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict({"input_ids": words.tolist(), "labels": (words[:, 0] % 2).tolist()})


def lightning_parts() -> dict[str, Any]:
    pytest.importorskip("lightning")
    import test_lightning

    pytorch = test_lightning.lightning
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    made = types.SimpleNamespace(Trainer=lambda **given: pytorch.Trainer(**quiet, **given))
    return {"lightning": made, "module": test_lightning.Module(), "train": test_lightning.loader()}


def parts(heading: str, folder: pathlib.Path) -> dict[str, Any]:
    """What the snippets under this heading take for granted."""
    if heading == "Lightning":
        return {"folder": folder, **lightning_parts()}
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return {
        "slimfit_fx": slimfit_fx,
        "torch": torch,
        "folder": folder,
        "model": bert().train(),
        "loader": torch.utils.data.DataLoader(texts().with_format("torch"), batch_size=4),
        "train": texts(),
        "dev": texts(),
        "arguments": transformers.TrainingArguments(str(folder), per_device_train_batch_size=4, **quiet),
        "Trainer": transformers.Trainer,
        "Accelerator": lambda **given: accelerate.Accelerator(cpu=True, **given),
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "fully_shard": dist.fsdp.fully_shard,
        "print": lambda *_: None,
    }


@contextlib.contextmanager
def process_group(folder: pathlib.Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("heading", sections())
def test_the_snippets_run(heading, tmp_path, monkeypatch):
    monkeypatch.setattr(slimfit_fx.api, "_executor", lambda model, config: "interpreter")
    if heading == "Hugging Face Trainer":
        pytest.importorskip("peft")
    space = parts(heading, tmp_path)
    distributed = heading.startswith("Several processes")
    with process_group(tmp_path) if distributed else contextlib.nullcontext():
        for number, block in enumerate(sections()[heading]):
            if "get_peft_model" in block:
                space["model"] = bert().train()
            exec(compile(block, f"{heading}, snippet {number}", "exec"), space)
    trained = space["module"].net if heading == "Lightning" else space.get("adapted", space["model"])
    assert slimfit_fx.session(trained).steps > 0


# ---- the other pages


def examples_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS.parent / page).read_text(), re.DOTALL)


@pytest.fixture
def registries_of_its_own(monkeypatch):
    """What an example registers is forgotten after the test."""
    for registry in (slimfit_fx.schedule.base, slimfit_fx.codecs.base):
        known = {name: value for name, value in registry._REGISTRY.items() if name not in ("top_blocks", "half")}
        monkeypatch.setattr(registry, "_REGISTRY", known)


def run_example(page: str, part: str, space: dict[str, Any]) -> None:
    (example,) = (block for block in examples_of(page) if part in block)
    exec(compile(example, f"{page}, {part}", "exec"), space)


def trained(model: nn.Module, steps: int = 3) -> slimfit_fx.Session:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(steps):
        model(*tokens(number, batch=64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return slimfit_fx.session(model)


@pytest.mark.usefixtures("registries_of_its_own")
def test_the_scheduler_of_its_page_trains_the_last_units(monkeypatch):
    monkeypatch.setattr(slimfit_fx.api, "_executor", lambda model, config: "interpreter")
    space = {"model": Tiny(depth=1)}
    run_example("docs/schedulers.md", "class TopBlocks", space)
    session = trained(space["model"])
    assert isinstance(session.scheduler, space["TopBlocks"]) and session.scheduler.open_count == 1
    assert [opened for _, opened in session.gates.history] == [frozenset(session.gates.names[-1:])] * 3
    session.scheduler.step = 100
    assert session.scheduler.select() == frozenset(session.gates.names[-2:])


def test_a_resumed_run_as_the_page_of_schedulers_has_it(tmp_path, monkeypatch):
    model = slimfit_fx.optimize(Tiny(depth=0), executor="interpreter", units="*.weight")
    session, optimizer = trained(model), torch.optim.AdamW(model.parameters())
    state, path = session.state_dict(), tmp_path / "checkpoint"
    run_example("docs/schedulers.md", "load_state_dict", locals() | {"slimfit_fx": slimfit_fx, "torch": torch})
    assert torch.load(path)["slimfit_fx"] == state == session.state_dict() and session.steps == 3


@pytest.mark.usefixtures("registries_of_its_own")
@pytest.mark.parametrize(
    ("part", "stored"),
    [
        ("max_gradient_error", {"float": "int8"}),
        ("gelu_input", {"gelu_input": "int4", "normalised": None, "float": "int8"}),
        ("class Half", {"float": "half", "gelu_input": "half"}),
    ],
)
def test_the_examples_of_the_page_of_codecs_run(part, stored, monkeypatch):
    monkeypatch.setattr(slimfit_fx.api, "_executor", lambda model, config: "interpreter")
    space = {"model": Tiny(depth=1), "slimfit_fx": slimfit_fx}
    run_example("docs/codecs.md", part, space)
    session = trained(space["model"], steps=1)
    assert {kind: session.config.codec_map[kind] for kind in stored} == stored
    used = {row.kind: row.codec for row in session.plan.rows if row.decision.startswith("codec")}
    assert all(used[kind] == name for kind, name in stored.items() if kind in used) and used.keys() & stored.keys()
    assert not any(note.startswith("graph") for note in session.plan.notes)


@pytest.mark.parametrize("part", ["for batch in loader", "SlimFitCallback", "slimfit_fx.plan"])
def test_the_examples_of_the_readme_run(part, tmp_path, monkeypatch):
    """Its names of weights on the hub and of data stand for a tiny model and its batches."""
    monkeypatch.setattr(slimfit_fx.api, "_executor", lambda model, config: "interpreter")
    space, printed = parts("README", tmp_path), []
    space |= {
        "AutoModelForSequenceClassification": types.SimpleNamespace(from_pretrained=lambda name: bert()),
        "TrainingArguments": lambda out: space["arguments"],
        "batch": next(iter(space["loader"])),
        "print": printed.append,
    }
    run_example("README.md", part, space)
    assert ("Memory plan of one training step" in "".join(map(str, printed))) == (part != "SlimFitCallback")
    if part == "SlimFitCallback":
        assert slimfit_fx.session(space["model"]).steps == 2
    else:
        assert slimfit_fx.api.find_session(space["model"]) is None


def test_every_example_of_these_pages_is_run():
    assert [len(examples_of(page)) for page in ("README.md", "docs/schedulers.md", "docs/codecs.md")] == [3, 2, 3]


# ---- what works together with what


CITED = re.compile(r"`(test_\w+)::(test_\w+)`( \*)?")
"""A test that is cited, and its star."""


def test_the_page_of_what_works_names_tests_that_exist():
    cited = [found[:2] for found in CITED.findall((DOCS / "compatibility.md").read_text())]
    assert len(cited) > 30
    for file, name in cited:
        assert re.search(rf"^def {name}\(", (TESTS / f"{file}.py").read_text(), re.MULTILINE), f"{file}::{name}"


def rows_of_that_page() -> list[str]:
    return [line for line in (DOCS / "compatibility.md").read_text().splitlines() if line.startswith("| ")]


def test_every_row_of_that_page_names_a_test():
    assert all("::test_" in row or row.startswith("| what") for row in rows_of_that_page())


def left_to_test_all(file: str, name: str) -> str:
    """Which cases of this test ``make test`` leaves out: all, some or none."""
    module = importlib.import_module(file)
    of_module = getattr(module, "pytestmark", [])
    marks = [
        *(of_module if isinstance(of_module, list) else [of_module]),
        *getattr(vars(module)[name], "pytestmark", []),
    ]
    given = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    thorough = [["thorough" in {mark.name for mark in getattr(case, "marks", ())} for case in cases] for cases in given]
    if any(mark.name == "thorough" for mark in marks) or any(cases and all(cases) for cases in thorough):
        return "all"
    return "some" if any(map(any, thorough)) else "none"


def test_a_star_on_that_page_is_what_make_test_leaves_out():
    """Behind a test: all of its cases. Elsewhere in a row: some cases of a test of that row."""
    met = set()
    for row in rows_of_that_page():
        cited = {(file, name, star): left_to_test_all(file, name) for file, name, star in CITED.findall(row)}
        for (file, name, star), left_out in cited.items():
            assert bool(star) == (left_out == "all"), f"{file}::{name}: {left_out} of its cases"
        assert "*" not in CITED.sub("", row) or "some" in cited.values(), row
        met |= set(cited.values())
    assert met == {"all", "some", "none"}
