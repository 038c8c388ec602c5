"""The largest batch that fits, with as few dry runs as may be: the peak is close to affine in the batch.

Pure arithmetic on what the caller measures. The peak is taken to grow with the batch; the answer is always one that
fits, whose successor was seen not to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Takes = Callable[[int, int], int]
"""(candidate, batch) -> bytes that a step takes."""
_PATIENCE = 8
"""Guesses by a straight line; after them, halving."""


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
        fits: whether they are within ``limit``; may know it more cheaply.
        count: candidates, numbered from 0; the last one is likely the smallest.
        limit: bytes.
        start: the first batch that is tried.
        base_bytes: what is there whatever the batch, as far as it is known.
        most: the largest batch that is looked at.
    """
    best, batch = count - 1, 0
    while True:
        grown = _largest_of(lambda b, c=best: takes(c, b), limit, max(start, batch + 1), base_bytes, most)  # type: ignore[misc]
        batch = max(batch, grown)
        if batch == 0:
            others = (c for c in range(count - 1) if fits(c, 1))
            first = next(others, None)
            if first is None:
                return 0, best
            best, start = first, 1
            continue
        chosen = next((c for c in range(count) if fits(c, batch)), best)
        better = None if batch >= most else next((c for c in range(chosen, count) if fits(c, batch + 1)), None)
        if better is None:
            return batch, chosen
        best = better


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
    """A batch strictly between ``low`` and ``high``, where a straight line through what is known meets the limit."""
    if len(known) > _PATIENCE:
        return (low + high) // 2
    if len(known) == 1:
        ((b, size),) = known.items()
        slope, (at, there) = max(1.0, (size - base_bytes) / b), (b, size)
    else:
        near = sorted(known, key=lambda b: abs(known[b] - limit))[:2]
        first, second = sorted(near)
        slope = max(1.0, (known[second] - known[first]) / (second - first))
        at, there = first, known[first]
    meets = at + (limit - there) / slope
    return int(min(max(meets, low + 1), high - 1))
