"""How a value stands when only a part of the batch is there, and what an operator makes of it. Data only.

A value is *tiled* along a dimension if a tile of the batch holds a contiguous part of it there::

    x (32, 128, 768) tiled along 0  ->  view (4096, 768): along 0  ->  permute (768, 4096): along 1
    mm(x (4096, 768) along 0, w (768, 3072) whole): along 0        mm(g.t() along 1, x along 0): a sum over tiles
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

SUM = -1
"""What the tiles give must be added up."""
SAME = -2
"""Every tile gives the same (the seeds of attention without dropout), or what nobody reads."""
EACH = -3
"""Every tile has one of its own (the seeds with which attention drew); those of all tiles stand one beside the other
in a new first dimension."""
State = int | None
"""The dimension along which a value is tiled, ``SUM``, ``SAME``, ``EACH``, or None: the whole value, which every tile
has."""
States = State | tuple[State, ...]
"""Of an operator with several results: one each."""


@dataclass(frozen=True)
class Flow:
    """What comes out of an operator."""

    result: States
    slices: Mapping[fx.Node, int] = field(default_factory=dict)
    """Whole values of which a tile reads its part only, and along which dimension."""


def divides(node: fx.Node, flow: Flow, tiles: int) -> bool:
    """Whether all that is cut can be cut into tiles of one size."""
    vals = node.meta["val"] if isinstance(flow.result, tuple) else (node.meta["val"],)
    states = flow.result if isinstance(flow.result, tuple) else (flow.result,)
    results = [(v, s) for v, s in zip(vals, states, strict=True) if s is not None and s >= 0]
    cut = [(n.meta["val"], along) for n, along in flow.slices.items()]
    return all(v.shape[along] % tiles == 0 for v, along in results + cut)


StateOf = Callable[[fx.Node], States]
Rule = Callable[[fx.Node, StateOf], Flow | None]
