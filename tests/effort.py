"""How much is tried: ``make test`` leaves out what ``make test-all`` runs, so that it ends within minutes."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("SLIMFIT_FX_THOROUGH", "0") not in ("", "0")
"""Run tests marked ``thorough``, and all examples of the property tests that train models."""


def examples(count: int) -> int:
    """How many of ``count`` examples are drawn: a third of them unless everything is asked for."""
    return count if THOROUGH else -(-count // 3)
