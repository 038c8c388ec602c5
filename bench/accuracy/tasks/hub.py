"""The paper's own tasks: GLUE, SQuAD 2.0, CIFAR-10 and -100, ImageNet, with its models and settings.

They come through ``datasets`` and ``AutoModel...``, so a network is needed, or a folder with files of the same schema
(``python -m bench accuracy --hub cola --data FOLDER --weights FOLDER``)::

    FOLDER/cola/train.parquet, validation.parquet       columns as on the hub: sentence, label
    FOLDER/cifar10/train.parquet, test.parquet          img, label

The official test labels of GLUE and SQuAD are not public: as in the paper's field, the official validation part is what
is reported. The learning rate is chosen on a tenth of the training part, which is held out of training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy.tasks.base import ACCURACY, Metric, Recipe, Splits, Task, for_all_seeds
from bench.accuracy.tasks.hub_metrics import F1, MATTHEWS, SPEARMAN
from bench.accuracy.tasks.squad import SQUAD_F1, load_squad
from bench.settings import Setting, setting_of
from slimfit_fx.demo.data import Batch

HELD_OUT = 0.1
_CASED, _UNCASED = "google-bert/bert-base-cased", "google-bert/bert-base-uncased"
_VIT_224, _VIT_384 = "google/vit-base-patch16-224-in21k", "google/vit-base-patch16-384"


@dataclass(frozen=True)
class HubTask:
    """A task of the paper: where its data and model are, and the settings of the authors' code."""

    setting: Setting
    data: tuple[str, str | None]
    """Repository and configuration."""
    columns: tuple[str, ...]
    """One or two of text; the one of images; question and context."""
    model: str
    metric: Metric
    label: str = "label"
    test: str = "validation"
    """The part that is reported."""

    @property
    def size(self) -> int:
        """Tokens, or pixels per side."""
        return self.setting.size

    @property
    def labels(self) -> int:
        """Classes; 1 for a regression."""
        return self.setting.labels


def _glue(task: str, config: str, columns: tuple[str, ...], metric: Metric, test: str = "validation") -> HubTask:
    return HubTask(setting_of(task), ("nyu-mll/glue", config), columns, _CASED, metric, test=test)


def _images(task: str, data: str, column: str, model: str, **more: Any) -> HubTask:
    return HubTask(setting_of(task), (data, None), (column,), model, ACCURACY, **more)


PAPER_TASKS: dict[str, HubTask] = {
    "cola": _glue("CoLA", "cola", ("sentence",), MATTHEWS),
    "sst2": _glue("SST-2", "sst2", ("sentence",), ACCURACY),
    "mrpc": _glue("MRPC", "mrpc", ("sentence1", "sentence2"), F1),
    "rte": _glue("RTE", "rte", ("sentence1", "sentence2"), ACCURACY),
    "stsb": _glue("STS-B", "stsb", ("sentence1", "sentence2"), SPEARMAN),
    "qnli": _glue("QNLI", "qnli", ("question", "sentence"), ACCURACY),
    "qqp": _glue("QQP", "qqp", ("question1", "question2"), F1),
    "mnli": _glue("MNLI", "mnli", ("premise", "hypothesis"), ACCURACY, "validation_matched"),
    "squad2": HubTask(
        setting_of("SQuAD 2.0"), ("rajpurkar/squad_v2", None), ("question", "context"), _UNCASED, SQUAD_F1
    ),
    "cifar10": _images("CIFAR-10", "uoft-cs/cifar10", "img", _VIT_224, test="test"),
    "cifar100": _images("CIFAR-100", "uoft-cs/cifar100", "img", _VIT_224, label="fine_label", test="test"),
    "imagenet": _images("ImageNet", "ILSVRC/imagenet-1k", "image", _VIT_384),
}
"""All at three epochs, fp32, AdamW and linear decay, as the authors' code has them."""
EPOCHS = 3


@dataclass(frozen=True)
class TextRows:
    """Rows of text, encoded when they are asked for: int64 (batch, length) each."""

    rows: Any
    tokenizer: Any
    task: HubTask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """The batch at ``index``."""
        found = self.rows[_positions(index)]
        texts = [list(found[column]) for column in self.task.columns]
        encoded = self.tokenizer(
            *texts, truncation=True, max_length=self.task.size, padding="max_length", return_tensors="pt"
        )
        kind = torch.float32 if self.task.labels == 1 else torch.int64
        return {**encoded, "labels": torch.tensor(found[self.task.label], dtype=kind)}


