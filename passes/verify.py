"""The legal graph, stage by stage. One function per rule; the runner checks all rules of a stage after every pass.

Stages: ``captured`` (a joint graph), ``split`` (forward and backward), ``compressed`` (codecs inserted), ``gated``
(branches and ghosts), ``outlined`` (what repeats became calls of blocks). A rule yields what is wrong, in words; the
runner turns that into an ``IllegalGraphError`` that names the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.canonical import value_text
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.passes.hand_over_parts import PART
from slimfit_fx.passes.insert_codecs import ENCODED
from slimfit_fx.passes.insert_gates import ANY_OPEN, CONE, GATE, GATES, RELEASE
from slimfit_fx.passes.outline_repeats import INVOKE, owner
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.tile_bodies import ADD_PART, PUT_PART

STASH = torch.ops.slimfit_fx.stash.default
GHOST = torch.ops.slimfit_fx.ghost.default
COND = torch.ops.higher_order.cond


class IllegalGraphError(AssertionError):
    """A pass produced a graph that breaks a rule: our bug, never the user's."""


def verify_joint(joint: JointGraph) -> None:
    """Raise ``IllegalGraphError`` if ``joint`` breaks a rule of the stage ``captured``."""
    _raise_if_any("captured", [p for rule in JOINT_RULES for p in rule(joint)])


def verify_seam(stage: str, seam: Seam) -> None:
    """Raise ``IllegalGraphError`` if the pair breaks a rule of ``stage``."""
    _raise_if_any(stage, [p for rule in SEAM_RULES[stage] for p in rule(seam)])


def _raise_if_any(stage: str, problems: list[str]) -> None:
    if problems:
        raise IllegalGraphError(f"illegal {stage} graph: " + "; ".join(problems))


# -- captured ----------------------------------------------------------------------------------------------------------
def rule_joint_lints(joint: JointGraph) -> Iterator[str]:
    """The graph is well-formed by torch.fx's own lint."""
    yield from _lint("joint", joint.graph)


def rule_gates_are_bool_inputs(joint: JointGraph) -> Iterator[str]:
    """Every gate is a 0-dim bool on the CPU: a branch on it costs no device sync."""
    for gate, node in joint.gates.items():
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.dtype != torch.bool or val.dim() != 0 or val.device.type != "cpu":
            yield f"gate {gate} ({node.name}) is not a 0-dim CPU bool"


def rule_every_gradient_has_a_gate_or_is_static(joint: JointGraph) -> Iterator[str]:
    """Each gradient output is known to belong to a gate or to none."""
    if len(joint.grads) != len(joint.grad_nodes()):
        yield f"{len(joint.grad_nodes())} gradient outputs but {len(joint.grads)} gate entries"


# -- split -------------------------------------------------------------------------------------------------------------
def rule_graphs_lint(seam: Seam) -> Iterator[str]:
    """Both graphs are well-formed by torch.fx's own lint."""
    yield from _lint("forward", seam.forward.graph)
    yield from _lint("backward", seam.backward.graph)


def rule_seam_agrees(seam: Seam) -> Iterator[str]:
    """Each saved tensor has a placeholder of the same shape, strides, dtype and device."""
    try:
        pairs = seam.saved()
    except KeyError as missing:
        yield f"saved value without a placeholder in backward: {missing}"
        return
    for value, placeholder in pairs:
        here, there = value.meta.get("val"), placeholder.meta.get("val")
        if not isinstance(here, torch.Tensor) or not isinstance(there, torch.Tensor):
            yield f"saved value {value.name} has no example tensor"
        elif (str(here.shape), here.stride(), here.dtype, here.device) != (
            str(there.shape),
            there.stride(),
            there.dtype,
            there.device,
        ):
            yield f"saved value {value.name} differs from its placeholder in shape, strides, dtype or device"


