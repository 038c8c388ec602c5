"""Which nodes of a block run tile by tile: decided here, written by tile_bodies.py."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.batch import Batch
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.graph.tile_states import EACH, SAME, SUM, Flow, State, States, divides
from slimfit_fx.graph.tiling import follow, is_constant
from slimfit_fx.passes.outline_repeats import owner
from slimfit_fx.passes.tile_givens import made_in_tiles
from slimfit_fx.planning.blocks import TensorSpec, is_dense

log = logging.getLogger("slimfit_fx.passes")
COND = torch.ops.higher_order.cond
WORTH = 0.9
"""Of the bytes that nodes make and hold: some of them are tiled if less is held then."""
_ALIGNMENT = 16
"""Bytes: kernels are compiled for operands that begin at a multiple."""
_BORDERS_TRIED = 16


def has_symbols(graph: fx.Graph) -> bool:
    """Whether some sizes are not plain numbers."""
    vals = [val for n in graph.nodes if isinstance(val := n.meta.get("val"), torch.Tensor)]
    return any(not isinstance(size, int) for val in vals for size in (*val.shape, *val.stride()))


@dataclass(frozen=True)
class Stretch:
    """Nodes of a block that run tile by tile, in order, and those of them that others read."""

    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    behind: frozenset[fx.Node]
    """Others that could run in tiles, and run at once behind it."""
    again: tuple[fx.Node, ...] = ()
    """Views of its results that others read, and that have no memory to be written to: they are made once more."""


class Stretches:
    """Which nodes of a block can run tile by tile.

    Nodes that need the whole batch lie between stretches: a node is on the level of the latest stretch that it depends
    on, or one above if it needs all tiles of that. What no tile reaches (weights, masks) is done before.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        batch: Batch,
        given: Set[fx.Node],
        tiles: int,
        drawn: Set[fx.Node] = frozenset(),
        *,
        draws: bool = False,
    ) -> None:
        """Follow the batch through ``body``.

        ``given``: inputs that are not of the batch. ``drawn``: those that hold a seed for each tile. ``draws``: whether
        attention may draw for a tile.
        """
        self.body, self.tiles, self.drawn = body, tiles, drawn
        self._batch, self._whole, self._draws = batch, set(given), draws
        self.level: dict[fx.Node, int] = {}
        self.inside: dict[fx.Node, States] = {}
        """What each node is of which a tile has its part."""
        self.same_as: dict[fx.Node, fx.Node] = {}
        """Nodes that are dropped: each is what it is the same as."""
        self._slices: dict[fx.Node, Mapping[fx.Node, int]] = {}
        self._gate: dict[fx.Node, fx.Node] = {}
        """Of what a branch returned, and may be a ghost: what switches it."""
        for node in body.graph.nodes:
            if node.op == "call_function":
                self._place(node)
            else:
                self.level[node] = 0
        self._make_givens()

    def best(self) -> Stretch | str:
        """The stretch that lets the block hold the least in tiles; the reason if none is worth it.

        Where nodes that need the whole batch lie between others, the block is left as it is: all that could run before
        them would wait in memory for what runs behind them. A block that draws, or reads what was drawn for tiles, runs
        in tiles for the sake of the others, whatever it holds itself.
        """
        if not self.inside:
            return "nothing in it is of the batch"
        if any(self.level[node] for node in self.inside):
            return f"{self._needs_all()} needs the whole batch"
        nodes = [n for n in self.body.graph.nodes if n in self.inside]
        lives = _lives(nodes, self.same_as.keys())
        bound = WORTH * _most_alive(lives, len(nodes), None, self.tiles)
        if self.drawn or EACH in self.inside.values():
            bound = math.inf

        def held_in_tiles(first: int, last: int) -> float:
            return _most_alive(lives, len(nodes), (first, last), self.tiles) + self._unfused(nodes[first:last])

        spans = sorted(
            (held_in_tiles(first, last), first - last, (first, last))
            for first, last in itertools.combinations(_borders(lives, len(nodes)), 2)
        )
        for held, _, (first, last) in spans:
            if held >= bound:
                break
            stretch = self._stretch(nodes[first:last], nodes[last:])
            if stretch is not None:
                return stretch
        return "it would hold no less"

    def _unfused(self, nodes: Sequence[fx.Node]) -> int:
        """Bytes of what stands in memory only because ``nodes`` read it tile by tile.

        Values that are not of the batch (which class each token has), made by pointwise work for its like: where all of
        it runs at once, a kernel makes them as it goes.
        """
        read = {value for node in nodes for value in self._slices.get(node, ())} - {*nodes}
        return sum(nbytes(v) for v in read if ops.is_pointwise(v) and all(ops.is_cheap(user) for user in v.users))

    def _needs_all(self) -> str:
        """The first operator that runs on what all tiles gave, and gives what is of the batch again."""
        later = (n for n in self.inside if self.level[n])
        read = (value for node in later for value in node.all_input_nodes)
        found = next((n for n in read if n not in self.inside and self.level[n]), None)
        while found is not None and ops.is_getitem(found):
            found = cast(fx.Node, found.args[0])
        return "an operator" if found is None else ops.op_name(found)

    def _stretch(self, nodes: Sequence[fx.Node], behind: Sequence[fx.Node]) -> Stretch | None:
        """The stretch of ``nodes``; None if it cannot be one.

        What it gives may not be put together, parts may begin at odd places, seeds of tiles be read by something else.
        """
        nodes = self._unfinished(nodes)
        inside = set(nodes)
        read_by_others = [n for n in nodes if any(u not in inside and u not in self.same_as for u in n.users)]
        again = {view for node in read_by_others if not self._can_leave(node) for view in self._views(node, inside)}
        sources = {cast(fx.Node, view.args[0]) for view in again} & inside
        leaving = ({*read_by_others} | sources) - again
        if not all(self._can_leave(node) for node in leaving):
            return None
        results = tuple(node for node in nodes if node in leaving)
        shared = Counter(owner(node) for node in results)
        if any(shared[owner(node)] > 1 for node in results if node in self._gate):
            return None  # one of them would be copied, and may be a ghost
        made = {node for node, state in self.inside.items() if state == EACH}
        if not made <= inside or any(u.op != "output" and u not in inside for n in made for u in n.users):
            return None
        if any(user not in inside for seeds in self.drawn for user in self._readers(seeds)):
            return None
        read = [(node, value) for node in nodes for value in node.all_input_nodes if value not in inside]
        if any(isinstance(state := self.inside.get(value), tuple) or state == SUM for _, value in read):
            return None
        cuts = [(value.meta["val"], self.cut(node, value)) for node, value in read if value.op != "get_attr"]
        parts = [(val, along) for val, along in cuts if along is not None and along != EACH]
        if any(_part_bytes(val, along, self.tiles) % _ALIGNMENT for val, along in parts):
            return None
        return Stretch(tuple(nodes), results, frozenset(behind), tuple(node for node in nodes if node in again))

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads it, or what is the same."""
        for user in node.users:
            yield from self._readers(user) if user in self.same_as else [user]

    def _unfinished(self, nodes: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """``nodes`` without those that work on sums of nodes before them: a tile would do so with the whole sum."""
        within: dict[fx.Node, None] = {}
        for node in nodes:
            arguments = node.all_input_nodes[:1] if ops.op_name(node) == "release" else node.all_input_nodes
            read = [n for n in arguments if n in self.inside]
            if not read or any(n in within or self.inside[n] != SUM for n in read):
                within[node] = None
        return tuple(within)

    def gate(self, node: fx.Node) -> fx.Node | None:
        """What switches the branch that gave ``node``; None if none did."""
        return self._gate.get(node)

    def cut(self, user: fx.Node, value: fx.Node) -> State:
        """Along which dimension ``user`` reads a tile's part of ``value`` from outside; None: it reads all of it."""
        found = self._slices[user].get(value)
        return self._of_outside(value) if found is None else found

    def _is_in(self, node: fx.Node, level: int) -> bool:
        return node in self.inside and self.level[node] == level

    def _can_leave(self, node: fx.Node) -> bool:
        """Of several results each leaves on its own; ghosts, and elements that share memory, cannot be written to."""
        state = self.inside[node]
        if not isinstance(state, int) or not ops.is_tensor(node):
            return False
        return state < 0 or (node not in self._gate and is_dense(TensorSpec.of(node.meta["val"])))

    def _views(self, node: fx.Node, inside: Set[fx.Node]) -> Iterator[fx.Node]:
        """``node``, and what it is a view of, up to what can leave; nothing if it is none."""
        while node in inside and ops.is_view(node) and node not in self._gate and not self._can_leave(node):
            yield node
            node = cast(fx.Node, node.args[0])

    def _of_outside(self, node: fx.Node) -> State:
        node = self.same_as.get(node, node)
        state = self.inside.get(node)
        if state is not None:
            return state if isinstance(state, int) and state >= 0 else None
        if node in self.drawn:
            return EACH
        return None if node in self._whole else self._batch.along(node.meta.get("val"))

    def _place(self, node: fx.Node) -> None:
        arguments = [n for n in node.all_input_nodes if n.op != "get_attr"]
        level = max((self.level[n] for n in arguments), default=0)

        def state_of(argument: fx.Node) -> States:
            return self.inside[argument] if self._is_in(argument, level) else self._of_outside(argument)

        if all(state_of(n) is None for n in arguments):
            self.level[node] = level
            if not ops.is_getitem(node):  # of an operator that saw the whole batch: one result may be of it
                self._whole.add(node)
            return
        if ops.op_name(node) == "hold" and (state_of(arguments[0]) is None or arguments[0] in self.drawn):
            source = arguments[0]
            self.level[node], self.same_as[node] = self.level[source], self.same_as.get(source, source)
            return
        flow = self._follow(node, state_of)
        if flow is None or not divides(node, flow, self.tiles) or (_draws(flow) and not self._draws):
            self.level[node] = level + any(self._is_in(n, level) for n in arguments)
            return
        self.level[node], self.inside[node], self._slices[node] = level, flow.result, flow.slices
        if node.target is COND:
            self._gate[node] = cast(fx.Node, node.args[0])
        elif ops.is_getitem(node) or ops.is_view(node) or ops.op_name(node) in {"release", "laid_out"}:
            if arguments[0] in self._gate:
                self._gate[node] = self._gate[arguments[0]]

    def _make_givens(self) -> None:
        """Have tiles make what only they read of what is made of inputs alone."""
        called = [n for n in self.body.graph.nodes if n.op == "call_function" and n in self._whole]
        made_of_inputs = [n for n in called if not self.level[n]]

        def demand(user: fx.Node, node: fx.Node) -> State:
            return self._slices[user].get(node) if user in self.inside else None

        for node, made in made_in_tiles(made_of_inputs, self._batch, self.tiles, demand).items():
            self._whole.discard(node)
            self.inside[node], self._slices[node] = made.along, made.slices

    def _follow(self, node: fx.Node, state_of: Callable[[fx.Node], States]) -> Flow | None:
        if node.target is not COND:
            return follow(node, state_of)
        switch, opened, _, operands = cast("tuple[fx.Node, fx.Node, fx.Node, Sequence[fx.Node]]", node.args)
        if state_of(switch) is not None:
            return None
        branch = cast(fx.GraphModule, getattr(self.body, str(opened.target))).graph
        found = follow_branch(branch, [state_of(operand) for operand in operands], self.tiles)
        if found is None:
            return None
        return Flow(found.results, {operands[place]: along for place, along in found.cuts.items()})


