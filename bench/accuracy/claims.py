"""What the finished cells say: scores by seed, differences to full fine-tuning, and the bounds that must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from bench.accuracy.cells import FULL, TUNING_SEEDS, Method, Row, learning_rates, slimfit
from bench.accuracy.run import best_learning_rate, mean_validation
from bench.accuracy.stats import Interval, interval_of, mean_over_tasks, paired_differences
from bench.accuracy.tasks.base import POINTS, Task

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Standing:
    """How one method did on one task. Points: the metric as tables show it."""

    task: str
    method: str
    learning_rate: float
    by_seed: BySeed
    """Test score in points, with the chosen learning rate."""
    seconds: float
    """Mean of one training, its evaluation included."""

    @property
    def score(self) -> Interval:
        """Mean over the seeds."""
        return interval_of(tuple(self.by_seed.values()))


@dataclass(frozen=True)
class Claim:
    """A bound, and what was measured. ``points``: gain, positive if the first is better than the second."""

    text: str
    at_least: float
    points: Interval | None
    """None: not enough cells."""

    @property
    def verdict(self) -> str:
        """``holds``, or by how much it falls short; and whether the interval is too wide to tell."""
        if self.points is None:
            return "not measured"
        short = self.at_least - self.points.mean
        found = "holds" if short <= 1e-9 else f"short by {short:.2f}"
        decided = self.points.low >= self.at_least or self.points.high < self.at_least
        return found if decided else f"{found}; the interval lies on both sides"


def standings(rows: Sequence[Row], task: Task, methods: Sequence[Method]) -> list[Standing]:
    """How each method did on ``task``, by its rows; methods whose learning rate is not chosen yet are left out."""
    found = (_standing([row for row in rows if row.cell.method == method.name], task, method) for method in methods)
    return [standing for standing in found if standing is not None]


def _standing(rows: Sequence[Row], task: Task, method: Method) -> Standing | None:
    """The rate is chosen by the first seeds that tried all of them: as many as the scale asks for, or more."""
    rates = learning_rates(method, task.recipe.learning_rate, task.scale)
    tried_by_seed: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.cell.seed):
        if row.cell.learning_rate in rates:
            tried_by_seed.setdefault(row.cell.seed, []).append(row)
    complete = list(takewhile(lambda tried: len(tried) == len(rates), tried_by_seed.values()))
    if len(complete) < min(TUNING_SEEDS[task.scale], max(1, len(tried_by_seed))):
        return None
    tried = [row for of_seed in complete for row in of_seed]
    best = best_learning_rate(mean_validation(tried), higher_is_better=task.metric.higher_is_better)
    chosen = [row for row in rows if row.cell.learning_rate == best]
    by_seed = {row.cell.seed: task.metric.points * row.test for row in chosen}
    return Standing(task.name, method.name, best, by_seed, sum(row.seconds for row in chosen) / len(chosen))


def gains(found: Sequence[Standing], task: Task, method: str, against: str) -> dict[int, float]:
    """By how many points ``method`` is better than ``against``, seed by seed; empty if one of them is missing."""
    named = {standing.method: standing.by_seed for standing in found}
    if method not in named or against not in named:
        return {}
    sign = 1.0 if task.metric.higher_is_better else -1.0
    seeds = sorted(named[method].keys() & named[against].keys())
    return dict(zip(seeds, (sign * d for d in paired_differences(named[method], named[against])), strict=True))


def gains_over_full(
    found: Mapping[str, Sequence[Standing]], tasks: Sequence[Task], method: str
) -> tuple[list[Interval | None], Interval | None]:
    """By how many points ``method`` is better than full fine-tuning: on each of ``tasks``, and in the mean over them.

    None where no seed has both, and for the mean unless every task has one.
    """
    by_seed = [gains(found[task.name], task, method, FULL.name) for task in tasks]
    return [interval_of(tuple(one.values())) if one else None for one in by_seed], _over_tasks(by_seed)


def claims(found: Mapping[str, Sequence[Standing]], tasks: Sequence[Task]) -> list[Claim]:
    """The bounds, each with what was measured. ``found``: standings by task.

    They speak of all tasks that are measured in points; perplexity is not.
    """
    bounded = [task for task in tasks if task.metric.points == POINTS]

    def against_full(preset: str) -> list[dict[int, float]]:
        return [gains(found[t.name], t, slimfit(preset, t.paper_rate).name, FULL.name) for t in bounded]

    def ils_gains(other: str) -> list[dict[int, float]]:
        ils = slimfit("balanced", 0.95).name
        return [gains(found[t.name], t, ils, slimfit("balanced", 0.95, other).name) for t in bounded]

    names = ", ".join(task.name for task in bounded)
    balanced = against_full("balanced")
    return [
        Claim(f"balanced against full, mean over {names}", -0.2, _over_tasks(balanced)),
        Claim("balanced against full, worst task", -0.4, _worst(balanced)),
        Claim(f"max against full, mean over {names}", -0.4, _over_tasks(against_full("max"))),
        Claim("ILS against random at 0.95, balanced, mean", 0.0, _over_tasks(ils_gains("random"))),
        Claim("ILS against round-robin at 0.95, balanced, mean", 0.0, _over_tasks(ils_gains("round_robin"))),
    ]


def _over_tasks(differences: Sequence[Mapping[int, float]]) -> Interval | None:
    """The mean over the tasks, over those seeds that every task has."""
    means = mean_over_tasks(differences)
    return interval_of(means) if means else None


def _worst(differences: Sequence[Mapping[int, float]]) -> Interval | None:
    """The task with the smallest mean; None until every task has one."""
    if not differences or not all(differences):
        return None
    return min((interval_of(tuple(one.values())) for one in differences), key=lambda interval: interval.mean)
