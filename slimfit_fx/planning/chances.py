"""How likely a value is needed: it is not where all gates that it serves are closed."""

from __future__ import annotations

from slimfit_fx.graph.joint import STATIC

MAX_GATES_PER_CONE = 4
"""A value that serves more gates than this is hardly ever unneeded: it is kept like a static one."""


def effective_gates(serves: frozenset[int]) -> frozenset[int]:
    """The gates that can drop a value: empty when it is static or serves too many gates."""
    if STATIC in serves or len(serves) > MAX_GATES_PER_CONE:
        return frozenset()
    return serves


def chance_open(serves: frozenset[int], freeze_rate: float) -> float:
    """The chance that some gate in ``serves`` is open when each is closed with probability ``freeze_rate``."""
    gates = effective_gates(serves)
    return 1.0 - freeze_rate ** len(gates) if gates else 1.0
