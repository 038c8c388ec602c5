"""``recompute="auto"``: run as much again as the closed units pay for, so that a step has no more to do than before.

A closed unit saves the product of its weight's gradient. With r of the units closed, that is up to r/3 of the step, and
whole blocks cost less than that to run again: each level of recompute is planned, and of those whose products are paid
for the one that saves the fewest bytes is taken. Products stand for time: they make up nearly all of it where there is
memory to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimfit_fx.planning.planner import Planner, Planning
from slimfit_fx.planning.roofline import node_flops

_SHARE_SPENT = 0.9
"""Of the operations that are spared, what may be spent on running products again; pointwise work takes the rest."""


@dataclass(frozen=True)
class Level:
    """One level of recompute, planned. Operations are those of an expected step: gates closed by their chance."""

    name: str
    planning: Planning
    saved_bytes: float
    """Expected; infinite if nothing could be planned."""
    again: float
    """Operations of products that forward ran and backward runs again."""
    spared: float
    """Operations of products that only closed units need."""
    has_blocks: bool
    """Repeated blocks were found, so that no chain of recompute runs through the whole model."""


def plan_level(planner: Planner) -> Level:
    """What ``planner`` comes to at its level."""
    planning = planner.plan()
    cut = planning.cut
    return Level(
        planner.recompute,
        planning,
        saved_bytes=math.inf if cut is None else sum(planner.save_cost(n) for n in cut.saved),
        again=0.0 if cut is None else sum(planner.chance(n) * node_flops(n) for n in cut.recomputed & planner.forward),
        spared=sum((1.0 - planner.chance(n)) * node_flops(n) for n in planner.needed_backward),
        has_blocks=bool(planner.boundaries),
    )


def choose(found: Sequence[Level]) -> Level:
    """Of levels in rising order of recompute the one that saves least among those that the closed units pay for.

    The first costs nothing extra by definition: others are held against it.
    """
    first = found[0]

    def is_paid(level: Level) -> bool:
        return level is first or (level.has_blocks and level.again - first.again <= _SHARE_SPENT * first.spared)

    return min(filter(is_paid, found), key=lambda level: level.saved_bytes)


def plan_paid(names: Sequence[str], planner: Planner) -> Planning:
    """Plan at every level of ``names``; return what the closed units pay for, with a note that says so."""
    chosen = choose([plan_level(planner.at_level(name)) for name in names])
    note = f'recompute "auto": {chosen.name}'
    if chosen.again and chosen.spared:
        note += f", {chosen.again / chosen.spared:.0%} of the operations that closed units are expected to spare"
    return replace(chosen.planning, note=note)
