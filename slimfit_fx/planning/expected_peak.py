"""What backward holds at its peak, by the joint graph and a cut alone: enough to compare levels of recompute.

::

    peak  =  saved values that are left  +  what ran again and is read later  +  gradients, of activations and of units

Nothing is partitioned and no code is written, as for the true peak (peak.py), which takes seconds for each level.
Operators run in the order of the graph, and what runs again runs where it is read first. What only closed units need
does not run, if units are closed more often than not; their gradients count by the chance that they are open. A value
stands in memory if a product, or anything else that is neither pointwise nor a reduction, makes or reads it; the rest
is computed on the way to its readers. Pointwise work may write where an input was that nobody reads any more. What is
the same at every level is left out: parameters, inputs, what the forward returns.

Against the code that Inductor writes for BERT-base and ViT-B, with all units closed: docs/memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.planning.mincut import Cut
from slimfit_fx.planning.planner import Planner

_LIKELY = 0.5
"""The chance to be needed from which on a node counts as run."""
_MOST_READ = 4
"""What reads more values than these is put into memory, rather than computed anew by each of its readers."""


def expected_peak(planner: Planner, cut: Cut) -> float:
    """Bytes at the peak of backward, where forward saves what ``cut`` says and ``planner`` how."""
    run = list(_run_order(planner, cut))
    stands, last_read = _memory_of(planner, cut, run)
    grads = {_owner(node, cut) for node in planner.joint.grad_nodes() if node is not None}
    held = {node: planner.held_bytes(node) for node in cut.saved}
    now = peak = math.fsum(held.values())  # whatever the order of a set
    released: dict[int, list[fx.Node]] = {}
    for place, node in enumerate(run):
        if node in stands or node in grads:
            size = planner.chance(node) * _size(node)
            held[node] = held.get(node, 0.0) + size
            now += size
            gone = released.get(place, ())
            in_place = ops.is_pointwise(node) and any(held[old] == size and old not in cut.saved for old in gone)
            peak = max(peak, now - size * in_place)
        if node in held and node not in grads:
            released.setdefault(last_read.get(node, place), []).append(node)
        now -= sum(held.pop(old) for old in released.pop(place, ()))
    return peak


def _run_order(planner: Planner, cut: Cut) -> Iterator[fx.Node]:
    """What backward runs, with what runs again, and saved values where they are read first.

    What does not run is there, too, without what it would read.
    """
    done = set[fx.Node]()

    def wanted(node: fx.Node) -> bool:
        return node not in done and (node in cut.recomputed or node in cut.saved)

    for node in planner.joint.graph.nodes:
        stack = [node] if node in planner.needed_backward else []
        while stack:
            first = stack[-1]
            missing = [i for i in _reads(planner, cut, first) if wanted(i)]
            if missing:
                stack.append(missing[0])
                continue
            stack.pop()
            done.add(first)
            yield first


def _reads(planner: Planner, cut: Cut, node: fx.Node) -> list[fx.Node]:
    """What backward reads to make ``node``; nothing for what is saved, and for what closed units alone need."""
    is_unlikely = node in planner.needed_backward and planner.chance(node) < _LIKELY
    return [] if node in cut.saved or is_unlikely else node.all_input_nodes


def _memory_of(planner: Planner, cut: Cut, run: list[fx.Node]) -> tuple[set[fx.Node], dict[fx.Node, int]]:
    """Which values stand in memory, and where each is read last, by its readers or by what is fused with them.

    Of saved values those that are decoded into memory.
    """
    reads = [_reads(planner, cut, node) for node in run]
    alone = {_owner(i, cut) for node, inputs in zip(run, reads, strict=True) if _stands_alone(node) for i in inputs}
    stands, last_read = set[fx.Node](), dict[fx.Node, int]()
    sources: dict[fx.Node, set[fx.Node]] = {}
    """Of each value what must be in memory for it to be read."""
    for place, (node, inputs) in enumerate(zip(run, reads, strict=True)):
        read = set[fx.Node]().union(*(sources.get(_owner(i, cut), ()) for i in inputs))
        last_read.update(dict.fromkeys(read, place))
        if node in cut.saved:
            is_made = node in alone and planner.decide(node).codec is not None
        else:
            is_fused = ops.is_pointwise(node) and node not in alone and len(read) <= _MOST_READ
            is_made = bool(inputs) and _has_memory(node) and not is_fused
        if is_made:
            stands.add(node)
        sources[node] = {node} if node in stands or node in cut.saved else read
    return stands, last_read


def _owner(node: fx.Node, cut: Cut) -> fx.Node:
    """The operator whose memory ``node`` shows; one with several results owns them all, those that are saved aside."""
    while node not in cut.saved and (ops.is_view(node) or ops.is_getitem(node)):
        node = node.all_input_nodes[0]
    return node


def _size(node: fx.Node) -> int:
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return nbytes(node)
    return sum(nbytes(result) for result in node.users if ops.is_getitem(result))


def _has_memory(node: fx.Node) -> bool:
    if node.op != "call_function" or ops.is_getitem(node):
        return False
    return not (ops.is_view(node) or ops.is_creation(node) or ops.is_symbol(node))


def _stands_alone(node: fx.Node) -> bool:
    """Whether it reads its inputs from memory, and is not computed on the way to its readers."""
    return _has_memory(node) and not (ops.is_pointwise(node) or ops.is_reduction(node))
