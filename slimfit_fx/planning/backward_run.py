"""What backward runs for a cut of the joint graph, in which order, and until where values stand in memory.

By the graph alone: nothing is partitioned and no code is written. What the passes and the compiler will do is taken for
granted:

* what runs again runs where it is read first (sink_backward.py), for each product anew if that is cheap and starts from
  a saved value (hold_recompute.py);
* branches run as early as their operands are there, and make what is cheap themselves (find_cones.py, insert_gates.py);
* a value stands in memory if a product, or anything else that is neither pointwise nor a reduction, makes or reads it;
  the rest is computed on the way to its readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC
from slimfit_fx.planning.chances import effective_gates
from slimfit_fx.planning.mincut import Cut
from slimfit_fx.planning.planner import Planner

_MOST_READ = 4
"""What reads more values than these is put into memory, rather than computed anew by each of its readers."""

SAVED, MADE, COPIED = "saved", "made", "copied"
Name = tuple[fx.Node, str]
"""A value in memory: as forward saved it, as backward made or decoded it, or made once more for one reader."""
Needs = dict[fx.Node, set[int]]
"""The gates whose gradients need a value, and STATIC if it is needed whatever is open."""


@dataclass(frozen=True)
class BackwardRun:
    """What runs, in order; saved values are there where they are read first."""

    nodes: list[fx.Node]
    needs: Needs
    stands: set[fx.Node]
    """What is in memory once it was made; of saved values those that are decoded into memory."""
    gone: dict[int, list[Name]]
    """What nobody reads behind this place."""
    copies: dict[int, list[fx.Node]]
    """What is made once more, for the operator at this place."""


def backward_run(planner: Planner, cut: Cut) -> BackwardRun:
    """What backward runs where forward saves what ``cut`` says."""
    order = [node for node in planner.joint.graph.nodes if node in planner.needed_backward]
    needs = _needs(planner, cut, list(_run(order, cut)))
    nodes = list(_run(_branches_first(order, needs), cut))
    return _lives(planner, cut, nodes, needs)


def owners(needs: set[int]) -> frozenset[int]:
    """The gates of which one must be open for a value with these needs to be there; empty: it always is."""
    return effective_gates(frozenset(needs))


def _needs(planner: Planner, cut: Cut, run: list[fx.Node]) -> Needs:
    """What of ``run`` is needed for which gates."""
    needs: Needs = {node: set() for node in run}
    for gate, grad in zip(planner.joint.grads, planner.joint.grad_nodes(), strict=True):
        if grad in needs:
            needs[grad].add(gate)
    for node in reversed(run):
        mine = needs[node] or {STATIC}  # what has no reader acts by itself
        for read in _reads(cut, node):
            if read in needs:
                needs[read] |= mine if effective_gates(frozenset(mine)) else {STATIC}
    return needs


def _branches_first(order: list[fx.Node], needs: Needs) -> list[fx.Node]:
    """``order``, with what runs in branches as early as its operands are there (insert_gates.py)."""
    places: dict[fx.Node, int] = {}
    for place, node in enumerate(order):
        inputs = [places[i] for i in node.all_input_nodes if i in places]
        places[node] = max(inputs) if inputs and owners(needs[node]) else place
    return sorted(order, key=places.__getitem__)


def _run(order: list[fx.Node], cut: Cut) -> Iterator[fx.Node]:
    """What backward runs: ``order``, and before it what runs again and saved values, where they are read first."""
    done = set[fx.Node]()

    def wanted(node: fx.Node) -> bool:
        return node not in done and (node in cut.recomputed or node in cut.saved)

    for node in order:
        stack = [node]
        while stack:
            first = stack[-1]
            missing = [i for i in _reads(cut, first) if wanted(i)]
            if missing:
                stack.append(missing[0])
                continue
            stack.pop()
            done.add(first)
            yield first


def _reads(cut: Cut, node: fx.Node) -> list[fx.Node]:
    """What backward reads to make ``node``; nothing for what is saved."""
    return [] if node in cut.saved else node.all_input_nodes


def _lives(planner: Planner, cut: Cut, run: list[fx.Node], needs: Needs) -> BackwardRun:
    """Values live until their last reader, or until that of what is fused with them.

    Neither a branch nor a product keeps what is cheap to make once more: a branch not from values that are there in any
    case (find_cones.py), a product not from saved ones (hold_recompute.py).
    """
    chains = _chains(cut, run)
    reads = [
        [] if _is_seen_through(node, cut) else list(dict.fromkeys(owner(i, cut) for i in _reads(cut, node)))
        for node in run
    ]
    again = [_made_once_more(node, inputs, needs, chains) for node, inputs in zip(run, reads, strict=True)]
    in_memory = {
        i
        for node, inputs, others in zip(run, reads, again, strict=True)
        for i in inputs
        if _stands_alone(node) and i not in others
    }
    stands, until, copies = set[fx.Node](), dict[Name, int](), dict[int, list[fx.Node]]()
    direct, behind = dict[fx.Node, set[Name]](), dict[fx.Node, set[Name]]()
    """Of each value what must be in memory for it to be read, and for it to be made once more and read."""
    for place, (node, inputs) in enumerate(zip(run, reads, strict=True)):
        read = set[Name]().union(*((behind if i in again[place] else direct).get(i, ()) for i in inputs))
        if node in cut.saved:
            read = {(node, SAVED)}
            is_made = node in in_memory and planner.decide(node).codec is not None
        else:
            is_fused = ops.is_pointwise(node) and node not in in_memory and len(read) <= _MOST_READ
            is_made = bool(inputs) and _has_memory(node) and not is_fused
        until.update(dict.fromkeys(read, place))
        direct[node] = {(node, MADE)} if is_made else read
        if node in cut.saved:
            behind[node] = read
        elif node in chains:
            behind[node] = set[Name]().union(*(behind.get(i, direct.get(i, set())) for i in inputs))
        if _stands_alone(node):
            copies[place] = [i for i in again[place] if i not in cut.saved or planner.decide(i).codec is not None]
        if is_made:
            stands.add(node)
            until[node, MADE] = place
    gone: dict[int, list[Name]] = {}
    for name, place in until.items():
        gone.setdefault(place, []).append(name)
    return BackwardRun(run, needs, stands, gone, copies)


def _chains(cut: Cut, run: list[fx.Node]) -> dict[fx.Node, bool]:
    """What is cheap to make once more for each of its readers, and whether that starts from a saved value."""
    chains: dict[fx.Node, bool] = {}
    for node in run:
        if node in cut.saved:
            chains[node] = True
        elif node in cut.recomputed and ops.is_cheap(node) and not ops.is_random(node):
            chains[node] = any(chains.get(owner(i, cut), False) for i in node.all_input_nodes)
    return chains


def _made_once_more(reader: fx.Node, inputs: list[fx.Node], needs: Needs, chains: dict[fx.Node, bool]) -> set[fx.Node]:
    if owners(needs[reader]):
        return {i for i in inputs if i in chains and not owners(needs[i])}
    return {i for i in inputs if chains.get(i)} if _stands_alone(reader) else set()


def owner(node: fx.Node, cut: Cut) -> fx.Node:
    """The operator whose memory ``node`` shows; one with several results owns them all, those that are saved aside."""
    while _is_seen_through(node, cut):
        node = node.all_input_nodes[0]
    return node


def _is_seen_through(node: fx.Node, cut: Cut) -> bool:
    return node not in cut.saved and (ops.is_view(node) or ops.is_getitem(node))


def _has_memory(node: fx.Node) -> bool:
    if node.op != "call_function" or ops.is_getitem(node):
        return False
    return not (ops.is_view(node) or ops.is_creation(node) or ops.is_symbol(node))


def _stands_alone(node: fx.Node) -> bool:
    """Whether it reads its inputs from memory, and is not computed on the way to its readers."""
    return _has_memory(node) and not (ops.is_pointwise(node) or ops.is_reduction(node))
