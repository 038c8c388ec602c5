"""The largest batch, on made-up peaks: against trying every batch, and how often it asks."""

from __future__ import annotations

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_fx.planning.search import largest_batch


@st.composite
def peaks(draw):
    """Bytes by candidate and batch: growing, straight in parts, with steps; the last candidate need not be best."""
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        total, table = draw(st.integers(0, 500)), []
        slope = draw(st.integers(0, 40))
        for _ in range(60):
            slope = draw(st.sampled_from([slope] * 9 + [slope + 5]))
            total += slope + draw(st.sampled_from([0] * 5 + [3]))
            table.append(total)
        tables.append(table)
    return tables


@given(tables=peaks(), limit=st.integers(0, 2500), start=st.integers(1, 59), base=st.integers(0, 100))
@settings(max_examples=examples(300))
def test_it_finds_what_trying_all_finds(tables, limit, start, base):
    def takes(candidate: int, batch: int) -> int:
        return tables[candidate][batch - 1]

    def fits(candidate: int, batch: int) -> bool:
        return takes(candidate, batch) <= limit

    batch, chosen = largest_batch(takes, fits, len(tables), limit, start=start, base_bytes=base, most=60)
    expected = max((b for b in range(1, 61) if any(fits(c, b) for c in range(len(tables)))), default=0)
    later = max((b for b in range(1, 61) if any(fits(c, b) for c in range(chosen, len(tables)))), default=0)
    assert batch in (expected, later), "candidates before the chosen one are taken to be larger"
    if batch:
        assert fits(chosen, batch) and not any(fits(c, batch) for c in range(chosen))
        assert batch == 60 or not any(fits(c, batch + 1) for c in range(chosen, len(tables)))
    else:
        assert expected == 0


@pytest.mark.parametrize("limit", [10_000, 123_456, 40_000_000])
def test_a_straight_peak_takes_few_looks(limit):
    asked = []

    def takes(candidate: int, batch: int) -> int:
        asked.append((candidate, batch))
        return 4000 + 17 * batch

    batch, _ = largest_batch(takes, lambda c, b: takes(c, b) <= limit, 1, limit, start=8, base_bytes=3000)
    assert batch == (limit - 4000) // 17
    assert len(set(asked)) <= 5


@pytest.mark.parametrize("floor", [20_000, 100_000, 990_000])
def test_a_peak_that_is_flat_at_first_takes_few_looks(floor):
    """The optimizer's step takes the same whatever the batch."""
    asked = set()

    def takes(candidate: int, batch: int) -> int:
        asked.add((candidate, batch))
        return max(floor, 10_000 + 700 * batch)

    batch, _ = largest_batch(takes, lambda c, b: takes(c, b) <= 10**6, 1, 10**6, start=3, base_bytes=9000)
    assert batch == (10**6 - 10_000) // 700
    assert len(asked) <= 12 and max(b for _, b in asked) < 8 * batch


def test_what_follows_from_other_batches_is_not_asked():
    """What failed at a batch fails at a larger one: no candidate is asked about both."""
    asked = []
    slopes = [50, 40, 30, 11, 10, 12]

    def fits(candidate: int, batch: int) -> bool:
        asked.append((candidate, batch))
        return slopes[candidate] * batch <= 10_000

    batch, chosen = largest_batch(lambda c, b: slopes[c] * b, fits, len(slopes), 10_000, start=8)
    assert (batch, chosen) == (1000, 4)
    assert len(asked) == len(set(asked))
    for candidate in range(len(slopes)):
        about = [b for c, b in asked if c == candidate]
        failed = [b for b in about if slopes[candidate] * b > 10_000]
        assert len(failed) <= 1, (candidate, about)


def test_a_peak_that_does_not_grow_ends_at_the_largest_batch_looked_at():
    assert largest_batch(lambda c, b: 5, lambda c, b: True, 1, 10, start=8, most=1000) == (1000, 0)
    assert largest_batch(lambda c, b: 50, lambda c, b: False, 2, 10, start=8, most=1000) == (0, 1)
