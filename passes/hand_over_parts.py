"""Blocks that run in tiles hand values on in parts, and each part is given back once the next block has read it.

::

    y = block(x)    room for all of y beside all of x       y_0, y_1 = block(x_0, x_1)
    z = block(y)                                            z_0, z_1 = block(y_0, y_1)    y_0 is gone when z_1 is made

What passes from block to block is the widest that stands whole while blocks run in tiles: what a tile makes is a
fraction. In parts there is one more of them than make up the value, where there would be two such values; and no part
is written twice. A part is an operand, and a result, of its own. Where somebody else reads the value (the loss, what
is saved) the parts are joined behind the call; where one comes from elsewhere the first block gets slices of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from slimfit_fx.passes.outline_repeats import INVOKE, identifier_of
from slimfit_fx.passes.tile_bodies import PUT_PART

_SLICE = torch.ops.aten.slice.Tensor
_CAT = torch.ops.aten.cat.default
_ROOM = torch.ops.aten.empty_strided.default
PART = "slimfit_part"
"""Key in ``meta``: of which operand or result it is a part, which one, and of how many. It stands on what a block takes
and returns; the verifier holds what callers give and join against it."""
Place = tuple[str, int]
"""A block and which of its operands, or results."""


@dataclass(frozen=True)
class _Block:
    """A block that runs in tiles. ``operands`` and ``results``: by their place, the parts that they can be cut into."""

    body: fx.GraphModule
    calls: tuple[fx.Node, ...]
    operands: Mapping[int, tuple[fx.Node, ...]]
    results: Mapping[int, tuple[fx.Node, ...]]


@dataclass(frozen=True)
class _Chosen:
    """What is handed over in parts."""

    operands: frozenset[Place]
    results: frozenset[Place]


def hand_over_parts(module: fx.GraphModule) -> int:
    """Let the blocks of ``module`` that run in tiles take and give parts. Returns how many values go in parts."""
    blocks = {name: block for name, block in _blocks(module) if block.operands or block.results}
    chosen = _choose(blocks)
    if not chosen.results:
        return 0
    _rewrite(module, blocks, chosen)
    module.graph.lint()
    module.recompile()
    return sum(len(blocks[name].calls) for name, _ in chosen.results)


# -- deciding ----------------------------------------------------------------------------------------------------------
def _blocks(module: fx.GraphModule) -> Iterator[tuple[str, _Block]]:
    calls: dict[str, list[fx.Node]] = {}
    for call in module.graph.find_nodes(op="call_function", target=INVOKE):
        calls.setdefault(str(cast(fx.Node, call.args[0]).target), []).append(call)
    for name, callers in calls.items():
        body = cast(fx.GraphModule, getattr(module, name))
        operands = {
            place: parts
            for place, node in enumerate(body.graph.find_nodes(op="placeholder"))
            if (parts := _slices(node))
        }
        returned = cast("Sequence[fx.Node]", body.graph.output_node().args[0])
        results = {place: parts for place, node in enumerate(returned) if (parts := _written(node, returned))}
        yield name, _Block(body, tuple(callers), operands, results)


def _slices(operand: fx.Node) -> tuple[fx.Node, ...]:
    """The parts that ``operand`` is read in, in order; none if somebody reads another one, or all of it."""
    users = list(operand.users)
    if len(users) < 2 or any(user.target is not _SLICE or len(user.args) != 4 or user.args[1] != 0 for user in users):
        return ()
    ordered = sorted(users, key=lambda user: cast(int, user.args[2]))
    return _as_parts(operand, ordered, [cast(int, user.args[2]) for user in ordered])


def _written(room: fx.Node, returned: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The parts that ``room`` is filled with, in order, if it is returned and nothing else reads it."""
    puts = [user for user in room.users if user.target is PUT_PART and user.args[0] is room]
    if room.target is not _ROOM or returned.count(room) != 1 or len(room.users) != len(puts) + 1:
        return ()
    if len(puts) < 2 or any(put.args[2] != 0 for put in puts):
        return ()
    ordered = sorted(puts, key=lambda put: cast(int, put.args[3]))
    parts = [cast(fx.Node, put.args[1]) for put in ordered]
    if any(len(part.users) != 1 or not _fills_its_memory(part.meta["val"]) for part in parts):
        return ()
    return _as_parts(room, parts, [cast(int, put.args[3]) for put in ordered])


