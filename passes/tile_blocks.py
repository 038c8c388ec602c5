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

Which operators can see a tile only is said in graph/tile_rules.py, which nodes of a block run in tiles is decided in
tile_stretches.py, tile_bodies.py writes the tiles, and tile_choices.py their calls. Sums over the batch are rounded
otherwise than at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph.batch import BatchCut, cut_batch
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.tile_choices import Choice, blocks_of, choose


@dataclass(frozen=True)
class Tiled:
    """What was done."""

    calls: int = 0
    """Of tiles, in all."""
    left: str = ""
    """Why the largest block of all runs on the whole batch; empty if it does not, or if the batch is small."""


def tile_blocks(seam: Seam, least_flops: float) -> Tiled:
    """Tile the blocks that both graphs call, and what they do between the calls.

    ``least_flops``: of the mean product of a tile (floating-point operations); below it kernels would be too small.
    """
    modules = (seam.forward, seam.backward)
    cut = cut_batch([getattr(module, name).graph for module in modules for name in blocks_of(module)], least_flops)
    chosen, left = _choose(seam, cut) if cut is not None else ([], "")
    for choice in chosen:
        choice.write()
    for module in {choice.module for choice in chosen}:
        module.graph.lint()
        module.recompile()
    return Tiled(sum(choice.calls for choice in chosen), left)


def _choose(seam: Seam, cut: BatchCut) -> tuple[list[Choice], str]:
    """What runs in tiles, and why the largest block does not.

    Where attention has dropout of its own, a tile of forward draws, and hands the same tile of backward its seed: both
    run in tiles or neither does. What would draw for tiles in forward only sees the whole batch, and all is decided
    again.
    """
    pairs, whole = seam.saved_in_order(), set[fx.Node]()
    while True:
        forward, left = choose(seam.forward, cut, set(), whole)
        drawn = {node: pairs.get(node) for choice in forward for node in choice.drawn()}
        seeds = {placeholder for placeholder in drawn.values() if placeholder is not None}
        backward, left_too = choose(seam.backward, cut, seeds, whole)
        alone = {node for node, placeholder in drawn.items() if placeholder is None or not _meet(placeholder, backward)}
        alone |= {node for choice in backward for node in choice.drawn()}
        if not alone:
            return [*forward, *backward], left or left_too
        whole |= alone


def _meet(seeds: fx.Node, backward: Sequence[Choice]) -> bool:
    """Whether all that reads ``seeds`` runs in tiles."""
    readers = set[fx.Node]().union(*(choice.readers(seeds) for choice in backward))
    return bool(readers) and readers.issuperset(seeds.users)