@dataclass(frozen=True)
class TileBranch:
    """What a branch makes of tiles of its operands."""

    results: tuple[State, ...]
    cuts: Mapping[int, int]
    """Places of whole operands of which a tile gives its part, and along which dimension."""
    states: Mapping[fx.Node, States] = field(default_factory=dict)


def follow_branch(graph: fx.Graph, given: Sequence[States], tiles: int) -> TileBranch | None:
    """None if the branch must see the whole batch, or returns what every tile would make alike."""
    inputs = graph.find_nodes(op="placeholder")
    states: dict[fx.Node, States] = dict(zip(inputs, given, strict=True))
    cuts: dict[fx.Node, int] = {}
    whole: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        arguments = node.all_input_nodes
        if all(states[n] is None for n in arguments):
            states[node] = None
            whole |= set(arguments)
            continue
        flow = follow(node, lambda n: states[n])
        if flow is None or not divides(node, flow, tiles):
            log.debug("a branch needs the whole batch: %s of %s", node.format_node(), [states[n] for n in arguments])
            return None
        if any(not _may_cut(n) or cuts.get(n, along) != along for n, along in flow.slices.items()):
            log.debug("a branch cuts what it made: %s", node.format_node())
            return None
        cuts |= flow.slices
        whole |= {n for n in arguments if states[n] is None and n not in flow.slices}
        states[node] = flow.result
    results = tuple(states[n] for n in cast("Sequence[fx.Node]", graph.output_node().args[0]))
    if whole & cuts.keys() or not all(isinstance(r, int) and r not in (SAME, EACH) for r in results):
        return None
    states |= {n: along for n, along in cuts.items() if is_constant(n)}
    places = {inputs.index(n): along for n, along in cuts.items() if not is_constant(n)}
    return TileBranch(cast("tuple[State, ...]", results), places, states)