def _as_parts(whole: fx.Node, parts: Sequence[fx.Node], starts: Sequence[int]) -> tuple[fx.Node, ...]:
    """``parts`` if one behind the other, in memory too, they make up ``whole``."""
    val, vals = whole.meta["val"], [part.meta["val"] for part in parts]
    ends = [start + part.shape[0] for start, part in zip(starts, vals, strict=True)]
    complete = list(starts) == [0, *ends[:-1]] and ends[-1] == val.shape[0]
    alike = len({_layout(part) for part in vals}) == 1 and vals[0].dtype == val.dtype
    return tuple(parts) if complete and alike and val.is_contiguous() and vals[0].is_contiguous() else ()


def _fills_its_memory(val: torch.Tensor) -> bool:
    """Whether it is no view of something larger, which would be held with it and which it may begin anywhere in."""
    return val.untyped_storage().nbytes() == val.numel() * val.element_size()


def _layout(val: torch.Tensor) -> tuple[object, ...]:
    return tuple(val.shape), val.stride(), val.dtype, val.device


def _choose(blocks: Mapping[str, _Block]) -> _Chosen:
    """What goes in parts: results that are read so behind most calls, and operands that then come so in some."""
    operands = frozenset((name, place) for name, block in blocks.items() for place in block.operands)
    results = frozenset((name, place) for name, block in blocks.items() for place in block.results)
    while True:
        chosen = _Chosen(operands, results)
        results = frozenset(place for place in results if _is_read_in_parts(blocks, place, chosen))
        operands = frozenset(place for place in operands if _comes_in_parts(blocks, place, chosen))
        if chosen == _Chosen(operands, results):
            return chosen


def _is_read_in_parts(blocks: Mapping[str, _Block], place: Place, chosen: _Chosen) -> bool:
    """Behind more calls than not all readers take the result in the parts that it is made in."""
    name, number = place
    count = 0
    for call in blocks[name].calls:
        picked = _picked(call, number)
        read_at = [at for node in picked for user in node.users for at in _places(blocks, node, user)]
        parts = blocks[name].results[number]
        fits = bool(read_at) and all(
            at in chosen.operands and _fit(parts, blocks[at[0]].operands[at[1]]) if at is not None else False
            for at in read_at
        )
        count += 1 if fits else -1
    return count > 0


def _comes_in_parts(blocks: Mapping[str, _Block], place: Place, chosen: _Chosen) -> bool:
    name, number = place
    for call in blocks[name].calls:
        made = _made_at(blocks, cast(fx.Node, call.args[2 + number]))
        if made in chosen.results and _fit(blocks[made[0]].results[made[1]], blocks[name].operands[number]):
            return True
    return False


def _fit(made: Sequence[fx.Node], taken: Sequence[fx.Node]) -> bool:
    return [_layout(n.meta["val"]) for n in made] == [_layout(n.meta["val"]) for n in taken]


def _picked(call: fx.Node, place: int) -> list[fx.Node]:
    """The nodes that pick result ``place`` of ``call``."""
    return [user for user in call.users if user.target is operator.getitem and user.args[1] == place]


def _places(blocks: Mapping[str, _Block], node: fx.Node, user: fx.Node) -> Iterator[Place | None]:
    """Which operands of ``user`` it is; None if that is no call of a block in tiles."""
    if user.target is not INVOKE or str(cast(fx.Node, user.args[0]).target) not in blocks:
        yield None
        return
    name = str(cast(fx.Node, user.args[0]).target)
    for place, operand in enumerate(user.args[2:]):
        if operand is node:
            yield name, place


def _made_at(blocks: Mapping[str, _Block], node: fx.Node) -> Place | None:
    """Which result of a block in tiles ``node`` is; None if it is none."""
    if node.target is not operator.getitem:
        return None
    call = cast(fx.Node, node.args[0])
    if call.target is not INVOKE or str(cast(fx.Node, call.args[0]).target) not in blocks:
        return None
    return str(cast(fx.Node, call.args[0]).target), cast(int, node.args[1])


