"""Repeated blocks of the forward, and what they give to each other.

That is saved, so that no chain of recompute runs through several blocks.

Where a block begins is nobody's choice but ours: the same number of bytes passes on in many places, say before a norm
and behind it. The place is taken from which the least must run again. Behind a block that ends in a norm the normalised
value is saved, which the norm's own backward reads too, so the product before that norm need not run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.graph.repeats import Window, crossing, cuts, find_run
from slimfit_fx.planning.roofline import node_flops

_FEWEST_REPEATED = 16
"""Nodes that must come again for a stretch of the forward to count as a repeated block."""
_PLACES_TRIED = 24
_MORE_BYTES = 1.25
"""How many times the fewest bytes may pass on where less must run again."""


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks, in order; none if nothing repeats."""

    windows: tuple[Window, ...] = ()
    borders: frozenset[fx.Node] = frozenset()
    """The values that pass from one block to the next."""


def find_blocks(graph: fx.Graph, forward: set[fx.Node], read_by_backward: set[fx.Node]) -> Blocks:
    """Where the forward repeats itself.

    ``forward``: what the forward runs; ``read_by_backward``: those of its values that some gradient needs.
    """
    nodes = [n for n in graph.nodes if n in forward and n.op == "call_function"]
    nodes = [n for n in nodes if ops.op_name(n) != "inductor_lookup_seed"]
    run = find_run(nodes, fewest_saved=_FEWEST_REPEATED)
    if run is None:
        return Blocks()
    places = list(_places(nodes, itertools.islice(cuts(nodes, run), _PLACES_TRIED)))
    if not places:
        return Blocks()
    fewest = min(size for size, _, _ in places)
    near = [(windows, borders) for size, windows, borders in places if size <= _MORE_BYTES * fewest]
    windows, borders = min(near, key=lambda place: _runs_again(place[0], place[1], read_by_backward))
    return Blocks(tuple(windows), frozenset(borders))


def _places(
    nodes: Sequence[fx.Node], found: Iterator[list[Window]]
) -> Iterator[tuple[float, list[Window], set[fx.Node]]]:
    """(bytes that pass a border, windows, borders) of each way to cut the forward into blocks."""
    for windows in found:
        passed = {n for n in crossing(nodes, windows) if ops.is_tensor(n) and not ops.is_creation(n)}
        borders = {_before_pointwise(n) for n in passed}
        yield sum(map(nbytes, borders)) / (len(windows) + 1), windows, borders


def _before_pointwise(node: fx.Node) -> fx.Node:
    """The value that ``node`` is a pointwise function of, views and parameters aside; itself if of more than one."""
    while True:
        node = ops.view_base(node)
        inputs = [i for i in node.all_input_nodes if ops.is_tensor(i) and ops.view_base(i).op != "placeholder"]
        if not ops.is_pointwise(node) or len(inputs) != 1 or nbytes(inputs[0]) != nbytes(node):
            return node
        node = inputs[0]


def _runs_again(windows: Sequence[Window], borders: set[fx.Node], read_by_backward: set[fx.Node]) -> float:
    """Operations of products in one block on which something depends that backward reads, borders aside.

    What is as small as one number per row is taken to be saved.
    """
    block = set(windows[len(windows) // 2])
    largest = max((nbytes(n) for n in block), default=0)
    stack = [n for n in block & read_by_backward if n not in borders and nbytes(n) * 64 > largest]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen and node in block and node not in borders:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return sum(map(node_flops, seen))
