"""Train one cell and score it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.accuracy.cells import Cell, Method, Row
from bench.accuracy.methods import Trainee, frozen_share, recompiles
from bench.accuracy.tasks.base import Recipe, Split, Task, to_device
from slimfit_fx.demo.data import batches

Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


@dataclass(frozen=True)
class Trained:
    """What the loop leaves besides the weights."""

    steps: int
    loss: float
    """Mean of the last tenth of the steps; NaN or infinite if the training diverged, which ends it."""


class Trainer:
    """Trains cells; consecutive cells of one task and method share a compiled model."""

    def __init__(self, *, device: torch.device, executor: str, progress: Progress | None = None) -> None:
        self._device = device
        self._executor = executor
        self._progress = progress or (lambda done, total, loss: None)
        self._trainee: Trainee | None = None

    def __call__(self, cell: Cell, task: Task, method: Method) -> Row:
        """Train ``cell`` from its beginning and score it on validation and test data."""
        begun = time.perf_counter()
        splits = task.load(cell.seed)
        model = self._trainee_of(task, method).begin(cell.seed)
        before = recompiles(model)
        torch.manual_seed(cell.seed)
        trained = fit(
            model,
            splits.train,
            task.recipe,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            device=self._device,
            progress=self._progress,
        )
        share, again = frozen_share(model, trained.steps), recompiles(model) - before
        score = self._scorer(model, task, trained)
        return Row(
            cell=cell,
            validation=score(splits.validation),
            test=score(splits.test),
            loss=trained.loss,
            steps=trained.steps,
            seconds=time.perf_counter() - begun,
            frozen_share=share,
            recompiles=again,
            fingerprint=task.fingerprint(),
        )

    def _trainee_of(self, task: Task, method: Method) -> Trainee:
        current = self._trainee
        if current is None or current.task is not task or current.method != method:
            self._trainee = current = Trainee(task, method, device=self._device, executor=self._executor)
        return current

    def _scorer(self, model: nn.Module, task: Task, trained: Trained) -> Callable[[Split], float]:
        """The task's metric of ``model``; NaN for one that diverged."""
        if not math.isfinite(trained.loss):
            return lambda split: math.nan
        return lambda split: task.metric.score(model, split, self._device)


def fit(
    model: nn.Module,
    train: Split,
    recipe: Recipe,
    *,
    learning_rate: float,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Trained:
    """Train ``model`` in place. Nothing here knows of slimfit_fx: the same loop serves every method."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(train) // recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, recipe.warmup_share))
    losses: list[float] = []
    for step, batch in zip(range(steps), batches(train, recipe.batch, seed=seed), strict=False):
        loss = model(**to_device(batch, device)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, steps, losses[-1])
        if not math.isfinite(losses[-1]):
            return Trained(step + 1, losses[-1])
    last = losses[-max(1, steps // 10) :]
    return Trained(steps, sum(last) / len(last))


def rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """The learning rate of ``step``, as a share of the highest: a linear rise, then a linear fall to zero."""
    warmup = max(1, round(warmup_share * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
