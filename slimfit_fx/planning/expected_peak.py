"""What backward holds at its peak, by the joint graph and a cut alone: enough to compare levels of recompute.

::

    peak  =  saved values that are left  +  what ran again and is read later  +  gradients, of activations and of units

Nothing is partitioned and no code is written, as for the true peak (peak.py), which takes seconds for each level.
backward_run.py says what runs and until where values live. Pointwise work may write where an input was that nobody
reads any more. What is the same at every level is left out: parameters, inputs, what the forward returns.

A value that only some units need is there if one of them is open. The peak is that of the worst choice of as many units
as a step opens at the freeze rate: training meets most choices sooner or later, and the allocator keeps what it took.

Against the code that Inductor writes for BERT-base and ViT-B: docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC, nbytes
from slimfit_fx.planning.backward_run import COPIED, MADE, SAVED, Name, backward_run, owner, owners
from slimfit_fx.planning.mincut import Cut
from slimfit_fx.planning.peak import Event, StepTrace
from slimfit_fx.planning.planner import Planner


def expected_peak(planner: Planner, cut: Cut) -> int:
    """Bytes at the peak of backward under the worst choice of units, where forward saves what ``cut`` says."""
    trace = expected_backward(planner, cut)
    return trace.worst(*most_open(trace, planner.freeze_rate))[0]


def most_open(trace: StepTrace, freeze_rate: float) -> tuple[int, int]:
    """How many gates a step opens, and what their gradients take at most in a step that is level, in bytes."""
    sizes = trace.gate_bytes
    there = sum(size > 0 for size in sizes)
    opened = there - int(freeze_rate * there)
    return opened, max(max(sizes, default=0), sum(sizes) * opened // max(1, there))


def expected_backward(planner: Planner, cut: Cut) -> StepTrace:
    """The memory events of backward; the values that ``planner`` saves at ``cut`` come first."""
    run, blocks = backward_run(planner, cut), _Blocks()
    grads = {owner(node, cut) for node in planner.joint.grad_nodes() if node is not None}
    for node in run.nodes:
        for size, of_units in planner.held_parts(node) if node in cut.saved else ():
            needs = run.needs[node] - {STATIC} if of_units else run.needs[node]
            blocks.take((node, SAVED), size, owners(needs))
    boundary = len(blocks.events)
    for place, node in enumerate(run.nodes):
        gone, gates = run.gone.get(place, []), owners(run.needs[node])
        if node in run.stands or node in grads:
            size = _size(node)
            if ops.is_pointwise(node):  # it may write over what nobody reads any more
                blocks.let_go([name for name in gone if name[1] != SAVED and blocks.is_like(name, size, gates)][:1])
            blocks.take((node, MADE), size, gates)
        copies = [(copied, COPIED) for copied in run.copies.get(place, ())]
        for name in copies:
            blocks.take(name, _size(name[0]), gates)
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

    def is_like(self, name: Name, size: int, gates: frozenset[int]) -> bool:
        return [(event.delta_bytes, event.owners) for event in self._held.get(name, ())] == [(size, gates)]


def _gate_bytes(planner: Planner) -> tuple[int, ...]:
    joint = planner.joint
    found = [0] * len(joint.gates)
    for gate, node in zip(joint.grads, joint.grad_nodes(), strict=True):
        if gate != STATIC and node is not None:
            found[gate] += nbytes(node)
    return tuple(found)


def _size(node: fx.Node) -> int:
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return nbytes(node)
    return sum(nbytes(result) for result in node.users if ops.is_getitem(result))
