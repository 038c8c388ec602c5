"""The largest batch that fits, with as few dry runs as may be: the peak is close to affine in the batch.

Pure arithmetic on what the caller measures. The peak of a candidate is taken to grow with the batch: what did not fit
fits no larger batch either, and what fits, fits any smaller one. The answer is always one that was seen to fit, and
whose successor no candidate fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Takes = Callable[[int, int], int]
"""(candidate, batch) -> bytes that a step takes."""
_PATIENCE = 8
"""Guesses by a straight line; after them, halving."""
_GROWTH = 8


def largest_batch(
    takes: Takes,
    fits: Callable[[int, int], bool],
    count: int,
    limit: int,
    *,
    start: int,
    base_bytes: int = 0,
    most: int = 1 << 24,
) -> tuple[int, int]:
    """(the largest batch that some candidate fits, the first candidate that does); (0, the last one) if none fits one.

    Args:
        takes: bytes by candidate and batch.
        fits: whether they are within ``limit``; may know it more cheaply. Not asked where the answer follows.
        count: candidates, numbered from 0; the last one is likely the smallest.
        limit: bytes.
        start: the first batch that is tried.
        base_bytes: what is there whatever the batch, as far as it is known.
        most: the largest batch that is looked at.
    """
    known = _Known(fits, dict.fromkeys(range(count), 0), dict.fromkeys(range(count), most + 1))
    best, batch = count - 1, 0
    while True:
        grown = _largest_of(known.watch(takes, best, limit), limit, max(start, batch + 1), base_bytes, most)
        batch = max(batch, grown)
        if batch == 0:
            others = (c for c in range(count - 1) if known.fits(c, 1))
            first = next(others, None)
            if first is None:
                return 0, best
            best, start = first, 1
            continue
        chosen = next((c for c in range(count) if known.fits(c, batch)), best)
        better = None if batch >= most else next((c for c in range(chosen, count) if known.fits(c, batch + 1)), None)
        if better is None:
            return batch, chosen
        best = better


@dataclass
class _Known:
    """What was seen of each candidate: the largest batch that fits and the smallest that does not."""

    ask: Callable[[int, int], bool]
    fitting: dict[int, int]
    failing: dict[int, int]

    def fits(self, candidate: int, batch: int) -> bool:
        """Whether ``batch`` fits; asked only if it does not follow."""
        if batch <= self.fitting[candidate]:
            return True
        if batch >= self.failing[candidate]:
            return False
        return self._note(candidate, batch, self.ask(candidate, batch))

    def watch(self, takes: Takes, candidate: int, limit: int) -> Callable[[int], int]:
        """``takes`` of one candidate, whose answers are remembered."""

        def watched(batch: int) -> int:
            size = takes(candidate, batch)
            self._note(candidate, batch, size <= limit)
            return size

        return watched

    def _note(self, candidate: int, batch: int, fits: bool) -> bool:
        if fits:
            self.fitting[candidate] = max(batch, self.fitting[candidate])
        else:
            self.failing[candidate] = min(batch, self.failing[candidate])
        return fits


def _largest_of(takes: Callable[[int], int], limit: int, start: int, base_bytes: int, most: int) -> int:
    """The largest batch up to ``most`` within ``limit``; 0 if not even one is."""
    known: dict[int, int] = {}
    batch = min(start, most)
    while True:
        known[batch] = takes(batch)
        low = max((b for b, size in known.items() if size <= limit), default=0)
        high = min((b for b, size in known.items() if size > limit), default=most + 1)
        if high <= low + 1:
            return high - 1
        batch = _guess(known, limit, low, high, base_bytes)


def _guess(known: Mapping[int, int], limit: int, low: int, high: int, base_bytes: int) -> int:
    """A batch strictly between ``low`` and ``high``, where a straight line through what is known meets the limit.

    Small batches may all take the same, what the optimizer's step takes: a line through those leads nowhere, so that
    the batch grows by a factor instead, and lines go through what is too large.
    """
    if high not in known:
        meets = _beyond(known, limit, low, base_bytes)
    elif len(known) > _PATIENCE:
        meets = (low + high) // 2
    elif low not in known or any(b < low and size == known[low] for b, size in known.items()):
        meets = _before(known, limit, high, base_bytes)
    elif high > _GROWTH * low:
        meets = math.sqrt(low * high)
    else:
        meets = low + (limit - known[low]) * (high - low) / (known[high] - known[low])
    return int(min(max(meets, low + 1), high - 1))


def _before(known: Mapping[int, int], limit: int, high: int, base_bytes: int) -> float:
    """A batch below ``high``, the smallest that was tried and is too large, where those that fit lie on no line."""
    above = min((b for b in known if b > high), default=0)
    slope = (known[above] - known[high]) / (above - high) if above else 0.0
    if slope <= 0:
        return high * (limit - base_bytes) / max(1, known[high] - base_bytes)
    return high - (known[high] - limit) / slope


def _beyond(known: Mapping[int, int], limit: int, low: int, base_bytes: int) -> float:
    """A batch above ``low``, the largest that was tried, which fits."""
    below = max((b for b in known if b < low), default=0)
    if not below:
        return max(2.0 * low, low * (limit - base_bytes) / max(1, known[low] - base_bytes))
    slope = (known[low] - known[below]) / (low - below)
    return low + (limit - known[low]) / slope if slope > 0 else float(_GROWTH * low)
