"""ILS, inter-layer scheduling: freeze the units whose weights moved least.

Source: SlimFit (arXiv 2305.18513) and its authors' code. Every unit has a distance. Before each step the
``int(freeze_rate * n)`` units of smallest distance are frozen; after it, the units that were open get the distance that
they moved, and a frozen one keeps its last. Distances start random and huge, so every unit is visited once, in random
order, before any is visited twice. That is ``PaperScheduler``.

``InterLayerScheduler`` compares what units have missed: how fast one moves (its distance per learning rate) times the
root of the optimizer steps since it was last open, since steps in changing directions add up by their root. An update
of an Adam is about as long as the learning rate, so that a unit's distances hardly differ from step to step, but follow
that rate. By distances alone the same few units stay open while it is constant, and one that was first visited early in
a warmup, at a tenth of the rate, is frozen until the rate has fallen to a tenth again: which units train then depends
on the seed. By what they have missed a unit that moves twice as fast trains four times as often, up to every step, and
all have their turn.

Seven cases that the paper leaves open:

- The first visits are levelled: units that are first visited in the same step are chosen, at random, so that the bytes
  of their gradients are about equal in every step. A word embedding is not opened together with three large matrices:
  the peak of a run is that of its worst step.
- ``InterLayerScheduler`` holds to that level ever after: a unit that does not fit beside those that have missed more
  lets a smaller one go first, and comes first itself before long. Where small units are pinned and the others too large
  for as many of them, fewer are open.

- Equal distances: the unit that comes first in the model is opened first.
- A distance that is NaN or infinite (weights that overflowed, a tensor that was all zero before the step) changes
  nothing: NaN has no order, and infinity would hold the unit open for ever. The last finite distance is the last thing
  known; for a unit never measured that is its start distance, so it is visited again.
- A step in which no open unit moved at all (a learning rate of 0, as in the first step of a linear warmup) says nothing
  about the units. Taken as distances of 0 it would freeze them for good, since everything else moves more. Their
  distances are halved instead: others get their turn first, and nobody drops out.
- A unit that was open but whose first distance has not been reported (a GPU's distances arrive a step late; a
  parameter may be in no optimizer) ranks last until it is. Otherwise late reports would open each unit twice, and a
  unit never reported would keep its place for ever.
- Measured distances are capped below the start distances, so that a weight near 0 (a huge ratio) cannot push an
  unvisited unit out of its first visit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slimfit_fx.schedule.base import Scheduler, UnitInfo, hash_fraction

_START = 2.0**60
"""Start distances lie in [_START, 2 * _START)."""
_CAP = 2.0**40
"""Largest measured distance. Twenty steps without movement lie between it and the start distances."""
_ABOVE_LEVEL = 1.5
"""Times the mean load of first visits that a step may have at least. Norms weigh nothing and hardly ever come again, so
that later steps have more to carry than first visits."""


@dataclass(frozen=True)
class Level:
    """Bytes of gradients that a step may open."""

    room: int
    """For units in the order of what they have missed: those of the heaviest step of first visits, or little more."""
    most: int
    """In all, with small ones that take the places for which no larger unit fits."""


def first_visits(units: Sequence[UnitInfo], per_step: int, seed: int) -> list[str]:
    """Return the names of ``units`` in the order of their first visit, ``per_step`` in each step.

    Random by seed and names, and levelled: the largest units go first into the step with the fewest gradient bytes that
    has a place left, so that no step gets many of them.
    """
    if not units:
        return []
    chance = {unit.name: hash_fraction("ils", seed, unit.name) for unit in units}
    steps = -(-len(units) // per_step)
    places = [per_step] * (steps - 1) + [len(units) - per_step * (steps - 1)]
    load, visits = [0] * steps, [[] for _ in range(steps)]  # type: tuple[list[int], list[list[str]]]
    turn = [hash_fraction("ils step", seed, step) for step in range(steps)]
    for unit in sorted(units, key=lambda u: (-u.grad_bytes, chance[u.name])):
        free = [step for step in range(steps) if len(visits[step]) < places[step]]
        chosen = min(free, key=lambda step: (load[step], len(visits[step]) - places[step], turn[step]))
        visits[chosen].append(unit.name)
        load[chosen] += unit.grad_bytes
    return [name for step in visits for name in sorted(step, key=lambda name: chance[name])]


def level_of(units: Sequence[UnitInfo], per_step: int) -> Level:
    """The level of steps that open ``per_step`` of ``units``: whatever the seed, all first visits keep it."""
    if not units:
        return Level(0, 0)
    bytes_of = {unit.name: unit.grad_bytes for unit in units}
    order = first_visits(units, per_step, 0)
    loads = [sum(bytes_of[name] for name in order[i : i + per_step]) for i in range(0, len(order), per_step)]
    room = max([*loads, int(_ABOVE_LEVEL * sum(loads) / len(loads))])
    return Level(room, room + sum(heapq.nsmallest(per_step, bytes_of.values())))


def choose(ranked: Sequence[UnitInfo], count: int, level: Level) -> list[UnitInfo]:
    """Return ``count`` units: the first one, then those whose gradients find room beside the ones before them.

    If these are too few, the smallest of the others come with them, as far as the level allows: it allows all unless
    some units are not in ``ranked``.
    """
    chosen: list[UnitInfo] = []
    left: list[UnitInfo] = []
    room = level.room
    for unit in ranked:
        if len(chosen) < count and unit.grad_bytes <= room:
            chosen.append(unit)
            room -= unit.grad_bytes
        else:
            left.append(unit)
    room += level.most - level.room
    for unit in sorted(left, key=lambda unit: unit.grad_bytes)[: count - len(chosen)]:
        if unit.grad_bytes <= room:
            chosen.append(unit)
            room -= unit.grad_bytes
    return chosen


class InterLayerScheduler(Scheduler):
    """Each step the ``int(freeze_rate * n)`` units are frozen that have missed least since they were open."""

    needs_distances: ClassVar[bool] = True
    by_rate: ClassVar[bool] = True
    per_learning_rate: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True
    """Whether what a closed unit misses adds up from step to step, and steps are level."""

    def __init__(self) -> None:
        """Create it with no units; :meth:`start` gives it some."""
        self._distances: dict[str, float] = {}
        self._missed: dict[str, int] = {}
        """Optimizer steps since the unit was last open, and the coming one."""
        self._opened: frozenset[str] = frozenset()
        """The last answer of select()."""
        self._unreported: frozenset[str] = frozenset()
        """Units that were open in a step whose distance has not come yet."""
        self._level = Level(0, 0)

    def start(self, units: Sequence[UnitInfo], *, freeze_rate: float, seed: int) -> None:
        """Begin a run with huge distances whose order depends on the seed and on the units' names and sizes only."""
        super().start(units, freeze_rate=freeze_rate, seed=seed)
        order = first_visits(self.units, self.open_count, seed)
        self._distances = {name: _START * (2.0 - (i + 1) / (len(order) + 1)) for i, name in enumerate(order)}
        self._missed = dict.fromkeys(order, 1)
        everything = sum(unit.grad_bytes for unit in self.units)
        self._level = level_of(self.units, self.open_count) if self.adds_up else Level(everything, everything)
        self._opened = self._unreported = frozenset()

    def most_open_bytes(self, count: int) -> int:
        """Return the bytes of gradients that no step with ``count`` open units exceeds: its level."""
        any_units = super().most_open_bytes(count)
        return min(any_units, level_of(self.units, count).most) if self.adds_up and count else any_units

    @property
    def distances(self) -> dict[str, float]:
        """The distance of each unit as known now (a copy). Above 2**40: not measured yet."""
        return dict(self._distances)

    def select(self) -> frozenset[str]:
        """Return the ``open_count`` units that have missed most, if they find room; equal ones in model order."""
        ranked = sorted(self.candidates, key=lambda unit: -self._rank(unit.name))  # sorted() is stable
        self._opened = frozenset(unit.name for unit in choose(ranked, self.open_count, self._level))
        return self._opened

    def _rank(self, name: str) -> float:
        distance = self._distances[name]
        if distance > _CAP:
            return -1.0 if name in self._unreported else distance
        return min(distance * math.sqrt(self._missed[name]), _CAP) if self.adds_up else distance

    def observe(self, distances: Mapping[str, float]) -> None:
        """Take the distances of the units that were open. See the module's text for NaN, infinity and all zeros.

        Raises:
            ValueError: a name that is no unit, or a negative distance (nothing is changed then).
        """
        negative = [name for name, distance in distances.items() if distance < 0.0]
        if negative:
            raise ValueError(f"distance of {negative[0]!r} must be >= 0, got {distances[negative[0]]!r}")
        super().observe(distances)
        self._unreported = (self._unreported | self._opened) - distances.keys()
        self._missed = {name: 1 if name in self._opened else steps + 1 for name, steps in self._missed.items()}
        nothing_moved = all(distance == 0.0 for distance in distances.values())
        for name, distance in distances.items():
            if nothing_moved:
                self._distances[name] *= 0.5
            elif math.isfinite(distance):
                self._distances[name] = min(float(distance), _CAP)

    def state_dict(self) -> dict[str, Any]:
        """Return step, seed, all distances (JSON keeps Python floats exactly), steps missed, who waits for a report."""
        return {
            **super().state_dict(),
            "distances": [self._distances[name] for name in self._names()],
            "missed": [self._missed[name] for name in self._names()],
            "opened": sorted(self._opened),
            "unreported": sorted(self._unreported),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` of the same units."""
        self._check_state(state)
        distances = dict(zip(self._names(), map(float, state["distances"]), strict=True))
        missed = dict(zip(self._names(), map(int, state["missed"]), strict=True))
        opened, unreported = frozenset(state["opened"]), frozenset(state["unreported"])
        super().load_state_dict(state)
        self._distances, self._missed, self._opened, self._unreported = distances, missed, opened, unreported


class PaperScheduler(InterLayerScheduler):
    """The paper's: each step the ``int(freeze_rate * n)`` units that moved least are frozen."""

    per_learning_rate: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