# -- acting ------------------------------------------------------------------------------------------------------------
def _rewrite(module: fx.GraphModule, blocks: Mapping[str, _Block], chosen: _Chosen) -> None:
    joined: dict[fx.Node, list[fx.Node]] = {}
    for name, block in blocks.items():
        given = {place for at, place in chosen.results if at == name}
        for call in block.calls if given else ():
            joined |= _give_parts(call, block, given)
    for name, block in blocks.items():
        taken = {place for at, place in chosen.operands if at == name}
        for call in block.calls if taken else ():
            _take_parts(call, block, taken, joined)
    for value in joined:
        if not value.users:
            module.graph.erase_node(value)
    for name, block in blocks.items():
        _rewrite_body(name, block, chosen)


def _give_parts(call: fx.Node, block: _Block, given: Set[int]) -> dict[fx.Node, list[fx.Node]]:
    """Let ``call`` return parts of its results at the places ``given``; what they are joined to -> the parts."""
    graph, joined, vals = call.graph, {}, []  # type: fx.Graph, dict[fx.Node, list[fx.Node]], list[torch.Tensor]
    picked = [_picked(call, place) for place in range(len(call.meta["val"]))]
    for place, val in enumerate(call.meta["val"]):
        first = len(vals)
        if place not in given:
            vals.append(val)
            for node in picked[place]:
                node.args = (call, first)
            continue
        vals += [part.meta["val"] for part in block.results[place]]
        with graph.inserting_after(call):
            value = graph.call_function(_CAT, ([],))
        value.meta = {"val": val}
        with graph.inserting_before(value):
            parts = [graph.call_function(operator.getitem, (call, number)) for number in range(first, len(vals))]
        for part, number in zip(parts, range(first, len(vals)), strict=True):
            part.meta = {"val": vals[number]}
        value.args = (parts,)
        joined[value] = parts
        for node in picked[place]:
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    call.meta["val"] = tuple(vals)
    return joined


def _take_parts(call: fx.Node, block: _Block, taken: Set[int], joined: Mapping[fx.Node, list[fx.Node]]) -> None:
    """Give ``call`` parts of its operands at the places ``taken``: those that they were joined of, or slices."""
    body, identifier, *operands = call.args
    given: list[object] = []
    for place, value in enumerate(cast("list[fx.Node]", operands)):
        if place not in taken:
            given.append(value)
        elif value in joined and _fit(joined[value], block.operands[place]):
            given += joined[value]
        else:
            with call.graph.inserting_before(call):
                given += _sliced(value, block.operands[place])
    call.args = (body, identifier, *cast("list[fx.Node]", given))


def _sliced(value: fx.Node, like: Sequence[fx.Node]) -> Iterator[fx.Node]:
    start = 0
    for part in like:
        val = part.meta["val"]
        made = value.graph.call_function(_SLICE, (value, 0, start, start + val.shape[0]))
        made.meta = {"val": val}
        start += val.shape[0]
        yield made


def _rewrite_body(name: str, block: _Block, chosen: _Chosen) -> None:
    """Let the block itself take and give parts, and its callers know it by what it is now."""
    graph = block.body.graph
    inputs = graph.find_nodes(op="placeholder")
    for place, parts in block.operands.items():
        if (name, place) not in chosen.operands:
            continue
        for number, part in enumerate(parts):
            with graph.inserting_before(inputs[place]):
                operand = graph.placeholder(f"{inputs[place].target}_{number}")
            operand.meta = {"val": part.meta["val"], PART: (place, number, len(parts))}
            part.replace_all_uses_with(operand)
            graph.erase_node(part)
        graph.erase_node(inputs[place])
    output = graph.output_node()
    given: list[fx.Node] = []
    for place, node in enumerate(list(cast("Sequence[fx.Node]", output.args[0]))):
        parts = block.results[place] if (name, place) in chosen.results else ()
        for number, part in enumerate(parts):
            part.meta[PART] = (place, number, len(parts))
        given += parts or [node]
    rooms = [n for place, n in enumerate(cast("Sequence[fx.Node]", output.args[0])) if (name, place) in chosen.results]
    output.args = (tuple(given),)
    for room in rooms:
        for put in list(room.users):
            graph.erase_node(put)
        graph.erase_node(room)
    graph.lint()
    block.body.recompile()
    identifier = identifier_of(name, graph)
    for call in block.calls:
        call.args = (call.args[0], identifier, *call.args[2:])
