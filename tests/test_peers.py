"""What is said when the ranks of a distributed job do not decide alike; test_distributed.py has it happen."""

from __future__ import annotations

import pytest

from slimfit_fx.runtime.peers import _difference, _hash

NAMES = ("a", "b", "c")
State = tuple[int, list[str], dict[str, float]]
FIRST: State = (7, ["a", "b"], {"a": 0.5, "b": 0.25})


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((7, ["a"], {"a": 0.5, "b": 0.25}), "after step 7: unit 'b' is open on rank 0, closed on rank 2"),
        ((7, ["a", "b", "c"], {"a": 0.5, "b": 0.25}), "after step 7: unit 'c' is closed on rank 0, open on rank 2"),
        (
            (7, ["a", "b"], {"a": 0.5, "b": 0.75}),
            "after step 7: the distance of unit 'b' is 0.25 on rank 0, 0.75 on rank 2",
        ),
        (
            (7, ["a", "b"], {"a": 0.5}),
            "after step 7: the distance of unit 'b' is 0.25 on rank 0, None on rank 2",
        ),
        ((8, ["a", "b"], {"a": 0.5, "b": 0.25}), "ranks disagree: rank 0 is at step 7, rank 2 at step 8"),
    ],
    ids=["closed there", "open there", "distance", "no distance", "step"],
)
def test_the_first_rank_that_differs_is_named_and_in_what(other, expected):
    assert _hash(*_hashed(other)) != _hash(*_hashed(FIRST))
    said = _difference(NAMES, [FIRST, FIRST, other, other])
    assert f"{expected}; every rank must use the same settings" in said


def test_a_unit_comes_before_a_distance_and_both_before_the_step():
    other: State = (8, ["a", "c"], {"a": 0.5, "b": 0.75})
    assert "unit 'b' is open on rank 0, closed on rank 1" in _difference(NAMES, [FIRST, other])
    other = (8, ["a", "b"], {"a": 1.5, "b": 0.75})
    assert "the distance of unit 'a' is 0.5 on rank 0, 1.5 on rank 1" in _difference(NAMES, [FIRST, other])


def test_equal_states_are_our_own_bug():
    with pytest.raises(AssertionError, match="hashes differ, states do not"):
        _difference(NAMES, [FIRST, FIRST])


def _hashed(state: State) -> tuple[int, frozenset[str], dict[str, float]]:
    step, opened, distances = state
    return step, frozenset(opened), distances
