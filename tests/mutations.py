"""Graphs broken on purpose: for each rule of the legal graph, the ways to break it and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.inductor_prims  # noqa: F401  (registers inductor_random)
from graphs import ATEN
from torch import fx

from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.passes import verify
from slimfit_fx.passes.hand_over_parts import PART
from slimfit_fx.passes.insert_codecs import ENCODED
from slimfit_fx.passes.insert_gates import ANY_OPEN, CONE, GATE, GATES, RELEASE
from slimfit_fx.passes.outline_repeats import INVOKE
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.tile_bodies import ADD_PART, PUT_PART
from slimfit_fx.passes.verify import COND, STASH


@dataclass(frozen=True)
class Mutation:
    """One way to break ``rule``. ``mutate`` returns False where a graph has no place for it."""

    rule: Callable[..., Any]
    stage: str
    match: str
    mutate: Callable[..., bool]


MUTATIONS: list[Mutation] = []


def breaks(rule: Callable[..., Any], stage: str, match: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(mutate: Callable[..., bool]) -> Callable[..., bool]:
        MUTATIONS.append(Mutation(rule, stage, match, mutate))
        return mutate

    return register


# ---- captured


@breaks(verify.rule_joint_lints, "captured", "joint graph does not lint: .*used before it has been defined")
def joint_reads_what_is_not_there_yet(joint: JointGraph) -> bool:
    return _put_before_its_input(joint.graph)


@breaks(verify.rule_gates_are_bool_inputs, "captured", r"gate \d+ \(.*\) is not a 0-dim CPU bool")
def gate_is_a_number(joint: JointGraph) -> bool:
    return _give_gate(joint, torch.tensor(1.0))


@breaks(verify.rule_gates_are_bool_inputs, "captured", "is not a 0-dim CPU bool")
def gate_has_a_dimension(joint: JointGraph) -> bool:
    return _give_gate(joint, torch.tensor([True]))


@breaks(verify.rule_gates_are_bool_inputs, "captured", "is not a 0-dim CPU bool")
def gate_is_on_another_device(joint: JointGraph) -> bool:
    return _give_gate(joint, torch.tensor(True, device="meta"))


@breaks(verify.rule_gates_are_bool_inputs, "captured", "is not a 0-dim CPU bool")
def gate_is_no_tensor(joint: JointGraph) -> bool:
    return _give_gate(joint, True)


@breaks(verify.rule_every_gradient_has_a_gate_or_is_static, "captured", r"\d+ gradient outputs but \d+ gate entries")
def gradient_without_an_entry(joint: JointGraph) -> bool:
    joint.grads.pop()
    return True


@breaks(verify.rule_every_gradient_has_a_gate_or_is_static, "captured", r"\d+ gradient outputs but \d+ gate entries")
def entry_without_a_gradient(joint: JointGraph) -> bool:
    joint.grads.append(0)
    return True


def _give_gate(joint: JointGraph, value: object) -> bool:
    for node in joint.gates.values():
        node.meta["val"] = value
        return True
    return False


def _put_before_its_input(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        made = [i for i in node.all_input_nodes if i.op == "call_function"]
        if node.op == "call_function" and made:
            made[0].prepend(node)
            return True
    return False


# ---- split


@breaks(verify.rule_graphs_lint, "split", "forward graph does not lint")
def forward_reads_what_is_not_there_yet(seam: Seam) -> bool:
    return _put_before_its_input(seam.forward.graph)


@breaks(verify.rule_graphs_lint, "split", "backward graph does not lint")
def backward_reads_what_is_not_there_yet(seam: Seam) -> bool:
    return _put_before_its_input(seam.backward.graph)


@breaks(verify.rule_seam_agrees, "split", "saved value without a placeholder in backward")
def saved_value_arrives_nowhere(seam: Seam) -> bool:
    for _, placeholder in seam.saved():
        placeholder.target = "nowhere"
        return True
    return False


@breaks(verify.rule_seam_agrees, "split", "saved value .* has no example tensor")
def placeholder_without_an_example(seam: Seam) -> bool:
    return _give_placeholder(seam, lambda val: None)


@breaks(verify.rule_seam_agrees, "split", "differs from its placeholder in shape")
def placeholder_of_another_shape(seam: Seam) -> bool:
    return _give_placeholder(seam, lambda val: val.unsqueeze(0))


@breaks(verify.rule_seam_agrees, "split", "differs from its placeholder in shape, strides")
def placeholder_of_other_strides(seam: Seam) -> bool:
    return _give_placeholder(
        seam, lambda val: torch.empty_strided(val.shape, [2 * s for s in val.stride()], dtype=val.dtype)
    )


@breaks(verify.rule_seam_agrees, "split", "differs from its placeholder in shape, strides, dtype")
def placeholder_of_another_type(seam: Seam) -> bool:
    return _give_placeholder(seam, lambda val: val.to(torch.complex64))


@breaks(verify.rule_seam_agrees, "split", "differs from its placeholder in shape, strides, dtype or device")
def placeholder_on_another_device(seam: Seam) -> bool:
    return _give_placeholder(
        seam, lambda val: torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    )


@breaks(verify.rule_seam_keeps_its_order, "split", r"saved value \d+ is .* in forward and arrives as")
def two_saved_values_change_places(seam: Seam) -> bool:
    return _swap_saved(seam, seam.num_fwd_outputs)


@breaks(verify.rule_seam_keeps_its_order, "split", r"forward saves \d+ (tensors|symbols), backward takes \d+")
def a_saved_value_is_not_returned(seam: Seam) -> bool:
    output = seam.forward.graph.output_node()
    output.args = (output.args[0][:-1],)
    return True


@breaks(verify.rule_seam_keeps_its_order, "gated", r"saved value 0 is primals_\d+ in forward and arrives as")
def two_gates_change_places(seam: Seam) -> bool:
    return _swap_saved(seam, seam.num_fwd_outputs)


def _swap_saved(seam: Seam, at: int) -> bool:
    output = seam.forward.graph.output_node()
    values = list(output.args[0])
    if len(values) < at + 2:
        return False
    values[at], values[at + 1] = values[at + 1], values[at]
    output.args = (tuple(values),)
    return True


@breaks(verify.rule_random_runs_once, "split", "random operator rand_like.* runs in forward and again in")
def plain_random_numbers_are_drawn_again(seam: Seam) -> bool:
    for module in (seam.forward, seam.backward):
        (value, *_) = [n for n in module.graph.find_nodes(op="placeholder") if n.meta["val"] is not None]
        _call(module, ATEN.rand_like.default, value).name = "rand_like_of_both"
    return True


@breaks(verify.rule_random_runs_once, "split", "random operator inductor_random.* runs in forward and again in")
def random_numbers_are_drawn_again(seam: Seam) -> bool:
    for module in (seam.forward, seam.backward):
        (seed, *_) = module.graph.find_nodes(op="placeholder")
        _call(module, torch.ops.prims.inductor_random.default, [2], seed, "rand").name = "inductor_random_of_both"
    return True


def _give_placeholder(seam: Seam, change: Callable[[Any], Any]) -> bool:
    for _, placeholder in seam.saved():
        if placeholder.meta["val"].dim():
            placeholder.meta = {**placeholder.meta, "val": change(placeholder.meta["val"])}
            return True
    return False


def _call(module: fx.GraphModule, op: Callable[..., Any], *args: Any) -> fx.Node:
    """One more call at the end of a graph."""
    with module.graph.inserting_before(module.graph.output_node()):
        node = module.graph.call_function(op, args)
    node.meta["val"] = next((a.meta["val"] for a in args if isinstance(a, fx.Node)), None)
    return node


# ---- compressed


@breaks(verify.rule_codec_spares_user_values, "compressed", "user output .* depends on an encoded value")
def encoded_part_goes_to_the_user(seam: Seam) -> bool:
    return any(_return_to_the_user(seam, part) for part in _encoded(seam))


@breaks(verify.rule_codec_spares_user_values, "compressed", "user output neg.* depends on an encoded value")
def user_output_is_made_of_an_encoded_part(seam: Seam) -> bool:
    return any(_return_to_the_user(seam, _call(seam.forward, ATEN.neg.default, part)) for part in _encoded(seam))


@breaks(verify.rule_encoded_once, "compressed", r"part \('.*', \d\) is saved twice")
def encoded_part_is_saved_twice(seam: Seam) -> bool:
    for part in _encoded(seam):
        copied = _call(seam.forward, ATEN.clone.default, part)
        copied.meta[ENCODED] = part.meta[ENCODED]
        seam.prepend([copied])
        return True
    return False


def _encoded(seam: Seam) -> list[fx.Node]:
    return [value for value, _ in seam.saved() if ENCODED in value.meta]


def _return_to_the_user(seam: Seam, node: fx.Node) -> bool:
    output = seam.forward.graph.output_node()
    output.args = ((node, *output.args[0][1:]),)
    return True


# ---- gated: ghosts


def _ghosts(seam: Seam) -> list[fx.Node]:
    return [p for p in seam.backward.graph.find_nodes(op="placeholder") if GATES in p.meta]


def _branches(seam: Seam) -> list[fx.Node]:
    return seam.backward.graph.find_nodes(op="call_function", target=COND)


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "ghost .* leaves the backward graph")
def ghost_is_returned(seam: Seam) -> bool:
    output = seam.backward.graph.output_node()
    for ghost in _ghosts(seam):
        output.args = ((*output.args[0], ghost),)
        return True
    return False


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "ghost .* is read by neg.* outside every branch")
def ghost_is_read_outside(seam: Seam) -> bool:
    return any(_call(seam.backward, ATEN.neg.default, ghost) for ghost in _ghosts(seam))


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "ghost .* is passed on by release")
def ghost_is_passed_on(seam: Seam) -> bool:
    return any(_call(seam.backward, RELEASE, ghost, []) for ghost in _ghosts(seam))


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "ghost .* of gates? .* is read by the branch of gate")
def ghost_is_read_behind_another_gate(seam: Seam) -> bool:
    for ghost in _ghosts(seam):
        for branch in _branches(seam):
            if not branch.meta[CONE] <= ghost.meta[GATES]:
                _add_operand(seam, branch, ghost)
                return True
    return False


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "branch cond.* is read whole by ")
def branch_is_read_whole(seam: Seam) -> bool:
    return any(_call(seam.backward, operator.length_hint, branch) for branch in _branches(seam))


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "result getitem.* of a branch is read outside .*: neg")
def gated_gradient_is_read(seam: Seam) -> bool:
    return any(_call(seam.backward, ATEN.neg.default, element) for b in _branches(seam) for element in b.users)


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "result getitem.* of a branch is read outside .*: neg")
def released_gradient_is_read(seam: Seam) -> bool:
    released = seam.backward.graph.find_nodes(op="call_function", target=RELEASE)
    return any(_call(seam.backward, ATEN.neg.default, gradient) for gradient in released)


@breaks(verify.rule_ghosts_reach_only_their_cones, "gated", "result getitem.* of a branch is read outside .*: cond")
def shared_value_is_read_behind_another_gate(seam: Seam) -> bool:
    for released in seam.backward.graph.find_nodes(op="call_function", target=RELEASE):
        for branch in _branches(seam):
            if not branch.meta[CONE] <= released.meta[CONE] and released < branch:
                _add_operand(seam, branch, released)
                return True
    return False


def _add_operand(seam: Seam, branch: fx.Node, operand: fx.Node) -> None:
    gate, opened, closed, operands = branch.args
    for part in (opened, closed):
        graph = getattr(seam.backward, part.target).graph
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            graph.placeholder("one_more").meta = dict(operand.meta)
    branch.args = (gate, opened, closed, (*operands, operand))


# ---- gated: stashes


def _stashes(seam: Seam) -> list[fx.Node]:
    return seam.forward.graph.find_nodes(op="call_function", target=STASH)


@breaks(verify.rule_stash_outputs_are_only_saved, "gated", "stash .* is returned to the user")
def stash_goes_to_the_user(seam: Seam) -> bool:
    return any(_return_to_the_user(seam, stash) for stash in _stashes(seam) if ENCODED not in stash.meta)


@breaks(verify.rule_stash_outputs_are_only_saved, "gated", "stash .* is read in forward")
def stash_is_read_in_forward(seam: Seam) -> bool:
    return any(_call(seam.forward, ATEN.neg.default, stash) for stash in _stashes(seam))


@breaks(verify.rule_stash_outputs_are_only_saved, "gated", r"stash .* is gated by \['0', .*\] but tagged frozenset")
def stash_looks_at_more_gates_than_its_tag_names(seam: Seam) -> bool:
    gates = [n for n in seam.forward.graph.nodes if GATE in n.meta]
    for stash in _stashes(seam):
        if len(stash.args[1]) < len(gates):
            stash.args = (stash.args[0], gates, stash.args[2])
            return True
    return False


@breaks(verify.rule_stash_outputs_are_only_saved, "gated", r"stash .* is gated by \[\] but tagged frozenset")
def stash_looks_at_no_gate(seam: Seam) -> bool:
    for stash in _stashes(seam):
        stash.args = (stash.args[0], [], stash.args[2])
        return True
    return False


@breaks(verify.rule_stash_outputs_are_only_saved, "gated", r"saved value .* is gated by .* but arrives tagged")
def stash_arrives_with_other_gates(seam: Seam) -> bool:
    for ghost in _ghosts(seam):
        ghost.meta[GATES] = ghost.meta[GATES] | {10**6}
        return True
    return False


# ---- gated: branches


@breaks(verify.rule_branches_are_closed, "gated", r"branch cond.* of gates \d+, \d+.* is switched by gate")
def switch_leaves_a_gate_out(seam: Seam) -> bool:
    for switch in seam.backward.graph.find_nodes(op="call_function", target=ANY_OPEN):
        switch.args = (switch.args[0][1:],)
        return True
    return False


@breaks(verify.rule_branches_are_closed, "gated", r"branch cond.* of gates? \d+.* is switched by gate \d+")
def branch_is_switched_by_another_gate(seam: Seam) -> bool:
    for branch in _branches(seam):
        inputs = [n for n in seam.backward.graph.nodes if GATE in n.meta]
        others = [n for n in inputs if branch.meta[CONE] != {n.meta[GATE]}]
        for gate in others[:1]:
            branch.args = (gate, *branch.args[1:])
            return True
    return False


@breaks(verify.rule_branches_are_closed, "gated", r"branch cond.* of gates? \d+.* is switched by gate None")
def branch_is_switched_by_no_gate(seam: Seam) -> bool:
    for branch in _branches(seam):
        branch.args = (seam.backward.graph.find_nodes(op="placeholder")[-1], *branch.args[1:])
        return True
    return False


@breaks(verify.rule_branches_are_closed, "gated", "branch cond.*: cone_.* takes another number of operands")
def branch_gets_an_operand_too_many(seam: Seam) -> bool:
    for branch in _branches(seam):
        branch.args = (*branch.args[:3], (*branch.args[3], branch.args[3][0]))
        return True
    return False


@breaks(verify.rule_branches_are_closed, "gated", "branch cond.*: cone_.*_open returns a view of an operand")
def branch_returns_an_operand(seam: Seam) -> bool:
    return _return_from_branch(seam, lambda module, operand: operand)


@breaks(verify.rule_branches_are_closed, "gated", "branch cond.*: cone_.*_open returns a view of an operand")
def branch_returns_a_view_of_an_operand(seam: Seam) -> bool:
    return _return_from_branch(seam, lambda module, operand: _call(module, ATEN.permute.default, operand, [1, 0]))


@breaks(verify.rule_branches_are_closed, "gated", "branch cond.*: cone_.*_open returns one piece of memory twice")
def branch_returns_a_result_twice(seam: Seam) -> bool:
    for branch in _branches(seam):
        output = getattr(seam.backward, branch.args[1].target).graph.output_node()
        output.args = ((*output.args[0], output.args[0][0]),)
        return True
    return False


@breaks(verify.rule_branches_are_closed, "gated", "branch cond.* has an operand that is neither a tensor nor a symbol")
def branch_gets_a_constant(seam: Seam) -> bool:
    for branch in _branches(seam):
        branch.args = (*branch.args[:3], (*branch.args[3][:-1], 3))
        return True
    return False


def _return_from_branch(seam: Seam, result: Callable[[fx.GraphModule, fx.Node], fx.Node]) -> bool:
    for branch in _branches(seam):
        module = getattr(seam.backward, branch.args[1].target)
        operand = module.graph.find_nodes(op="placeholder")[0]
        module.graph.output_node().args = ((result(module, operand),),)
        return True
    return False


# ---- outlined


def _blocks(seam: Seam) -> list[tuple[fx.Node, fx.GraphModule]]:
    modules = (seam.forward, seam.backward)
    return [
        (call, getattr(module, call.args[0].target))
        for module in modules
        for call in module.graph.find_nodes(op="call_function", target=INVOKE)
    ]


@breaks(verify.rule_blocks_lint, "outlined", "(block|rest)_0 graph does not lint: .*used before it has been defined")
def block_reads_what_is_not_there_yet(seam: Seam) -> bool:
    return any(_put_before_its_input(body.graph) for _, body in _blocks(seam)[:1])


@breaks(verify.rule_blocks_are_called_alike, "outlined", r"call invoke_subgraph.* gives \d+ operands to a block of \d+")
def block_gets_an_operand_too_many(seam: Seam) -> bool:
    for call, _ in _blocks(seam):
        call.args = (*call.args, call.args[2])
        return True
    return False


@breaks(verify.rule_blocks_are_called_alike, "outlined", "call invoke_subgraph.*: operand .* is not what operand_")
def block_gets_an_operand_of_another_shape(seam: Seam) -> bool:
    for call, _ in _blocks(seam):
        first, *rest = call.args[2:]
        other = next((n for n in rest if n.meta["val"].shape != first.meta["val"].shape), None)
        if other is not None:
            call.args = (*call.args[:2], other, *rest)
            return True
    return False


@breaks(verify.rule_blocks_return_memory_of_their_own, "outlined", "returns memory of its operand operand_")
def block_returns_a_view_of_an_operand(seam: Seam) -> bool:
    for _, body in _blocks(seam):
        operand = next(n for n in body.graph.find_nodes(op="placeholder") if n.meta["val"].dim() == 2)
        results = body.graph.output_node().args[0]
        body.graph.output_node().args = ((_call(body, ATEN.permute.default, operand, [1, 0]), *results[1:]),)
        return True
    return False


@breaks(verify.rule_blocks_return_memory_of_their_own, "outlined", "returns one piece of memory twice")
def block_returns_a_result_twice(seam: Seam) -> bool:
    for _, body in _blocks(seam):
        results = body.graph.output_node().args[0]
        body.graph.output_node().args = ((results[0], results[0], *results[2:]),)
        return True
    return False


def _puts(seam: Seam) -> list[fx.Node]:
    """What writes a tile's part where it belongs, in one block."""
    for _, body in _blocks(seam):
        if puts := body.graph.find_nodes(op="call_function", target=PUT_PART):
            return puts
    return []