@dataclass(frozen=True)
class ImageRows:
    """Rows of images, decoded when they are asked for: float32 (batch, 3, pixels, pixels)."""

    rows: Any
    processor: Any
    task: HubTask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """The batch at ``index``."""
        found = self.rows[_positions(index)]
        images = [image.convert("RGB") for image in found[self.task.columns[0]]]
        pixels = self.task.size
        encoded = self.processor(images, size={"height": pixels, "width": pixels}, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"], "labels": torch.tensor(found[self.task.label])}


def _positions(index: slice | Tensor) -> Any:
    """What ``datasets`` takes as an index."""
    return index.tolist() if isinstance(index, Tensor) else index


def hub_task(name: str, *, data: Path | None = None, weights: Path | None = None) -> Task:
    """Build a task of the paper.

    Args:
        name: a key of ``PAPER_TASKS``.
        data: a folder with a subfolder ``name`` of local files; None downloads.
        weights: a folder of a model with its tokenizer or image processor; None downloads the paper's.

    Raises:
        ValueError: no such task.
    """
    if name not in PAPER_TASKS:
        raise ValueError(f"unknown hub task: got {name!r}; legal: {', '.join(PAPER_TASKS)}")
    task = PAPER_TASKS[name]
    source = str(weights or task.model)
    load = for_all_seeds(lambda: load_hub(name, data=data, source=source))
    recipe = Recipe(EPOCHS, task.setting.batch, task.setting.learning_rate, warmup_share=0.0)
    model = functools.partial(_model, task, source)
    title = f"{task.data[0]} {task.data[1] or ''}".strip() + f", {source}"
    return Task(name, "full", title, recipe, task.metric, task.setting.freeze_rate, model, load)


def load_hub(name: str, *, data: Path | None, source: str) -> Splits:
    """The three parts: nine tenths of ``train``, the last tenth, and what is reported."""
    task = PAPER_TASKS[name]
    train, test = _read(name, task, data)
    halves = train.train_test_split(test_size=HELD_OUT, seed=0)
    wrap = _wrapper(task, source)
    return Splits(wrap(halves["train"]), wrap(halves["test"]), wrap(test))


def _read(name: str, task: HubTask, data: Path | None) -> tuple[Any, Any]:
    """The rows of ``train`` and of the part that is reported, from local files or the hub."""
    from datasets import load_dataset

    repository, config = task.data
    parts = ("train", task.test)
    if data is None:
        return tuple(load_dataset(repository, config, split=part) for part in parts)  # type: ignore[return-value]
    files = {part: local_file(data / name, part) for part in parts}
    kind = {".jsonl": "json"}.get(Path(files["train"]).suffix, Path(files["train"]).suffix[1:])
    found = load_dataset(kind, data_files=files)
    return found["train"], found[task.test]


def local_file(folder: Path, part: str) -> str:
    """The file of one part: parquet, JSON lines or CSV.

    Raises:
        FileNotFoundError: there is none; it says what may be there.
    """
    legal = [folder / f"{part}.{suffix}" for suffix in ("parquet", "jsonl", "json", "csv")]
    found = next((path for path in legal if path.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no data for {part}: one of {', '.join(path.name for path in legal)} in {folder}")
    return str(found)


def _wrapper(task: HubTask, source: str) -> Callable[[Any], Any]:
    """What makes a split of rows: by the task's kind."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if task.metric is SQUAD_F1:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return lambda rows: load_squad(rows, tokenizer, length=task.size)
    if len(task.columns) == 1 and task.columns[0] in ("img", "image"):
        processor = AutoImageProcessor.from_pretrained(source)
        return lambda rows: ImageRows(rows, processor, task)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return lambda rows: TextRows(rows, tokenizer, task)


def _model(task: HubTask, source: str, seed: int) -> nn.Module:
    """The pretrained model with a new head drawn with ``seed``."""
    from transformers import (
        AutoModelForImageClassification,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
    )

    torch.manual_seed(seed)
    if task.metric is SQUAD_F1:
        return AutoModelForQuestionAnswering.from_pretrained(source)  # type: ignore[no-any-return]
    kind = "regression" if task.labels == 1 else "single_label_classification"
    settings = {"num_labels": task.labels, "problem_type": kind, "ignore_mismatched_sizes": True}
    pictured = task.columns[0] in ("img", "image")
    auto = AutoModelForImageClassification if pictured else AutoModelForSequenceClassification
    return auto.from_pretrained(source, **settings)  # type: ignore[no-any-return]