def _may_cut(node: fx.Node) -> bool:
    """Whether a tile's branch is given a part of it, or makes that: of an operand, or a constant."""
    return node.op == "placeholder" or is_constant(node)


def _draws(flow: Flow) -> bool:
    return isinstance(flow.result, tuple) and EACH in flow.result


@dataclass(frozen=True)
class _Life:
    """A value among nodes in a row: between which places it is alive (behind the last: somebody else reads it)."""

    born: int
    dies: int
    nbytes: int
    fused: bool
    """Pointwise work that is read by its like only: it never stands in memory, unless a stretch ends between them."""


def _lives(nodes: Sequence[fx.Node], dropped: Collection[fx.Node]) -> list[_Life]:
    """The values that these nodes make; ``dropped`` are no readers."""
    position = {node: index for index, node in enumerate(nodes)}
    dies: dict[fx.Node, int] = {}
    stands: set[fx.Node] = set()
    for node in nodes:
        source = owner(node)
        if source not in position:
            continue
        users = [u for u in node.users if u not in dropped]
        readers = [u for u in users if u not in position or not (ops.is_view(u) or ops.is_getitem(u))]
        if not ops.is_cheap(source) or any(u not in position or not ops.is_cheap(u) for u in readers):
            stands.add(source)
        dies[source] = max([dies.get(source, position[node]), *(position.get(u, len(nodes)) for u in users)])
    return [_Life(position[node], end, nbytes(node), node not in stands) for node, end in dies.items()]


