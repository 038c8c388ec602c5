"""What backward holds at its peak, by the joint graph and a cut alone: enough to compare levels of recompute.

::

    peak  =  saved values that are left  +  what ran again and is read later  +  gradients, of activations and of units

Nothing is partitioned and no code is written, as for the true peak (peak.py), which takes seconds for each level.
backward_run.py says what runs and until where values live. Pointwise work may write where an input was that nobody
reads any more. What is the same at every level is left out: parameters, inputs, what the forward returns.

Where blocks run in tiles, what is made counts with a tile's share of it. What passes from block to block is whole then,
too, but it is the same at every level.

A value that only some units need is there if one of them is open. The peak is that of the worst of the steps in which
the default schedule opens every unit once, in three orders: what training meets before long, and the allocator keeps.
The bound for any choice of units (``StepTrace.worst``) is no measure of levels: what it takes for possible, all of the
last layers' largest units at once, is the same for most of them, and hardly ever comes.

Against the code that Inductor writes for BERT-base and ViT-B: docs/memory.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.batch import BatchCut
from slimfit_fx.graph.joint import STATIC, nbytes
from slimfit_fx.planning.backward_run import COPIED, MADE, SAVED, Name, backward_run, owner, owners
from slimfit_fx.planning.mincut import Cut
from slimfit_fx.planning.peak import Event, StepTrace
from slimfit_fx.planning.planner import Planner
from slimfit_fx.schedule.base import UnitInfo
from slimfit_fx.schedule.ils import first_visits

_ROUNDS = 3
"""How often each unit is open in the steps that are looked at."""


def expected_peak(planner: Planner, cut: Cut) -> int:
    """Bytes at the peak of the worst of some steps of backward, where forward saves what ``cut`` says."""
    trace = expected_backward(planner, cut)
    return max(trace.peak(gates).peak_bytes for gates in visits(trace.gate_bytes, planner.freeze_rate))


@functools.lru_cache(maxsize=16)
def visits(gate_bytes: tuple[int, ...], freeze_rate: float) -> tuple[frozenset[int], ...]:
    """The gates that are open in each step until every one was, several times over, and no gates.

    ``gate_bytes``: of the gradients of each gate; gates without any stay closed.
    """
    units = [UnitInfo(str(gate), 0, size) for gate, size in enumerate(gate_bytes) if size]
    opened = max(1, len(units) - int(freeze_rate * len(units)))
    found = [frozenset[int]()]
    for seed in range(_ROUNDS):
        order = [int(name) for name in first_visits(units, opened, seed)]
        found += [frozenset(order[i : i + opened]) for i in range(0, len(order), opened)]
    return tuple(found)


def expected_backward(planner: Planner, cut: Cut) -> StepTrace:
    """The memory events of backward; the values that ``planner`` saves at ``cut`` come first."""
    run, blocks, tiles = backward_run(planner, cut), _Blocks(), planner.batch_cut
    grads = {owner(node, cut) for node in planner.joint.grad_nodes() if node is not None}
    for node in run.nodes:
        for size, of_units in planner.held_parts(node) if node in cut.saved else ():
            needs = run.needs[node] - {STATIC} if of_units else run.needs[node]
            blocks.take((node, SAVED), size, owners(needs))
    boundary = len(blocks.events)
    for place, node in enumerate(run.nodes):
        gone, gates = run.gone.get(place, []), owners(run.needs[node])
        if node in run.stands or node in grads:
            size = _size(node, tiles)
            if ops.is_pointwise(node):  # it may write over what nobody reads any more
                blocks.let_go([name for name in gone if name[1] != SAVED and blocks.is_like(name, size, gates)][:1])
            blocks.take((node, MADE), size, gates)
        copies = [(copied, COPIED) for copied in run.copies.get(place, ())]
        for name in copies:
            blocks.take(name, _size(name[0], tiles), gates)
        blocks.let_go([*copies, *(name for name in gone if name[0] not in grads)])
    return StepTrace(tuple(blocks.events), boundary, {}, len(planner.joint.gates), (), _gate_bytes(planner))


class _Blocks:
    """Writes events; what is let go twice is let go once."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._held: dict[Name, list[Event]] = {}

    def take(self, name: Name, size: float, gates: frozenset[int]) -> None:
        event = Event(round(size), len(self.events), gates, gates)
        self._held.setdefault(name, []).append(event)
        self.events.append(event)

    def let_go(self, names: Iterable[Name]) -> None:
        for name in names:
            self.events += [replace(event, delta_bytes=-event.delta_bytes) for event in self._held.pop(name, ())]

    def is_like(self, name: Name, size: float, gates: frozenset[int]) -> bool:
        return [(event.delta_bytes, event.owners) for event in self._held.get(name, ())] == [(round(size), gates)]


def _gate_bytes(planner: Planner) -> tuple[int, ...]:
    joint = planner.joint
    found = [0] * len(joint.gates)
    for gate, node in zip(joint.grads, joint.grad_nodes(), strict=True):
        if gate != STATIC and node is not None:
            found[gate] += nbytes(node)
    return tuple(found)


def _size(node: fx.Node, tiles: BatchCut | None) -> float:
    """Bytes that a value takes, of a tile if there are any; of several results all that are read."""
    several = isinstance(node.meta.get("val"), (tuple, list))
    results = [user for user in node.users if ops.is_getitem(user)] if several else [node]
    return sum(nbytes(n) * (tiles.share(n.meta.get("val")) if tiles else 1.0) for n in results)
