"""``recompute="auto"``: run as much again as the closed units pay for, so that a step has no more to do than before.

A closed unit saves the product of its weight's gradient. With r of the units closed, that is up to r/3 of the step, and
whole blocks cost less than that to run again: each level of recompute is planned, and of those whose products are paid
for the one with the fewest bytes at the peak is taken, or one in as many of the blocks as are paid for (``afford``).
Products stand for time: they make up nearly all of it where there is memory to be saved.

Bytes at the peak are those that the joint graph lets expect (expected_peak.py) of the worst of some steps: all that is
saved, and what a block brings back for its own backward. Saved bytes alone mislead: where attention scores stand in
memory, whole blocks bring so much back that BERT-base takes 1.5 times what it takes if attention's output is saved,
too. The peak falls where backward begins, or in the first block that runs again: the last blocks, as many as
save no more than one of them brings back, need not run again (``shrink``).

Accuracy has a price, too: a level counts with its bytes times 1 + the relative gradient error to expect of its codecs.
What blocks are computed again from is stored in eight bits by every preset, so under one of four bits these blocks lose
less, and the last ones run again as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimfit_fx.graph.joint import nbytes
from slimfit_fx.planning.expected_peak import expected_peak
from slimfit_fx.planning.planner import Planner, Planning
from slimfit_fx.planning.rows import Faster
from slimfit_fx.planning.sensitivity import expected_of
from slimfit_fx.presets import PARTS

_PRODUCT_PRICES = {"products": (1.0, 0.125)}
"""Times their usual price what products count with: the rates of a device say whether their time is worth the bytes,
but time that closed units spare is there to be spent."""
_WORTH_ITS_TIME = 0.95
"""Times what a level costs in fewer blocks it must cost at most in all of them, for these to run again."""
_SAME_PEAK = 1.01
"""Times the peak of all blocks that fewer of them may be expected to peak at."""
_SHARE_SPENT = 0.9
"""Of the operations that are spared, what may be spent on running products again; pointwise work takes the rest."""


@dataclass(frozen=True)
class Level:
    """One level of recompute, planned. Operations are those of an expected step: gates closed by their chance."""

    name: str
    planning: Planning
    saved_bytes: float
    """Expected, where backward begins; infinite if nothing could be planned."""
    peak_bytes: float
    """Expected, in backward, of the worst of some steps."""
    again: float
    """Operations of products that forward ran and backward runs again."""
    spared: float
    """Operations of products that only closed units need."""
    blocks: int
    """How many repeated blocks were found; without any a chain of recompute would run through the whole model."""
    share: float = 1.0
    """Of the blocks, from the first on: where the level holds."""
    error: float = 0.0
    """The relative gradient error to expect of its codecs; 0 where that is not known."""
    product_price: float = 1.0
    """Times their usual price what products that run again were counted with."""

    @property
    def working_bytes(self) -> float:
        """What backward takes beside what is saved."""
        return self.peak_bytes - self.saved_bytes

    @property
    def cost(self) -> float:
        """Bytes at the peak, with a price on what codecs lose."""
        return self.peak_bytes * (1.0 + self.error)


def plan_level(planner: Planner) -> Level:
    """What ``planner`` comes to at its level."""
    planning = planner.plan()
    cut = planning.cut
    return Level(
        planner.recompute,
        planning,
        saved_bytes=math.inf if cut is None else math.fsum(map(planner.held_bytes, cut.saved)),
        peak_bytes=math.inf if cut is None else expected_peak(planner, cut),
        again=0.0 if cut is None else math.fsum(map(planner.expected_flops, cut.recomputed & planner.forward)),
        spared=planner.spared_flops,
        blocks=planning.blocks,
        share=planner.recompute_share,
        error=_error_of(planning),
        product_price=planner.product_price,
    )


def _error_of(planning: Planning) -> float:
    stored: dict[tuple[str, str | None], int] = {}
    for node, decision in planning.decisions.items():
        kept_as = [(decision.kind, decision.codec)]
        if decision.parts is not None:  # what units read was not measured apart: it loses less than all of them
            kept_as = [(PARTS[decision.kind][0], decision.parts[0]), (decision.kind, decision.parts[1])]
        for kind, codec in kept_as:
            key = kind, None if codec is None else codec.name
            stored[key] = stored.get(key, 0) + nbytes(node)
    return expected_of(stored) or 0.0


def shrink(planner: Planner, level: Level, first: Level) -> Level | None:
    """``level`` in the fewest blocks that do not raise its peak; None if ``first`` peaks no higher than it would."""
    if not level.saved_bytes < first.saved_bytes:  # also where neither could be planned
        return None
    more_at_work = max(0.0, level.working_bytes - first.working_bytes)
    most = int(level.blocks * more_at_work / (first.saved_bytes - level.saved_bytes))
    if most >= level.blocks:
        return None
    for spared in range(most, 0, -1):
        fewer = plan_level(planner.at_level(level.name, 1 - spared / level.blocks, level.product_price))
        if fewer.peak_bytes <= _SAME_PEAK * level.peak_bytes:
            return fewer
    return level


def spare(planner: Planner, level: Level, first: Level) -> list[Level]:
    """``level`` in fewer blocks, and in all of them if these cost less.

    So they do where something large is brought back anyway, or where the last blocks would be stored in fewer bits.
    """
    fewer = shrink(planner, level, first)
    if fewer is None:
        return []
    return [fewer, level] if level.cost < _WORTH_ITS_TIME * fewer.cost else [fewer]


def afford(planner: Planner, level: Level, first: Level) -> list[Level]:
    """``level`` in as many of the blocks as the closed units pay for, if they do not pay for all of its blocks."""
    if _is_paid(level, first) or not level.blocks:
        return []
    paid = level.blocks * level.share * _SHARE_SPENT * first.spared / (level.again - first.again)
    for count in range(int(paid), 0, -1):
        fewer = plan_level(planner.at_level(level.name, count / level.blocks, level.product_price))
        if _is_paid(fewer, first):
            return [fewer]
    return []


def _is_paid(level: Level, first: Level) -> bool:
    """``first`` costs nothing extra by definition: others are held against it."""
    return level is first or (level.blocks > 0 and level.again - first.again <= _SHARE_SPENT * first.spared)


def choose(found: Sequence[Level]) -> Level:
    """Of levels in rising order of recompute the one that costs least among those the closed units pay for."""
    first = found[0]
    return min((level for level in found if _is_paid(level, first)), key=lambda level: level.cost)


def plan_paid(names: Sequence[str], planner: Planner) -> Planning:
    """Plan at every level of ``names``; return what the closed units pay for, with a note if it is not the first."""
    steps = [(name, price) for name in names for price in _PRODUCT_PRICES.get(name, (1.0,))]
    first, *more = (plan_level(planner.at_level(name, product_price=price)) for name, price in steps)
    chosen = first
    for level in sorted(more, key=lambda level: level.cost):
        if chosen is not first and level.cost >= chosen.cost:  # in fewer blocks it hardly costs less
            break
        fewer = spare(planner, level, first)
        chosen = choose([first, chosen, *fewer, *(one for other in fewer[:1] for one in afford(planner, other, first))])
    if chosen is first:
        return chosen.planning
    note = f'recompute "auto": {chosen.name}'
    if chosen.share < 1:
        note += f" in the first {chosen.share:.0%}"
    if chosen.again and chosen.spared:
        note += f", {chosen.again / chosen.spared:.0%} of the operations that closed units are expected to spare"
    return replace(chosen.planning, note=note, faster=_faster(planner, first, chosen))


def _faster(planner: Planner, first: Level, chosen: Level) -> Faster | None:
    """What ``first`` would cost and spare; None if it spares no time."""
    times = [planner.expected_time(level.planning) for level in (first, chosen)]
    spent = [math.inf if t is None else t.again_ms + t.codecs_ms for t in times]
    if not spent[0] < spent[1] < math.inf:
        return None
    return Faster(first.name, round(first.peak_bytes - chosen.peak_bytes), spent[1] - spent[0], first.error)