@breaks(verify.rule_parts_make_up_the_whole, "outlined", "parts of empty_strided.* leave places out or overlap")
def part_is_written_over_another(seam: Seam) -> bool:
    for put in _puts(seam)[-1:]:
        put.args = (*put.args[:3], 0)
        return True
    return False


@breaks(verify.rule_parts_make_up_the_whole, "outlined", "empty_strided.* is not filled by parts along one dimension")
def part_is_written_along_another_dimension(seam: Seam) -> bool:
    for put in _puts(seam)[-1:]:
        put.args = (*put.args[:2], 1, put.args[3])
        return True
    return False


@breaks(verify.rule_parts_make_up_the_whole, "outlined", "parts of empty_strided.* leave places out or overlap")
def part_is_not_written(seam: Seam) -> bool:
    for put in _puts(seam)[-1:]:
        put.graph.erase_node(put)
        return True
    return False


def _adds(seam: Seam) -> list[fx.Node]:
    """What adds a tile's part of a sum, in one block."""
    for _, body in _blocks(seam):
        if adds := body.graph.find_nodes(op="call_function", target=ADD_PART):
            return adds
    return []


@breaks(verify.rule_sums_are_complete_when_they_are_read, "outlined", "is read before all tiles are added to it")
def sum_is_read_too_early(seam: Seam) -> bool:
    for add in _adds(seam)[:1]:
        with add.graph.inserting_before(add):
            early = add.graph.call_function(ATEN.neg.default, (add.args[0],))
        early.meta = dict(add.args[0].meta)
        return True
    return False


