"""The order of a run: for each method choose the learning rate on validation data, then train the other seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.accuracy.cells import TRIED_RATES, TUNING_SEEDS, Cell, Method, Row, cells_of, learning_rates
from bench.accuracy.store import Store
from bench.accuracy.tasks.base import Task

TrainCell = Callable[[Cell, Task, Method], Row]
Report = Callable[[Row, bool], None]
"""Called for each cell with its row and whether it was trained now (rather than found)."""


def run(
    tasks: Iterable[Task],
    methods: Sequence[Method],
    seeds: Sequence[int],
    store: Store,
    train_cell: TrainCell,
    report: Report = lambda row, is_new: None,
    tuning_seeds: int | None = None,
) -> None:
    """Finish every cell that ``store`` does not hold yet; each is written as soon as it is done.

    The learning rates are compared with the first ``tuning_seeds`` (default: the scale's ``TUNING_SEEDS``); the other
    seeds train with the best one.
    """
    for task in tasks:
        fingerprint = task.fingerprint()

        def finish(cell: Cell, task: Task, method: Method, fingerprint: str = fingerprint) -> Row:
            found = store.find(cell, fingerprint)
            row = found or train_cell(cell, task, method)
            if found is None:
                store.add(row)
            report(row, found is None)
            return row

        for method in methods:
            rates = learning_rates(method, task.recipe.learning_rate, task.scale)
            tuning = min(tuning_seeds or TUNING_SEEDS[task.scale], len(seeds))
            grid = [cell for seed in seeds[:tuning] for cell in cells_of(task.name, task.scale, method, rates, seed)]
            tried = [finish(cell, task, method) for cell in grid]
            best = best_learning_rate(mean_validation(tried), higher_is_better=task.metric.higher_is_better)
            for seed in seeds[tuning:]:
                (cell,) = cells_of(task.name, task.scale, method, [best], seed)
                finish(cell, task, method)


def mean_validation(rows: Iterable[Row]) -> dict[float, float]:
    """The validation score of each learning rate, the mean of its seeds; NaN if one of them diverged."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        by_rate.setdefault(row.cell.learning_rate, []).append(row.validation)
    return {rate: sum(scores) / len(scores) for rate, scores in by_rate.items()}


def best_learning_rate(validation: Mapping[float, float], *, higher_is_better: bool) -> float:
    """The learning rate with the best validation score; the smaller of two equal ones; NaN is worse than any score."""
    sign = 1.0 if higher_is_better else -1.0

    def rank(rate: float) -> tuple[float, float]:
        score = sign * validation[rate]
        return (-math.inf if math.isnan(score) else score, -rate)

    return max(validation, key=rank)


def count_cells(
    tasks: Sequence[Task], methods: Sequence[Method], seeds: Sequence[int], tuning_seeds: int | None = None
) -> int:
    """How many cells ``run`` finishes."""
    tuned = [(min(tuning_seeds or TUNING_SEEDS[task.scale], len(seeds)), TRIED_RATES[task.scale]) for task in tasks]
    return sum(tuning * rates + len(seeds) - tuning for tuning, rates in tuned for _ in methods)
