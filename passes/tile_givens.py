"""What is made of inputs alone and is as large as the batch: a tile makes its part, instead of reading it.

::

    hit = labels == classes        (32, 50257)            tile(x_i, labels_i, classes):
    tile(x_i, part i of hit)                        ->        hit_i = labels_i == classes      (4, 50257)

Where a block runs at once, a kernel makes such values (which class each token has) as it goes, and they never are in
memory. For tiles to read their parts of them they would have to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.batch import Batch
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.graph.tile_states import Flow, State, divides
from slimfit_fx.graph.tiling import follow

_OURS = "slimfit_fx::"


@dataclass(frozen=True)
class MadeInTiles:
    """A node of which a tile makes its part, along dimension ``along``."""

    along: int
    slices: Mapping[fx.Node, int]
    """Of what it reads: the dimension along which a tile's part is cut, where a tile does not make that, too."""


def made_in_tiles(
    nodes: Sequence[fx.Node], batch: Batch, tiles: int, demand: Callable[[fx.Node, fx.Node], State]
) -> dict[fx.Node, MadeInTiles]:
    """Those of ``nodes``, all made of inputs alone, that only tiles read, part by part.

    ``demand(user, node)``: the dimension along which ``user``, which runs in tiles, reads its part of ``node``; None if
    it reads all of it, or does not run in tiles.
    """
    could = _could_be_made(nodes, batch, tiles)
    found: dict[fx.Node, MadeInTiles] = {}
    for node, made in reversed(could.items()):
        if all(user in found or demand(user, node) == made.along for user in node.users):
            found[node] = made
    return found


def _could_be_made(nodes: Sequence[fx.Node], batch: Batch, tiles: int) -> dict[fx.Node, MadeInTiles]:
    """Nodes that are larger than what they are made of, and what is made of those, if a tile could make its part.

    What they begin with is cut along its first dimension if that is the batch. The rules of operators hold for any cut,
    so that a wrong guess leaves a node as it is.
    """
    could: dict[fx.Node, MadeInTiles] = {}

    def state_of(value: fx.Node) -> State:
        return could[value].along if value in could else _guessed(value, batch)

    for node in nodes:
        arguments = [value for value in node.all_input_nodes if value.op != "get_attr"]
        if not ops.is_tensor(node) or not ops.is_cheap(node) or _is_ours(node):
            continue
        if not (_grows(node) or any(value in could for value in arguments)):
            continue
        if all(state_of(value) is None for value in arguments):
            continue
        flow = follow(node, state_of)
        if flow is None or not isinstance(flow.result, int) or flow.result < 0:
            continue
        states = {value: state_of(value) for value in arguments}
        slices = {**{value: along for value, along in states.items() if along is not None}, **flow.slices}
        if divides(node, Flow(flow.result, slices), tiles):
            could[node] = MadeInTiles(flow.result, slices)
    return could


def _guessed(value: fx.Node, batch: Batch) -> State:
    sizes = value.meta["val"].shape if ops.is_tensor(value) else ()
    return 0 if sizes and sizes[0] in (batch.examples, batch.rows) else None


def _grows(node: fx.Node) -> bool:
    """Whether its elements are more bytes than those that it is made of; constants are none."""
    sources = {ops.view_base(value) for value in node.all_input_nodes}
    return nbytes(node) > sum(nbytes(source) for source in sources if not ops.is_creation(source))


def _is_ours(node: fx.Node) -> bool:
    return str(getattr(node.target, "_schema", "")).startswith(_OURS)
