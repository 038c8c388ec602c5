"""Means with their intervals, over seeds and over pairs of seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its interval (Student's t); NaN for fewer than two values."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Where the interval begins."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Where it ends."""
        return self.mean + self.half_width

    def scaled(self, factor: float) -> Interval:
        """The same in another unit; ``factor`` may be negative."""
        return Interval(self.mean * factor, self.half_width * abs(factor), self.count)


def interval_of(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of ``values`` and the interval that holds the true mean with this confidence.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value, got none")
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan, count)
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + confidence / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_differences(values: Mapping[int, float], against: Mapping[int, float]) -> tuple[float, ...]:
    """``values - against`` for every seed that both have, in order of the seeds."""
    return tuple(values[seed] - against[seed] for seed in sorted(values.keys() & against.keys()))


def mean_over_tasks(differences: Sequence[Mapping[int, float]]) -> tuple[float, ...]:
    """For each seed that every task has: the mean of its differences, one per task."""
    if not differences:
        return ()
    seeds = sorted(set.intersection(*(set(one) for one in differences)))
    return tuple(statistics.fmean(one[seed] for one in differences) for seed in seeds)
