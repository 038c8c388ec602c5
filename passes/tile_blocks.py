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


def tile_blocks(module: fx.GraphModule, fewest_rows: int) -> int:
    """Tile the blocks that ``module`` calls, and what it does between the calls. Returns how many calls of tiles.

    ``fewest_rows``: of the widest products of a tile (examples times tokens); below it kernels would be too small.
    """
    blocks, count = _blocks(module), 0
    batch = batch_of([getattr(module, name).graph for name in blocks])
    if batch is None:
        return 0
    for name, callers in blocks.items():
        body = getattr(module, name)
        tiled, calls = _tiled(body, batch, _given(body, callers[0].args[2:]), fewest_rows)
        if tiled is None:
            continue
        setattr(module, name, tiled)
        for call in callers:
            call.args = (call.args[0], identifier_of(name, tiled.graph), *call.args[2:])
        count += calls * len(callers)
    for number, window in enumerate(_between_calls(module.graph)):
        block = block_of(module.graph, [window])
        if isinstance(block, str):
            log.debug("%d nodes between calls of blocks stay as they are: %s", len(window), block)
            continue
        body = body_of(module, block)
        tiled, calls = _tiled(body, batch, _given(body, [operand[0] for operand in block.inputs]), fewest_rows)
        if tiled is not None:
            replace(module, block, tiled, f"rest_{number}")
            count += calls
    if count:
        module.graph.lint()
        module.recompile()
    return count


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


def _tiled(
    body: fx.GraphModule, batch: Batch, given: Set[fx.Node], fewest_rows: int
) -> tuple[fx.GraphModule | None, int]:
    """``body`` in tiles, and how many calls of them it makes; None if that gains nothing.

    ``given``: operands that are not of the batch, whatever their sizes.
    """
    if has_symbols(body.graph) or body.graph.find_nodes(op="call_function", target=INVOKE):
        return None, 0
    for count in COUNTS:
        if batch.examples % count or batch.rows // count < fewest_rows:
            continue
        found = Stretches(body, batch, given, count)
        chosen = found.best()
        if chosen is None:
            log.debug("a block of %d nodes is not tiled: no stretch would hold less", len(body.graph.nodes))
            return None, 0
        return tiled_body(body, found, chosen), count
    return None, 0
