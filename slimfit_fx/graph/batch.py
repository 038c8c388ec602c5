"""The batch as graphs have it: its sizes, and into how many tiles it may be cut (passes/tile_blocks.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slimfit_fx.graph import ops

COUNTS = (16, 8, 4, 2)
"""Into how many tiles a batch may be cut; the most of them that leave each enough to do."""
LEAST_FLOPS = {"cpu": 9e9, "gpu": 18e9}
"""Floating-point operations of the mean product of a tile: with fewer, products no longer fill the device, or starting
kernels takes longer than running them. Of BERT-base's products 8,192 rows (examples times tokens) have 19e9."""


@dataclass(frozen=True)
class Batch:
    """The sizes by which a value of the whole batch is known."""

    examples: int
    rows: int
    """Examples times tokens."""

    def along(self, val: Any) -> int | None:
        """The dimension along which a value from outside may be cut; None: it is not of the batch, or unclear."""
        if not isinstance(val, torch.Tensor) or val.dim() < 2:
            return None
        return 0 if val.shape[0] == self.examples or (val.dim() == 2 and val.shape[0] == self.rows) else None


@dataclass(frozen=True)
class BatchCut:
    """The batch, and into how many tiles it is cut."""

    batch: Batch
    tiles: int

    def share(self, val: Any) -> float:
        """How much of a value of a block there is at a time: one tile's, or all of what is not of the batch."""
        sizes = tuple(val.shape) if isinstance(val, torch.Tensor) else ()
        of_batch = sizes[:1] == (self.batch.examples,) or self.batch.rows in sizes[:2]
        return 1 / self.tiles if of_batch else 1.0


def cut_batch(graphs: Sequence[fx.Graph], least_flops: float) -> BatchCut | None:
    """Into how many tiles the batch is cut; None if they would be too small, or if no batch is found."""
    batch = batch_of(graphs)
    if batch is None:
        return None
    flops = [2.0 * m * k * n for graph in graphs for m, k, n in products(graph) if batch.rows in (m, k)]
    mean = sum(flops) / max(len(flops), 1)
    tiles = next((n for n in COUNTS if batch.examples % n == 0 and mean / n >= least_flops), 0)
    return BatchCut(batch, tiles) if tiles else None


def batch_of(graphs: Sequence[fx.Graph]) -> Batch | None:
    """Read off the largest operand of three dimensions, (examples, tokens, width), or else value; None if none has.

    Scores have three as well, (examples times heads, tokens, tokens): what has as many rows as most products comes
    first.
    """
    rows = Counter(m for graph in graphs for m, _, _ in products(graph))
    for op in ("placeholder", "call_function"):
        found = [n.meta["val"] for graph in graphs for n in graph.nodes if n.op == op and ops.is_tensor(n)]
        wide = [v for v in found if v.dim() == 3 and all(isinstance(size, int) for size in v.shape)]
        if wide:
            largest = max(wide, key=lambda v: (rows[v.shape[0] * v.shape[1]], v.numel() * v.element_size()))
            return Batch(largest.shape[0], largest.shape[0] * largest.shape[1])
    return None


def products(graph: fx.Graph) -> Iterator[tuple[int, int, int]]:
    """(m, k, n) of each product of two matrices, (m, k) and (k, n); those of symbolic sizes are left out."""
    for node in graph.nodes:
        if ops.op_name(node) in {"mm", "addmm"}:
            left, right = (factor.meta["val"].shape for factor in node.args[-2:])
            if all(isinstance(size, int) for size in (*left, *right)):
                yield left[0], left[1], right[1]