@breaks(verify.rule_sums_are_complete_when_they_are_read, "outlined", "does not add to what a tile of its like gave")
def sum_begins_with_an_operand(seam: Seam) -> bool:
    for add in _adds(seam)[:1]:
        operand = next(iter(add.graph.find_nodes(op="placeholder")))
        add.args = (operand, add.args[1])
        return True
    return False


def _calls_with_parts(seam: Seam) -> list[tuple[fx.Node, list[int]]]:
    """Calls of blocks that take parts, and where among the arguments those of their first value stand."""
    found = []
    for call, body in _blocks(seam):
        tags = [node.meta.get(PART, (None,))[0] for node in body.graph.find_nodes(op="placeholder")]
        first = next((place for place in tags if place is not None), None)
        if first is not None:
            found.append((call, [2 + index for index, place in enumerate(tags) if place == first]))
    return found


@breaks(verify.rule_parts_are_handed_over_in_order, "outlined", "does not get the parts of one value in their order")
def parts_arrive_in_another_order(seam: Seam) -> bool:
    for call, (first, second, *_) in _calls_with_parts(seam):
        given = list(call.args)
        given[first], given[second] = given[second], given[first]
        call.args = tuple(given)
        return True
    return False


@breaks(verify.rule_parts_are_handed_over_in_order, "outlined", "does not get the parts of one value in their order")
def a_part_of_another_value_arrives(seam: Seam) -> bool:
    several = _calls_with_parts(seam)
    for (call, places), (other, others) in zip(several, several[1:], strict=False):
        mine = call.args[places[0]]
        if mine.meta["val"].shape == other.args[others[0]].meta["val"].shape:
            other.args = tuple(mine if index == others[0] else given for index, given in enumerate(other.args))
            return True
    return False


@breaks(verify.rule_parts_are_handed_over_in_order, "outlined", "does not join the parts of one value in their order")
def parts_are_joined_in_another_order(seam: Seam) -> bool:
    called = {call for call, _ in _blocks(seam)}
    for module in (seam.forward, seam.backward):
        for node in module.graph.find_nodes(op="call_function", target=ATEN.cat.default):
            first, second, *rest = node.args[0]
            if first.target is operator.getitem and first.args[0] in called:
                node.args = ([second, first, *rest],)
                return True
    return False
