"""Which blocks of a graph run tile by tile, and their calls written anew.

A block that the graph calls, or what it does between two calls, which becomes a block of its own then. Which nodes of
it run in tiles is decided in tile_stretches.py; tile_bodies.py writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.batch import BatchCut
from slimfit_fx.graph.tile_states import EACH
from slimfit_fx.passes.outline_repeats import INVOKE, Block, block_of, body_of, identifier_of, replace, stretches
from slimfit_fx.passes.tile_bodies import tiled_body
from slimfit_fx.passes.tile_stretches import Stretch, Stretches, has_symbols

log = logging.getLogger("slimfit_fx.passes")


@dataclass(frozen=True)
class Choice:
    """A block that runs in tiles."""

    module: fx.GraphModule
    found: Stretches
    stretch: Stretch

    @property
    def calls(self) -> int:
        """Of tiles, in all."""
        raise NotImplementedError

    def write(self) -> None:
        """Put the tiles where the block is."""
        raise NotImplementedError

    def drawn(self) -> Iterator[fx.Node]:
        """Nodes of the graph that give one seed for each tile then."""
        outputs = _outputs(self.found.body)
        for place, node in enumerate(outputs):
            if node in self.stretch.results and self.found.inside[node] == EACH:
                yield from self._results(place)

    def readers(self, seeds: fx.Node) -> set[fx.Node]:
        """Nodes of the graph that are in the block, and read ``seeds`` tile by tile."""
        raise NotImplementedError

    def _results(self, place: int) -> Iterator[fx.Node]:
        raise NotImplementedError


@dataclass(frozen=True)
class Called(Choice):
    """A block that is there already."""

    name: str
    callers: Sequence[fx.Node]

    @property
    def calls(self) -> int:  # noqa: D102
        return self.found.tiles * len(self.callers)

    def write(self) -> None:  # noqa: D102
        tiled = tiled_body(self.found.body, self.found, self.stretch)
        setattr(self.module, self.name, tiled)
        vals = tuple(node.meta["val"] for node in _outputs(tiled))
        for call in self.callers:
            call.args = (call.args[0], identifier_of(self.name, tiled.graph), *call.args[2:])
            call.meta["val"] = vals
            _tell(call.args[2:], tiled)
        for place in range(len(vals)):
            for node in self._results(place):
                _set(node, vals[place])

    def readers(self, seeds: fx.Node) -> set[fx.Node]:  # noqa: D102
        inputs = self.found.body.graph.find_nodes(op="placeholder")
        places = [[inputs[j] for j, operand in enumerate(c.args[2:]) if operand is seeds] for c in self.callers]
        return {c for c, read in zip(self.callers, places, strict=True) if read and self.found.drawn >= {*read}}

    def _results(self, place: int) -> Iterator[fx.Node]:
        return (user for call in self.callers for user in call.users if user.args[1] == place)


@dataclass(frozen=True)
class Between(Choice):
    """What stands between two calls."""

    name: str
    block: Block

    @property
    def calls(self) -> int:  # noqa: D102
        return self.found.tiles

    def write(self) -> None:  # noqa: D102
        (window,) = self.block.windows
        block = block_of(self.module.graph, [window])  # what it reads may come out of another block by now
        assert isinstance(block, Block)
        tiled = tiled_body(self.found.body, self.found, self.stretch)
        _tell([operand[0] for operand in block.inputs], tiled)
        for place, node in zip(block.results, _outputs(tiled), strict=True):
            _set(window[place], node.meta["val"])
        replace(self.module, block, tiled, self.name)

    def readers(self, seeds: fx.Node) -> set[fx.Node]:  # noqa: D102
        inputs = self.found.body.graph.find_nodes(op="placeholder")
        places = [inputs[j] for j, (operand,) in enumerate(self.block.inputs) if operand is seeds]
        return set(self.block.windows[0]) if self.found.drawn >= {*places} else set()

    def _results(self, place: int) -> Iterator[fx.Node]:
        yield self.block.windows[0][self.block.results[place]]


def choose(module: fx.GraphModule, cut: BatchCut, drawn: Set[fx.Node], whole: Set[fx.Node]) -> tuple[list[Choice], str]:
    """What of ``module`` runs in tiles; and why the largest block does not, empty if it does.

    ``drawn``: inputs that hold a seed for each tile. ``whole``: nodes that must not become such.
    """
    made, left = [], ""  # type: list[Choice], str
    blocks = blocks_of(module)
    largest = max(blocks, key=lambda name: len(getattr(module, name).graph.nodes), default="")
    for name, callers in blocks.items():
        body = getattr(module, name)
        operands = list(zip(*(call.args[2:] for call in callers), strict=True))
        results = [user for call in callers for user in call.users]
        found = _tiled(body, cut, operands, drawn, draws=whole.isdisjoint(results))
        if isinstance(found, str):
            left = found if name == largest else left
        else:
            made.append(Called(module, *found, name, callers))
    for number, window in enumerate(_between_calls(module.graph)):
        block = block_of(module.graph, [window])
        if isinstance(block, str):
            log.debug("%d nodes between calls of blocks stay as they are: %s", len(window), block)
            continue
        found = _tiled(body_of(module, block), cut, block.inputs, drawn, draws=whole.isdisjoint(window))
        if not isinstance(found, str):
            made.append(Between(module, *found, f"rest_{number}", block))
    return made, left


def blocks_of(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls of each block, by its name."""
    found: dict[str, list[fx.Node]] = {}
    for call in module.graph.find_nodes(op="call_function", target=INVOKE):
        found.setdefault(str(cast(fx.Node, call.args[0]).target), []).append(call)
    return found


