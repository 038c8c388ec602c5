"""One fine-tuning, and what is measured in it. The loop is a user's own: nothing in it knows of slimfit_fx."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from tqdm.auto import tqdm

from slimfit_fx.demo.data import Batch, Examples, batches
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.measure import StepMemory, step_memory

_SETTLING_STEPS = 3
"""First steps that do not count for the step time: the first compiles, the next ones fill the allocator."""


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, linear warmup, then linear decay to zero."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    measured_steps: int = 12
    """Steps whose memory is recorded, spread evenly; they do not count for the step time."""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch} examples, AdamW, learning rate {self.learning_rate:g}"

    def is_measured(self, step: int) -> bool:
        """Whether the memory of this step is recorded; never that of the settling ones."""
        counted = max(1, self.steps - _SETTLING_STEPS)
        stride = max(1, counted // self.measured_steps)
        return step >= _SETTLING_STEPS and (step - _SETTLING_STEPS) % stride == 0


@dataclass(frozen=True)
class Task:
    """What to fine-tune on what."""

    title: str
    make_model: Callable[[], nn.Module]
    """A new model, pretrained, with the same weights at each call; takes a batch as keywords and returns ``.loss``."""
    train: Examples
    test: Examples
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """What one fine-tuning gave."""

    name: str
    accuracy: float
    """Share of the test examples, after the last step."""
    memory: StepMemory
    """Of the measured step with the highest peak."""
    measured_steps: int
    step_ms: float
    """Median."""
    first_step_s: float
    frozen_share: float
    """Mean share of the units that were frozen in a step."""
    recompiles: int
    """Graphs compiled after the first step."""


def fine_tune(
    name: str, model: nn.Module, forward: Callable[..., Any], task: Task, *, gates: GateTable | None = None
) -> Outcome:
    """Train ``model`` in place by calling ``forward`` (the model, or its compiled form) and evaluate it.

    ``gates`` is only read, for the share of units that were frozen.
    """
    recipe = task.recipe
    torch.manual_seed(recipe.seed)
    loop = _Loop(model, forward, recipe)
    data = batches(task.train, recipe.batch, seed=recipe.seed)
    seconds: list[float] = []
    memories: list[StepMemory] = []
    bar = tqdm(range(recipe.steps), desc=f"{name} (compiling)", unit="step", dynamic_ncols=True)
    for step, batch in zip(bar, data, strict=False):
        if recipe.is_measured(step):
            memories.append(loop.measured_step(batch))
        else:
            seconds.append(loop.timed_step(batch))
        if step == 0:
            graphs = _graphs_compiled()
            bar.set_description(name)
        bar.set_postfix(loss=f"{loop.loss:.3f}", refresh=False)
    recompiles = _graphs_compiled() - graphs
    worst = max(memories, key=lambda memory: memory.peak_bytes)
    return Outcome(
        name=name,
        accuracy=accuracy(model, task.test),
        memory=worst,
        measured_steps=len(memories),
        step_ms=1e3 * statistics.median(seconds[_SETTLING_STEPS:] or seconds),
        first_step_s=seconds[0],
        frozen_share=_frozen_share(gates),
        recompiles=recompiles,
    )


class _Loop:
    """Forward, backward, AdamW, schedule."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], recipe: Recipe) -> None:
        self.loss = float("nan")
        self._forward = forward
        model.train()
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        warmup, rest = max(1, recipe.warmup_steps), max(1, recipe.steps - recipe.warmup_steps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min((step + 1) / warmup, max(0.0, (recipe.steps - step) / rest))
        )

    def timed_step(self, batch: Batch) -> float:
        """Return the seconds of the whole step."""
        begun = time.perf_counter()
        self._loss_of(batch).backward()
        self._update()
        return time.perf_counter() - begun

    def measured_step(self, batch: Batch) -> StepMemory:
        """Return the memory of forward and backward."""
        memory = step_memory(lambda: self._loss_of(batch), lambda loss: loss.backward())
        self._update()
        return memory

    def _loss_of(self, batch: Batch) -> Tensor:
        loss: Tensor = self._forward(**batch).loss
        self.loss = loss.item()
        return loss

    def _update(self) -> None:
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, batch: int = 256) -> float:
    """Return the share of ``examples`` that the model labels rightly; leaves the model in evaluation mode."""
    model.eval()
    right = 0
    for first in range(0, len(examples), batch):
        part = examples[slice(first, first + batch)]
        right += int((model(**part).logits.argmax(-1) == part["labels"]).sum())
    return right / len(examples)


def _frozen_share(gates: GateTable | None) -> float:
    if gates is None or not gates.history:
        return 0.0
    return 1 - statistics.mean(len(opened) for _, opened in gates.history) / len(gates.names)


def _graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])
