"""The snippets of docs/training.md run as they stand there; docs/compatibility.md names tests that exist."""

from __future__ import annotations

import contextlib
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import slimfit_fx
import slimfit_fx.api

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


def test_the_page_of_what_works_names_tests_that_exist():
    cited = re.findall(r"`(test_\w+)::(test_\w+)`", (DOCS / "compatibility.md").read_text())
    assert len(cited) > 30
    for file, name in cited:
        assert re.search(rf"^def {name}\(", (TESTS / f"{file}.py").read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_row_of_that_page_names_a_test():
    rows = [line for line in (DOCS / "compatibility.md").read_text().splitlines() if line.startswith("| ")]
    assert all("::test_" in row or row.startswith("| what") for row in rows)