def _between_calls(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """Nodes in order, without calls of blocks and the results that are picked from these."""
    windows = [tuple(n for n in nodes if not _is_picked(n)) for nodes in stretches(graph)]
    return [window for window in windows if window]


def _is_picked(node: fx.Node) -> bool:
    return ops.is_getitem(node) and cast(fx.Node, node.args[0]).target is INVOKE


def _tiled(
    body: fx.GraphModule, cut: BatchCut, operands: Sequence[Sequence[Any]], drawn: Set[fx.Node], *, draws: bool
) -> tuple[Stretches, Stretch] | str:
    """What of ``body`` runs in tiles, or the reason why nothing does. ``operands``: each in every call."""
    if has_symbols(body.graph):
        return "sizes are symbolic"
    if body.graph.find_nodes(op="call_function", target=INVOKE):
        return "it runs in tiles already"
    inputs = list(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    given = {node for node, operand in inputs if _is_given(operand[0])}
    seeds = {node for node, operand in inputs if drawn >= {*operand}}
    found = Stretches(body, cut.batch, given, cut.tiles, seeds, draws=draws)
    stretch = found.best()
    if isinstance(stretch, str):
        log.debug("a block of %d nodes is not tiled: %s", len(body.graph.nodes), stretch)
        return stretch
    return found, stretch


def _is_given(node: fx.Node) -> bool:
    """Whether it is an input of the joint graph as it is (a parameter, a mask), or a view or a cast of one."""
    while node.op == "call_function" and (ops.is_view(node) or ops.op_name(node) in {"convert_element_type"}):
        node = cast(fx.Node, node.args[0])
    return node.op == "placeholder" and str(node.target).startswith("primals")


def _outputs(body: fx.GraphModule) -> Sequence[fx.Node]:
    return cast("Sequence[fx.Node]", body.graph.output_node().args[0])


def _tell(operands: Sequence[Any], tiled: fx.GraphModule) -> None:
    """Say of operands what a block takes now."""
    for operand, node in zip(operands, tiled.graph.find_nodes(op="placeholder"), strict=True):
        _set(operand, node.meta["val"])


def _set(node: fx.Node, val: Any) -> None:
    """Say that ``node`` is ``val``, if that is another shape than it had."""
    if isinstance(val, torch.Tensor) and val.shape != node.meta["val"].shape:
        node.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"} | {"val": val}
