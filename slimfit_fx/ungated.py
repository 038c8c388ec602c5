"""Say once which units have no gate, and why: nobody reads the plan of a run that works."""

from __future__ import annotations

import logging

from slimfit_fx.session import Session, latest_graphs

log = logging.getLogger("slimfit_fx")
_MOST_NAMED = 4
"""Units that a message names before it only counts them."""
_NO_GRADIENT = "it receives no gradient in this graph"
"""As passes/describe_plan.py says it."""


class UngatedUnits:
    """Says once which units have a gradient but no gate: theirs is computed whatever is frozen, and then dropped.

    Another graph of the model may still give a unit its gate, so nothing is said before the first optimizer step.
    """

    def __init__(self) -> None:
        self._began: int | None = None
        self._said = False

    def look(self, current: Session) -> None:
        """Called before each training forward."""
        if self._said or not current.compiles:
            return
        self._began = current.steps if self._began is None else self._began
        if current.steps == self._began:
            return
        self._said = True
        found = ungated_units(current)
        if found:
            log.warning(
                "%d of %d units have no gate: their gradients are computed in every step, and dropped while they are "
                "frozen: %s",
                len(found),
                len(current.gates.names),
                "; ".join(_listed(names, reason) for reason, names in _by_reason(found).items()),
            )


def ungated_units(current: Session) -> dict[str, str]:
    """Unit -> why no graph that gives it a gradient has a gate for it."""
    gated: set[str] = set()
    why: dict[str, str] = {}
    for graph in latest_graphs(current.backend.graphs):
        if graph.plan is None or graph.plan.fallback is not None:
            continue  # not known, or told already
        gated |= {graph.unit_names[gate] for gate in graph.plan.gated}
        why |= {
            graph.unit_names[int(what.removeprefix("gate "))]: reason
            for what, reason in graph.plan.refusals
            if what.startswith("gate ") and reason != _NO_GRADIENT
        }
    return {name: reason for name, reason in why.items() if name not in gated}


def _by_reason(found: dict[str, str]) -> dict[str, list[str]]:
    return {reason: [name for name, why in found.items() if why == reason] for reason in dict.fromkeys(found.values())}


def _listed(names: list[str], reason: str) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more} ({reason})"
