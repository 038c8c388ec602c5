"""Run a block on a tile of the batch after the other: what it holds meanwhile is a fraction.

::

    block(x, w):  a = gelu(x @ w1)        tile(x_i, w):  a = gelu(x_i @ w1)
                  return a @ w2                          return a @ w2
                                          block(x, w):   y = room for all of it
                                                         for each part x_i of x: put_part(y, tile(x_i, w))
                                                         return y

The peak of a step falls within a block: with all that is saved, and with all that a block brings back for its own
backward, several times as wide as what passes from block to block. A tile brings back its part only. Gradients of
weights add up, tile by tile, behind the gates that they had. What stands between blocks (the last one, with what
follows it) becomes a block of its own if that pays.

Which operators can see a tile only is said in graph/tiling.py, which nodes of a block run in tiles is decided in
tile_stretches.py, and tile_bodies.py writes the tiles. Sums over the batch are rounded otherwise than at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.outline_repeats import INVOKE, block_of, body_of, identifier_of, replace, stretches
from slimfit_fx.passes.tile_bodies import tiled_body
from slimfit_fx.passes.tile_stretches import Batch, Stretches, batch_of, has_symbols

log = logging.getLogger("slimfit_fx.passes")
COUNTS = (16, 8, 4, 2)
"""Into how many tiles a batch may be cut; the most of them whose tiles have rows enough."""
FEWEST_ROWS = {"cpu": 4096, "gpu": 16384}
"""Examples times tokens of a tile: with fewer, products no longer fill the device, or starting kernels takes longer
than running them."""


@dataclass(frozen=True)
class Tiled:
    """What was done."""

    calls: int = 0
    """Of tiles, in all."""
    left: str = ""
    """Why the largest block of all runs on the whole batch; empty if it does not, or if the batch is small."""


def tile_blocks(module: fx.GraphModule, fewest_rows: int) -> Tiled:
    """Tile the blocks that ``module`` calls, and what it does between the calls.

    ``fewest_rows``: of the widest products of a tile (examples times tokens); below it kernels would be too small.
    """
    blocks, count, left = _blocks(module), 0, ""
    batch = batch_of([getattr(module, name).graph for name in blocks])
    tiles = _count(batch, fewest_rows) if batch is not None else 0
    if batch is None or not tiles:
        return Tiled()
    largest = max(blocks, key=lambda name: len(getattr(module, name).graph.nodes))
    for name, callers in blocks.items():
        body = getattr(module, name)
        tiled = _tiled(body, batch, _given(body, callers[0].args[2:]), tiles)
        if isinstance(tiled, str):
            left = tiled if name == largest else left
            continue
        setattr(module, name, tiled)
        for call in callers:
            call.args = (call.args[0], identifier_of(name, tiled.graph), *call.args[2:])
        count += tiles * len(callers)
    for number, window in enumerate(_between_calls(module.graph)):
        block = block_of(module.graph, [window])
        if isinstance(block, str):
            log.debug("%d nodes between calls of blocks stay as they are: %s", len(window), block)
            continue
        body = body_of(module, block)
        tiled = _tiled(body, batch, _given(body, [operand[0] for operand in block.inputs]), tiles)
        if not isinstance(tiled, str):
            replace(module, block, tiled, f"rest_{number}")
            count += tiles
    if count:
        module.graph.lint()
        module.recompile()
    return Tiled(count, left)


def _count(batch: Batch, fewest_rows: int) -> int:
    """Into how many tiles the batch is cut; 0 if they would be too small."""
    fit = (n for n in COUNTS if batch.examples % n == 0 and batch.rows // n >= fewest_rows)
    return next(fit, 0)


def _between_calls(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """Nodes in order, without calls of blocks and the results that are picked from these."""
    windows = [tuple(n for n in nodes if not _is_picked(n)) for nodes in stretches(graph)]
    return [window for window in windows if window]


def _is_picked(node: fx.Node) -> bool:
    return ops.is_getitem(node) and cast(fx.Node, node.args[0]).target is INVOKE


def _given(body: fx.GraphModule, operands: Sequence[Any]) -> set[fx.Node]:
    """The inputs of ``body`` that stand for parameters and the like."""
    inputs = body.graph.find_nodes(op="placeholder")
    return {node for node, operand in zip(inputs, operands, strict=True) if _is_given(operand)}


def _blocks(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls of each block, by its name."""
    found: dict[str, list[fx.Node]] = {}
    for call in module.graph.find_nodes(op="call_function", target=INVOKE):
        found.setdefault(str(cast(fx.Node, call.args[0]).target), []).append(call)
    return found


def _is_given(node: fx.Node) -> bool:
    """Whether it is an input of the joint graph as it is (a parameter, a mask), or a view or a cast of one."""
    while node.op == "call_function" and (ops.is_view(node) or ops.op_name(node) in {"convert_element_type"}):
        node = cast(fx.Node, node.args[0])
    return node.op == "placeholder" and str(node.target).startswith("primals")


def _tiled(body: fx.GraphModule, batch: Batch, given: Set[fx.Node], tiles: int) -> fx.GraphModule | str:
    """``body`` in tiles, or the reason why it is left. ``given``: operands that are not of the batch."""
    if has_symbols(body.graph):
        return "sizes are symbolic"
    if body.graph.find_nodes(op="call_function", target=INVOKE):
        return "it runs in tiles already"
    found = Stretches(body, batch, given, tiles)
    chosen = found.best()
    if isinstance(chosen, str):
        log.debug("a block of %d nodes is not tiled: %s", len(body.graph.nodes), chosen)
        return chosen
    return tiled_body(body, found, chosen)
