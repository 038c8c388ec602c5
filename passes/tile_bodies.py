"""Write a block anew, with calls of tiles in place of a stretch of its nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode

import slimfit_fx.runtime.parts  # noqa: F401  (registers the operator)
from slimfit_fx.graph.canonical import graph_text, value_text
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.graph.retrace import survives_pickling
from slimfit_fx.graph.tile_states import EACH, SUM, State, States
from slimfit_fx.graph.tiling import is_constant, tile_arguments
from slimfit_fx.passes.insert_gates import RELEASE
from slimfit_fx.passes.outline_repeats import INVOKE, identifier_of, owner
from slimfit_fx.passes.tile_stretches import COND, Stretch, Stretches, follow_branch

GHOST = torch.ops.slimfit_fx.ghost.default
PUT_PART = torch.ops.slimfit_fx.put_part.default
ADD_PART = torch.ops.slimfit_fx.add_part.default
ADDED_AT_ONCE = 1 << 20
"""Bytes: sums over tiles of no more are added up in one kernel behind the last tile."""


def tiled_body(body: fx.GraphModule, found: Stretches, stretch: Stretch) -> fx.GraphModule:
    """``body`` with calls of tiles in place of ``stretch``: the same operands, the same results."""
    return _Builder(body, found, stretch).build()


class _Builder:
    """Writes a block anew."""

    def __init__(self, body: fx.GraphModule, found: Stretches, stretch: Stretch) -> None:
        self._old, self._found, self._stretch = body, found, stretch
        self._graph = fx.Graph()
        self._modules: dict[str, torch.nn.Module] = {}
        self._env: dict[fx.Node, fx.Node] = {}
        self._fake: Any = detect_fake_mode([n.meta.get("val") for n in body.graph.nodes])
        self._debug = _has_debug_ghosts(body)

    def build(self) -> fx.GraphModule:
        """The block in tiles: the same operands, the same results."""
        for node in self._old.graph.find_nodes(op="placeholder"):
            self._env[node] = self._graph.node_copy(node)
            if node in self._found.drawn:
                self._env[node].meta = {"val": self._one_for_each(node.meta["val"])}
        tiled = set(self._stretch.nodes)
        behind = [n for n in self._old.graph.nodes if n in self._stretch.behind or self._found.level[n]]
        for node in self._old.graph.nodes:
            if node.op == "call_function" and node not in tiled and node not in behind:
                self._copy(node)
        self._call(self._stretch)
        for node in self._stretch.again:
            self._copy(node)
        for node in behind:
            self._copy(node)
        results = cast("Sequence[fx.Node]", self._old.graph.output_node().args[0])
        self._graph.output(tuple(self._env[node] for node in results))
        made = fx.GraphModule(self._modules, self._graph)
        survives_pickling(made)
        return made

    def _copy(self, node: fx.Node) -> None:
        source = self._found.same_as.get(node)
        self._env[node] = self._env[source] if source is not None else self._graph.node_copy(node, self._outside)

    def _outside(self, node: fx.Node) -> fx.Node:
        if node.op != "get_attr":
            return self._env[node]
        self._modules[str(node.target)] = getattr(self._old, str(node.target))
        return self._graph.get_attr(str(node.target))

    def _call(self, stretch: Stretch) -> None:
        """Call the tile of ``stretch`` for each part of the batch, and take what it gives."""
        tile = _Tile(self._old, self._found, stretch, self._fake)
        name = "tile_0"
        self._modules[name] = tile.module
        identifier = identifier_of(name, tile.module.graph)
        for result in stretch.results:
            state, val = cast(int, self._found.inside[result]), result.meta["val"]
            if state >= 0 or state == EACH:
                self._env[result] = self._room(self._one_for_each(val) if state == EACH else val)
        for number in range(self._found.tiles):
            operands = [self._part(self._env[value], along, number) for value, along in tile.inputs]
            body = self._graph.get_attr(name)
            call = self._graph.call_function(INVOKE, (body, identifier, *operands))
            call.meta = {"val": tile.vals}
            for place, result in enumerate(stretch.results):
                made = self._op(operator.getitem, (call, place), tile.vals[place])
                self._take(result, made, number)

    def _one_for_each(self, val: torch.Tensor) -> torch.Tensor:
        """What each of the tiles has one of like ``val``, one beside the other."""
        with self._fake:
            return torch.empty((self._found.tiles, *val.shape), dtype=val.dtype, device=val.device)

    def _room(self, val: torch.Tensor) -> fx.Node:
        """Memory for the parts of a value like ``val``, in its layout."""
        node = self._graph.call_function(torch.ops.aten.empty_strided.default, (list(val.shape), list(val.stride())))
        node.kwargs = {"dtype": val.dtype, "device": val.device}
        node.meta = {"val": val}
        return node

    def _take(self, result: fx.Node, made: fx.Node, number: int) -> None:
        """Add what tile ``number`` gave to ``result``, or write it where it belongs."""
        state = cast(int, self._found.inside[result])
        if state == EACH:
            state, made = 0, self._op(torch.ops.aten.unsqueeze.default, (made, 0))
        if state >= 0:
            start = number * made.meta["val"].shape[state]
            put = self._graph.call_function(PUT_PART, (self._env[result], made, state, start))
            put.meta = {"val": None}
        elif state == SUM and number and self._found.gate(result) is None and nbytes(made) > ADDED_AT_ONCE:
            add = self._graph.call_function(ADD_PART, (self._env[result], made))
            add.meta = {"val": None}
        elif state == SUM and number:
            self._env[result] = self._added(result, self._env[result], made)
        elif not number:
            self._env[result] = made

    def _part(self, value: fx.Node, along: State, number: int) -> fx.Node:
        if along is None:
            return value
        if along == EACH:
            return self._op(torch.ops.aten.select.int, (value, 0, number))
        size = value.meta["val"].shape[along] // self._found.tiles
        return self._op(torch.ops.aten.slice.Tensor, (value, along, number * size, (number + 1) * size))

    def _added(self, result: fx.Node, earlier: fx.Node, made: fx.Node) -> fx.Node:
        """The sum so far with what one more tile adds to it; what a closed branch gave stays a ghost."""
        add = torch.ops.aten.add.Tensor
        switch = self._found.gate(result)
        if switch is None:
            return self._op(add, (earlier, made))
        val = made.meta["val"]
        names = [self._branch(side, val) for side in ("open", "closed")]
        branches = [self._graph.get_attr(name) for name in names]
        call = self._graph.call_function(COND, (self._env[switch], *branches, (earlier, made)))
        call.meta = {"val": (val,)}
        return self._op(RELEASE, (self._op(operator.getitem, (call, 0), val), [earlier, made]))

    def _branch(self, side: str, val: torch.Tensor) -> str:
        """The name of the module that adds two tensors like ``val``, or gives a ghost."""
        graph = fx.Graph()
        inputs = [graph.placeholder(name) for name in ("so_far", "more")]
        for node in inputs:
            node.meta = {"val": val}
        made = (
            graph.call_function(torch.ops.aten.add.Tensor, tuple(inputs))
            if side == "open"
            else _ghost(graph, val, self._debug)
        )
        made.meta = {"val": val}
        graph.output((made,))
        return _named(self._modules, "cone_sum", side, graph)

    def _op(self, target: Any, args: tuple[Any, ...], val: Any = None) -> fx.Node:
        node = self._graph.call_function(target, args)
        node.meta["val"] = _evaluate(self._fake, node) if val is None else val
        return node


class _Tile:
    """What a stretch does on one tile."""

    def __init__(self, body: fx.GraphModule, found: Stretches, stretch: Stretch, fake: Any) -> None:
        self._body, self._found, self._fake = body, found, fake
        self.inputs: dict[tuple[fx.Node, State], fx.Node] = {}
        """(value from outside, the dimension along which it is cut) -> its operand, in order."""
        self._made: dict[tuple[fx.Node, State], fx.Node] = {}
        """The same of constants, of which each tile makes its part."""
        self._graph, self._modules, self._env = fx.Graph(), {}, {}  # type: fx.Graph, dict[str, Any], dict[Any, Any]
        self._inside = set(stretch.nodes)
        read = dict.fromkeys(self._read(stretch))
        for value, along in sorted(read, key=lambda key: is_constant(key[0]) and key[1] is not None):
            self._operand(value, along)
        for node in stretch.nodes:
            self._env[node] = self._copy(node)
        results = self._own([self._env[node] for node in stretch.results])
        self._graph.output(tuple(results))
        self.vals = tuple(node.meta["val"] for node in results)
        self._check(stretch)
        self.module = fx.GraphModule(self._modules, self._graph)
        survives_pickling(self.module)

    def _source(self, value: fx.Node) -> fx.Node:
        return self._found.same_as.get(value, value)

    def _read(self, stretch: Stretch) -> Iterator[tuple[fx.Node, State]]:
        """What is read from outside."""
        for node in stretch.nodes:
            for value in node.all_input_nodes:
                if value not in self._inside and value.op != "get_attr":
                    yield self._source(value), self._found.cut(node, value)

    def _operand(self, value: fx.Node, along: State) -> None:
        val = value.meta["val"]
        if along is not None and along != EACH:
            with self._fake:
                val = val.narrow(along, 0, val.shape[along] // self._found.tiles)
        if along is not None and is_constant(value):
            made = self._graph.call_function(value.target, (list(val.shape), *value.args[1:]), dict(value.kwargs))  # type: ignore[arg-type]
            self._made[value, along] = made
        else:
            made = self._graph.placeholder(f"operand_{len(self.inputs)}")
            self.inputs[value, along] = made
        made.meta = {"val": val}

    def _copy(self, node: fx.Node) -> fx.Node:
        def here(value: fx.Node) -> fx.Node:
            if value in self._inside:
                return cast(fx.Node, self._env[value])
            key = self._source(value), self._found.cut(node, value)
            return self._made.get(key) or self.inputs[key]

        if node.target is COND:
            return self._copy_branches(node, here)
        state, tiles = self._found.inside[node], self._found.tiles
        args = fx.map_arg(tile_arguments(node, state, tiles), here)
        made = self._graph.call_function(node.target, args, fx.map_arg(dict(node.kwargs), here))  # type: ignore[arg-type]
        made.meta = {"val": _evaluate(self._fake, made)}
        if "eager_input_vals" in node.meta:
            made.meta["eager_input_vals"] = (fx.map_arg(made.args, lambda n: n.meta["val"]), {})
        return made

    def _copy_branches(self, node: fx.Node, here: Callable[[fx.Node], fx.Node]) -> fx.Node:
        switch, opened, _, operands = cast("tuple[fx.Node, fx.Node, fx.Node, Sequence[fx.Node]]", node.args)
        inputs = [here(operand) for operand in operands]
        branch = _tile_branch(
            cast(fx.GraphModule, getattr(self._body, str(opened.target))).graph,
            [self._state_for(node, operand) for operand in operands],
            [n.meta["val"] for n in inputs],
            self._found.tiles,
            self._fake,
        )
        vals = tuple(n.meta["val"] for n in cast("Sequence[fx.Node]", branch.output_node().args[0]))
        closed = fx.Graph()
        for operand in inputs:
            closed.placeholder(operand.name).meta = dict(operand.meta)
        closed.output(tuple(_ghost(closed, val, _has_debug_ghosts(self._body)) for val in vals))
        names = [_named(self._modules, "cone", side, graph) for side, graph in (("open", branch), ("closed", closed))]
        attributes = [self._graph.get_attr(name) for name in names]
        made = self._graph.call_function(COND, (here(switch), *attributes, tuple(inputs)))
        made.meta = {"val": vals}
        return made

    def _state_for(self, user: fx.Node, operand: fx.Node) -> States:
        """What ``user`` gets of ``operand``, cut as it is for a tile."""
        return self._found.inside[operand] if operand in self._inside else self._found.cut(user, operand)

    def _own(self, results: list[fx.Node]) -> list[fx.Node]:
        """Results that share no memory with an operand or with each other."""
        taken: set[fx.Node] = set()
        found = []
        for node in results:
            source = owner(node)
            if source.op == "placeholder" or source in taken:
                val = node.meta["val"]
                node = self._graph.call_function(torch.ops.aten.clone.default, (node,))
                node.meta = {"val": val}
            taken.add(source)
            found.append(node)
        return found

    def _check(self, stretch: Stretch) -> None:
        """The parts make up what they are parts of; what each tile has of its own is like what there was."""
        for node, val in zip(stretch.results, self.vals, strict=True):
            state, whole = cast(int, self._found.inside[node]), node.meta["val"]
            shape = list(val.shape)
            if state >= 0:
                shape[state] *= self._found.tiles
            if shape != list(whole.shape) or val.dtype != whole.dtype:
                raise AssertionError(f"a tile of {node.name} is {value_text(val)}, the whole {value_text(whole)}")


def _tile_branch(
    graph: fx.Graph, given: Sequence[States], vals: Sequence[torch.Tensor], tiles: int, fake: Any
) -> fx.Graph:
    """What a branch does on a tile. ``vals``: its operands; ``given``: what each is of the whole one."""
    inputs = graph.find_nodes(op="placeholder")
    found = follow_branch(graph, given, tiles)
    assert found is not None, "followed before"
    made, env = fx.Graph(), {}  # type: fx.Graph, dict[fx.Node, fx.Node]
    for node, val in zip(inputs, vals, strict=True):
        env[node] = made.placeholder(node.name)
        env[node].meta = {"val": val}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        args = fx.map_arg(tile_arguments(node, found.states[node], tiles), env.__getitem__)
        env[node] = made.call_function(node.target, args, fx.map_arg(dict(node.kwargs), env.__getitem__))
        env[node].meta = {"val": _evaluate(fake, env[node])}
    made.output(tuple(env[n] for n in cast("Sequence[fx.Node]", graph.output_node().args[0])))
    return made


def _has_debug_ghosts(body: fx.GraphModule) -> bool:
    """Whether ghosts are full of NaN (``Config.debug``)."""
    graphs = [module.graph for module in body.modules() if isinstance(module, fx.GraphModule)]
    return any(n.args[4] for graph in graphs for n in graph.find_nodes(op="call_function", target=GHOST))


def _ghost(graph: fx.Graph, val: torch.Tensor, debug: bool) -> fx.Node:
    described = (list(val.shape), list(val.stride()), val.dtype, val.device, debug)
    node = graph.call_function(GHOST, described)
    node.meta = {"val": val}
    return node


def _named(modules: dict[str, torch.nn.Module], kind: str, side: str, graph: fx.Graph) -> str:
    """The name under which ``modules`` has a branch that does what ``graph`` does; put there if there is none."""
    text = graph_text(graph.nodes)
    for known, module in modules.items():
        if known.endswith(f"_{side}") and graph_text(module.graph.nodes) == text:  # type: ignore[union-attr,arg-type]
            return known
    name = f"{kind}_{len(modules)}_{side}"
    modules[name] = fx.GraphModule({}, graph)
    survives_pickling(cast(fx.GraphModule, modules[name]))
    return name


def _evaluate(fake: Any, node: fx.Node) -> Any:
    """What ``node`` gives, as fake tensors."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with fake:
        return cast("Callable[..., Any]", node.target)(*args, **kwargs)
