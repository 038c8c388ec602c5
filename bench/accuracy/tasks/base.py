"""What a task is: data in three parts, a pretrained model, a recipe, a metric."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimfit_fx.demo.data import Batch, Examples

SCALES = ("full", "quick")
POINTS = 100.0
"""What makes points of a share."""
_EVALUATED_AT_ONCE = 128


class Split(Protocol):
    """One part of the data: as many examples as its length; an index (slice or positions) gives a batch of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor) -> Batch: ...


@dataclass(frozen=True)
class Splits:
    """What is trained on, what the learning rate is chosen by, and what is reported."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Recipe:
    """How to train, alike for every method: AdamW, a short warmup, linear decay to zero."""

    epochs: int
    batch: int
    learning_rate: float
    """The task's own; each method tries multiples of it."""
    warmup_share: float = 0.1
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Metric:
    """How well a model does."""

    name: str
    higher_is_better: bool
    points: float
    """What tables multiply it by: ``POINTS`` for a share."""
    score: Callable[[nn.Module, Split, torch.device], float]


@dataclass(frozen=True)
class Task:
    """What to fine-tune on what."""

    name: str
    scale: str
    title: str
    recipe: Recipe
    metric: Metric
    paper_rate: float
    """The freeze rate that the paper has for tasks of this kind."""
    make_model: Callable[[int], nn.Module]
    """From a seed: the pretrained weights, and a new head drawn with the seed."""
    load: Callable[[int], Splits]
    """From a seed: the splits, the same at each call; of a task that comes with splits, those for all seeds."""

    def fingerprint(self) -> str:
        """A hash of recipe and data: rows with equal ones may be compared. A row has a learning rate of its own."""
        splits, recipe = self.load(0), replace(self.recipe, learning_rate=0.0)
        found = hashlib.sha256(repr((self.name, self.scale, recipe, self.metric.name)).encode())
        for split in (splits.train, splits.validation, splits.test):
            found.update(str(len(split)).encode())
            if isinstance(split, Examples):
                for tensor in (*split.inputs.values(), split.labels):
                    found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]


def for_all_seeds(load: Callable[[], Splits]) -> Callable[[int], Splits]:
    """The ``Task.load`` of data that comes in splits: loaded once."""
    once = functools.cache(load)
    return lambda seed: once()


def evaluation_batches(split: Split, device: torch.device) -> Iterator[Batch]:
    """Every example once, in order, on ``device``."""
    for first in range(0, len(split), _EVALUATED_AT_ONCE):
        yield to_device(split[slice(first, min(first + _EVALUATED_AT_ONCE, len(split)))], device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on ``device``."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@torch.no_grad()
def predictions(model: nn.Module, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (logits, labels) of all examples, on the CPU; the model is in evaluation mode afterwards."""
    model.eval()
    logits, labels = [], []
    for batch in evaluation_batches(split, device):
        logits.append(model(**batch).logits.float().cpu())
        labels.append(batch["labels"].cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, split: Split, device: torch.device) -> float:
    """Share of the examples that the model labels rightly."""
    logits, labels = predictions(model, split, device)
    return float((logits.argmax(-1) == labels).double().mean())


@torch.no_grad()
def perplexity(model: nn.Module, split: Split, device: torch.device) -> float:
    """Exp of the mean loss per predicted token; all examples have the same length."""
    model.eval()
    total, count = 0.0, 0
    for batch in evaluation_batches(split, device):
        examples = len(batch["labels"])
        total += float(model(**batch).loss) * examples
        count += examples
    return math.exp(min(total / count, 700.0))


ACCURACY = Metric("accuracy", higher_is_better=True, points=POINTS, score=accuracy)
PERPLEXITY = Metric("perplexity", higher_is_better=False, points=1.0, score=perplexity)


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """``torch.load(path)``; made first by ``make`` and saved there if it does not exist.

    It is written beside and moved into place, so that a process that is killed leaves no half of it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        torch.save(make(), beside)
        beside.replace(path)
    return torch.load(path, weights_only=True)
