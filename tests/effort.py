"""How much is tried: ``make test`` leaves out what ``make test-all`` runs, so that it ends within minutes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

THOROUGH = os.environ.get("SLIMFIT_FX_THOROUGH", "0") not in ("", "0")
"""Run tests marked ``thorough``, and all examples of the property tests that train models."""


def examples(count: int, share: int = 6) -> int:
    """How many of ``count`` examples are drawn: one in ``share`` of them unless everything is asked for.

    A larger ``share`` is for tests whose examples take seconds each.
    """
    return count if THOROUGH else -(-count // share)


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """All of what a test is parametrized by, of which ``make test`` takes the first ``count``.

    A tuple has one value for each name.
    """
    several = list(values)
    return several[:count] + [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)
        for value in several[count:]
    ]