def _borders(lives: Sequence[_Life], count: int) -> list[int]:
    """Places among ``count`` nodes where a stretch may begin or end: where the fewest bytes cross, and both ends."""
    crossing = [0] * (count + 1)
    for life in (life for life in lives if not life.fused):
        for place in range(life.born + 1, min(life.dies, count) + 1):
            crossing[place] += life.nbytes
    lowest = [place for place in range(1, count) if crossing[place] < crossing[place - 1]]
    return sorted({0, count, *sorted(lowest, key=crossing.__getitem__)[:_BORDERS_TRIED]})


def _most_alive(lives: Sequence[_Life], count: int, span: tuple[int, int] | None, tiles: int) -> float:
    """The most bytes that are alive at once among ``count`` nodes, those of ``span`` run tile by tile."""
    change = [0.0] * (count + 2)
    first, last = span or (0, 0)
    for life in lives:
        born, dies, size = life.born, life.dies, float(life.nbytes)
        made_within = first <= born < last
        if life.fused and not (span and (born < first <= dies or born < last <= dies)):
            continue
        if made_within and dies < last:
            size /= tiles
        elif made_within:
            change[born] += size / tiles  # a part of it, before it is written where the others are
            change[last] -= size / tiles
            born = first
        elif born < first <= dies < last:
            dies = last
        change[born] += size
        change[min(dies, count) + 1] -= size
    alive, most = 0.0, 0.0
    for step in change:
        alive += step
        most = max(most, alive)
    return most


def _part_bytes(val: torch.Tensor, along: int, tiles: int) -> int:
    """From where one tile's part of a value begins to where the next one's does."""
    return int(val.stride(along) * (val.shape[along] // tiles) * val.element_size())
