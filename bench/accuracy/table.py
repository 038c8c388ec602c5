"""Results as text. Pure functions of what ``claims.py`` worked out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

from bench.accuracy.cells import FULL
from bench.accuracy.claims import Claim, Standing, gains
from bench.accuracy.stats import Interval, interval_of
from bench.accuracy.tasks.base import POINTS, Task

LEGEND = (
    "Mean +- half of the 95% interval (Student's t). against full: gain over full fine-tuning, paired by seed; "
    "positive is better.\nRates are chosen on validation data "
    "(quick: with the first seed, full: with three); scores are of the test data."
)


def show(interval: Interval | None, digits: int = 2, *, sign: bool = False) -> str:
    """``"97.31 +- 0.42"``; one value has no interval, none is ``-``."""
    if interval is None:
        return "-"
    mean = f"{interval.mean:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(interval.half_width) else f"{mean} +- {interval.half_width:.{digits}f}"


def task_table(task: Task, found: Sequence[Standing]) -> str:
    """One line per method."""
    unit = f"{task.metric.name}, points" if task.metric.points == POINTS else task.metric.name
    rows = []
    for standing in found:
        gain = gains(found, task, standing.method, FULL.name)
        against = show(interval_of(tuple(gain.values())), sign=True) if gain else "-"
        rows.append(
            (
                standing.method,
                f"{standing.learning_rate:g}",
                len(standing.by_seed),
                show(standing.score),
                "" if standing.method == FULL.name else against,
                f"{standing.seconds:.0f}",
            )
        )
    recipe = task.recipe
    title = f"{task.name} ({task.scale}): {task.title}; {recipe.epochs} epochs, batch {recipe.batch}"
    headers = ("method", "learning rate", "seeds", unit, "against full", "s")
    align = ("left", "right", "right", "right", "right", "right")
    if not rows:
        return f"{title}\nno method is done"
    return f"{title}\n{tabulate(rows, headers=headers, colalign=align, disable_numparse=True)}"


def claims_table(found: Sequence[Claim]) -> str:
    """One line per bound."""
    rows = [(c.text, f">= {c.at_least:+.1f}", show(c.points, sign=True), c.verdict) for c in found]
    return tabulate(rows, headers=("what must hold", "bound", "measured, points", "verdict"), disable_numparse=True)


def report(tasks: Sequence[Task], found: dict[str, list[Standing]], bounds: Sequence[Claim]) -> str:
    """All tables and the legend."""
    parts = [task_table(task, found[task.name]) for task in tasks]
    return "\n\n".join([*parts, claims_table(bounds), LEGEND])