def rule_seam_keeps_its_order(seam: Seam) -> Iterator[str]:
    """Saved values arrive in the order in which forward returns them: AOTAutograd hands them over by position."""
    inputs = [n for n in seam.backward.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
    if (mixed := seam.symbol_before_a_tensor()) is not None:
        yield f"saved value {mixed} is a symbol and is returned before a tensor"
    for what, symbols in (("tensors", False), ("symbols", True)):
        arriving = [str(n.target) for n in inputs if ops.is_symbol(n) is symbols]
        expected = seam.saved_names(symbols=symbols)
        if set(expected) - set(arriving):
            continue  # of which rule_seam_agrees speaks
        if len(arriving) != len(expected):
            yield f"forward saves {len(expected)} {what}, backward takes {len(arriving)}"
        for index, (want, have) in enumerate(zip(expected, arriving, strict=False)):
            if want != have:
                yield f"saved value {index} is {want} in forward and arrives as {have}"
                break


def rule_random_runs_once(seam: Seam) -> Iterator[str]:
    """No random operator of the forward graph runs again in backward: it would draw other numbers."""
    drawn = {n.name for n in seam.forward.graph.nodes if ops.is_random(n)}
    for node in seam.backward.graph.nodes:
        if node.name in drawn and ops.is_random(node):
            yield f"random operator {node.name} runs in forward and again in backward"


# -- compressed --------------------------------------------------------------------------------------------------------
def rule_codec_spares_user_values(seam: Seam) -> Iterator[str]:
    """User outputs are not made from encoded values."""
    tainted: set[fx.Node] = set()
    for node in seam.forward.graph.nodes:
        if ENCODED in node.meta or any(i in tainted for i in node.all_input_nodes if node.op != "output"):
            tainted.add(node)
    for node in seam.user_outputs():
        if node in tainted:
            yield f"user output {node.name} depends on an encoded value"


def rule_encoded_once(seam: Seam) -> Iterator[str]:
    """No part of an encoded value is saved twice."""
    seen: set[object] = set()
    for value, _ in _saved(seam):
        mark = value.meta.get(ENCODED)
        if mark is not None and mark in seen:
            yield f"part {mark} is saved twice"
        seen.add(mark)


# -- gated -------------------------------------------------------------------------------------------------------------
def rule_ghosts_reach_only_their_cones(seam: Seam) -> Iterator[str]:
    """What may be a ghost is read only by branches whose gates are among its own; gradients go to the output."""
    for node in seam.backward.graph.nodes:
        if node.op == "placeholder" and GATES in node.meta:
            yield from _readers_gated_by(node, node.meta[GATES])
        elif node.op == "call_function" and node.target is COND:
            yield from _result_escapes(node)


def rule_stash_outputs_are_only_saved(seam: Seam) -> Iterator[str]:
    """A stash is saved for backward and read by nothing in forward; tags on both sides name the gates it looks at."""
    user = set(seam.user_outputs())
    saved = dict(_saved(seam))
    for node in seam.forward.graph.nodes:
        if node.op == "call_function" and node.target is STASH:
            if node in user:
                yield f"stash {node.name} is returned to the user"
            if node not in saved:
                yield f"stash {node.name} is not saved"
            if any(u.op != "output" for u in node.users):
                yield f"stash {node.name} is read in forward"
            gates = frozenset(g.meta.get(GATE) for g in node.args[1])
            if gates != node.meta.get(GATES):
                yield f"stash {node.name} is gated by {sorted(map(str, gates))} but tagged {node.meta.get(GATES)}"
    for value, placeholder in saved.items():
        made = value.meta.get(GATES) if value.target is STASH else None
        if placeholder.meta.get(GATES) != made:
            yield f"saved value {value.name} is gated by {made} but arrives tagged {placeholder.meta.get(GATES)}"


def rule_branches_are_closed(seam: Seam) -> Iterator[str]:
    """Branches are switched by their own gates, take the operands they are given and return memory of their own."""
    for node in seam.backward.graph.nodes:
        if node.op != "call_function" or node.target is not COND:
            continue
        gate, opened, closed, operands = node.args
        if (switches := _gates_of_switch(gate)) != node.meta.get(CONE):
            yield f"branch {node.name} of {_named(node.meta.get(CONE))} is switched by {_named(switches)}"
        for branch in (opened, closed):
            graph = getattr(seam.backward, str(branch.target)).graph
            if len(graph.find_nodes(op="placeholder")) != len(operands):
                yield f"branch {node.name}: {branch.target} takes another number of operands"
            bases = [ops.view_base(result) for result in graph.output_node().args[0]]
            if any(base.op == "placeholder" for base in bases):
                yield f"branch {node.name}: {branch.target} returns a view of an operand"
            if len(set(bases)) < len(bases):
                yield f"branch {node.name}: {branch.target} returns one piece of memory twice"
        if not all(isinstance(o, fx.Node) and (ops.is_tensor(o) or ops.is_symbol(o)) for o in operands):
            yield f"branch {node.name} has an operand that is neither a tensor nor a symbol"


def _readers_gated_by(node: fx.Node, gates: frozenset[int]) -> Iterator[str]:
    for user in node.users:
        if ops.reads_shape_only(user):
            continue
        if user.op == "output":
            yield f"ghost {node.name} leaves the backward graph"
        elif user.target is RELEASE:
            if user.args[0] is node:
                yield f"ghost {node.name} is passed on by {user.name}"
        elif user.target is not COND:
            yield f"ghost {node.name} is read by {user.name} outside every branch"
        elif not _reads_when_open(user, node, gates):
            yield f"ghost {node.name} of {_named(gates)} is read by the branch of {_named(user.meta.get(CONE))}"


def _reads_when_open(user: fx.Node, node: fx.Node, gates: frozenset[int]) -> bool:
    """Whether ``user`` is a branch that runs only if one of ``gates`` is open, or what lets go of its operands."""
    if user.target is RELEASE:
        return user.args[0] is not node
    return user.target is COND and user.args[0] is not node and user.meta.get(CONE, frozenset([None])) <= gates


def _gates_of_switch(node: fx.Node) -> frozenset[int | None]:
    if node.op == "call_function" and node.target is ANY_OPEN:
        gates: Any = node.args[0]
        return frozenset(gate.meta.get(GATE) for gate in gates)
    return frozenset([node.meta.get(GATE)])


def _named(gates: frozenset[int | None] | None) -> str:
    names = ", ".join(sorted(map(str, gates or (None,))))
    return f"gate {names}" if len(gates or ()) < 2 else f"gates {names}"


def _result_escapes(call: fx.Node) -> Iterator[str]:
    """A branch's result goes through ``release``, which reads no element of it, to the outputs or to inner branches."""
    for element in call.users:
        if not ops.is_getitem(element):
            yield f"branch {call.name} is read whole by {element.name}"
            continue
        for user in element.users:
            if user.target is RELEASE and user.args[0] is element:
                inner = [u for u in user.users if _reads_when_open(u, user, call.meta.get(CONE, frozenset()))]
                escaped = [u.name for u in user.users if u.op != "output" and u not in inner]
            else:
                escaped = [user.name] if user.op != "output" else []
            if escaped:
                yield f"result {element.name} of a branch is read outside the branches of its gates: {escaped[0]}"


# -- outlined ----------------------------------------------------------------------------------------------------------
def rule_blocks_are_called_alike(seam: Seam) -> Iterator[str]:
    """Every call of a block gives it operands of the shapes, strides and dtypes that it was made for."""
    for call, body in _all_calls(seam):
        inputs = body.graph.find_nodes(op="placeholder")
        given = call.args[2:]
        if len(inputs) != len(given):
            yield f"call {call.name} gives {len(given)} operands to a block of {len(inputs)}"
        for operand, placeholder in zip(given, inputs, strict=False):
            if _layout(operand.meta.get("val")) != _layout(placeholder.meta.get("val")):
                yield f"call {call.name}: operand {operand.name} is not what {placeholder.name} stands for"


def rule_blocks_return_memory_of_their_own(seam: Seam) -> Iterator[str]:
    """No result of a block shares memory with an operand or with another result."""
    for call, body in _all_calls(seam):
        results = list(body.graph.output_node().args[0])
        owners = [owner(node) for node in results]
        for node in owners:
            if node.op == "placeholder":
                yield f"call {call.name} returns memory of its operand {node.name}"
        if len(set(owners)) < len(results):
            yield f"call {call.name} returns one piece of memory twice"


def rule_blocks_lint(seam: Seam) -> Iterator[str]:
    """Blocks and their tiles are well-formed by torch.fx's own lint."""
    for body, name in {body: str(call.args[0].target) for call, body in _all_calls(seam)}.items():
        yield from _lint(name, body.graph)


def rule_parts_make_up_the_whole(seam: Seam) -> Iterator[str]:
    """What tiles give fills the memory that is there for it, each place once."""
    for body in {body for _, body in _all_calls(seam)}:
        for room in body.graph.find_nodes(op="call_function", target=torch.ops.aten.empty_strided.default):
            writes = [user.args for user in room.users if user.target is PUT_PART and user.args[0] is room]
            whole, parts = room.meta["val"], [(part.meta["val"], along, start) for _, part, along, start in writes]
            if len({along for _, along, _ in parts}) != 1 or any(part.dtype != whole.dtype for part, _, _ in parts):
                yield f"{room.name} is not filled by parts along one dimension"
                continue
            along = parts[0][1]
            rest = [
                [n for d, n in enumerate(val.shape) if d != along] for val in (whole, *(part for part, _, _ in parts))
            ]
            ends = [start + part.shape[along] for part, _, start in parts]
            if [start for _, _, start in parts] != [0, *ends[:-1]] or ends[-1] != whole.shape[along]:
                yield f"parts of {room.name} leave places out or overlap"
            if any(sizes != rest[0] for sizes in rest):
                yield f"parts of {room.name} are of other sizes"


def rule_sums_are_complete_when_they_are_read(seam: Seam) -> Iterator[str]:
    """What tiles are added to is what the first of them gave, and nobody else reads it before the last is added."""
    for body in {body for _, body in _all_calls(seam)}:
        places = {node: place for place, node in enumerate(body.graph.nodes)}
        adds = body.graph.find_nodes(op="call_function", target=ADD_PART)
        last = {add.args[0]: places[add] for add in adds}
        for add in adds:
            total, part = add.args
            if not (ops.is_getitem(total) and _layout(total.meta["val"]) == _layout(part.meta["val"])):
                yield f"{add.name} does not add to what a tile of its like gave"
        for total, place in last.items():
            if any(places[user] < place for user in total.users if user.target is not ADD_PART):
                yield f"{total.name} is read before all tiles are added to it"


def rule_parts_are_handed_over_in_order(seam: Seam) -> Iterator[str]:
    """What a block takes in parts comes as all parts of one value, in their order; so does what is joined of parts."""
    bodies = dict(_all_calls(seam))
    for call, body in bodies.items():
        places: dict[int, list[tuple[Any, tuple[int, int]]]] = {}
        for operand, placeholder in zip(call.args[2:], body.graph.find_nodes(op="placeholder"), strict=False):
            if PART in placeholder.meta:
                place, *which = placeholder.meta[PART]
                places.setdefault(place, []).append((operand, tuple(which)))
        for place, taken in places.items():
            given = [_part(operand, bodies) for operand, _ in taken]
            if len({value for value, _ in given}) != 1 or [which for _, which in given] != [w for _, w in taken]:
                yield f"call {call.name}: operand {place} does not get the parts of one value in their order"
    for module in (seam.forward, seam.backward):
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
            given = [_part(part, bodies) for part in node.args[0]]
            if any(isinstance(value, tuple) for value, _ in given):
                complete = [which for _, which in given] == [(n, len(given)) for n in range(len(given))]
                if len({value for value, _ in given}) != 1 or not complete:
                    yield f"{node.name} does not join the parts of one value in their order"


def _part(node: Any, bodies: Mapping[fx.Node, Any]) -> tuple[Any, tuple[int, int]]:
    """Of what value ``node`` is a part, and which one of how many; a value that is no part is the only one of its own.

    Parts are results of a block that gives them, of which the value is (call, place), or slices of what is whole.
    """
    if ops.is_getitem(node) and node.args[0] in bodies:
        returned = bodies[node.args[0]].graph.output_node().args[0][node.args[1]]
        if PART in returned.meta:
            place, *which = returned.meta[PART]
            return (node.args[0], place), tuple(which)
    if node.target is torch.ops.aten.slice.Tensor and len(node.args) == 4 and node.args[1] == 0:
        rows, start, of = node.meta["val"].shape[0], node.args[2], node.args[0].meta["val"].shape[0]
        if all(isinstance(number, int) for number in (rows, start, of)) and rows and start % rows == 0:
            return node.args[0], (start // rows, of // rows)
    return node, (0, 1)


def _all_calls(seam: Seam) -> Iterator[tuple[Any, Any]]:
    """Each call of a block and the block; each call of a tile in it and the tile."""
    modules = [seam.forward, seam.backward]
    for module in modules:
        for call in module.graph.find_nodes(op="call_function", target=INVOKE):
            body = getattr(module, str(call.args[0].target))
            yield call, body
            if body not in modules:
                modules.append(body)


def _layout(val: Any) -> Any:
    """What an operand is to a block, wherever in memory it begins."""
    if isinstance(val, torch.Tensor):
        return tuple(map(str, val.shape)), tuple(map(str, val.stride())), val.dtype, val.device
    return value_text(val)


def _saved(seam: Seam) -> list[tuple[fx.Node, fx.Node]]:
    """The saved pairs; none if a placeholder is missing, of which ``rule_seam_agrees`` speaks."""
    try:
        return seam.saved()
    except KeyError:
        return []


def _lint(name: str, graph: fx.Graph) -> Iterator[str]:
    try:
        graph.lint()
    except (RuntimeError, AssertionError, ValueError) as error:
        yield f"{name} graph does not lint: {error}"


JointRule = Callable[[JointGraph], Iterator[str]]
SeamRule = Callable[[Seam], Iterator[str]]
JOINT_RULES: tuple[JointRule, ...] = (
    rule_joint_lints,
    rule_gates_are_bool_inputs,
    rule_every_gradient_has_a_gate_or_is_static,
)
_SPLIT: tuple[SeamRule, ...] = (rule_graphs_lint, rule_seam_agrees, rule_seam_keeps_its_order, rule_random_runs_once)
_COMPRESSED = (*_SPLIT, rule_codec_spares_user_values, rule_encoded_once)
SEAM_RULES: dict[str, tuple[SeamRule, ...]] = {
    "split": _SPLIT,
    "compressed": _COMPRESSED,
    "gated": (
        *_COMPRESSED,
        rule_ghosts_reach_only_their_cones,
        rule_stash_outputs_are_only_saved,
        rule_branches_are_closed,
    ),
    # blocks hide what the earlier rules look at, and change nothing of it
    "outlined": (
        rule_graphs_lint,
        rule_blocks_lint,
        rule_parts_make_up_the_whole,
        rule_sums_are_complete_when_they_are_read,
        rule_parts_are_handed_over_in_order,
        rule_blocks_are_called_alike,
        rule_blocks_return_memory_of_their_own,
    ),
}
