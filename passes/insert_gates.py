"""Put each cone behind its gate, and drop in forward what only closed cones would read.

::

    forward:  return loss, x                       return loss, gate, stash(x, [gate])
    backward: dW = mm(g.t(), x); return dx, dW ->  r = cond(gate, cone, ghost, (g, x)); dW = release(r, [g, x]); ...

``cond`` runs the cone when the gate is open and returns a ghost otherwise; ``stash`` returns x (a copy) or a ghost;
``release`` lets the operands go (runtime/hold.py says why).
Acts on a ``ConePlan`` only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import fx

import slimfit_fx.runtime.ghosts
import slimfit_fx.runtime.hold  # noqa: F401  (registers the operators)
from slimfit_fx.graph import ops
from slimfit_fx.graph.canonical import graph_text
from slimfit_fx.graph.symbols import missing_symbols
from slimfit_fx.passes.find_cones import CONE, Cone, ConePlan
from slimfit_fx.passes.saved import Seam

RELEASE = torch.ops.slimfit_fx.release.default
LAID_OUT = torch.ops.slimfit_fx.laid_out.default
GATE = "slimfit_gate"
GATES = "slimfit_gates"


def insert_gates(seam: Seam, plan: ConePlan, gate_inputs: Mapping[int, fx.Node], *, debug: bool) -> int:
    """Build the cones of ``plan``. Returns how many.

    ``gate_inputs`` are the gate placeholders of the forward graph, by gate.
    """
    if not plan.cones:
        return 0
    used = sorted({c.gate for c in plan.cones})
    here = {gate: gate_inputs[gate] for gate in used}
    there = dict(zip(used, seam.prepend([here[g] for g in used]), strict=True))
    for gate in used:
        here[gate].meta[GATE] = there[gate].meta[GATE] = gate
    _insert_stashes(seam, plan, here, debug)
    known: dict[str, str] = {}
    for cone in plan.cones:
        _insert_branch(seam.backward, cone, there[cone.gate], known, debug)
    seam.backward.graph.eliminate_dead_code()
    for graph_module in (seam.forward, seam.backward):
        graph_module.graph.lint()
        graph_module.recompile()
    return len(plan.cones)


def _insert_stashes(seam: Seam, plan: ConePlan, gates: Mapping[int, fx.Node], debug: bool) -> None:
    graph = seam.forward.graph
    alive_anyway = {ops.view_base(n) for n in seam.user_outputs()}
    for value, placeholder in seam.saved():
        if placeholder not in plan.stashes or value.op == "placeholder" or ops.view_base(value) in alive_anyway:
            continue
        if ops.view_base(value).op == "placeholder":
            continue
        wanted = sorted(plan.stashes[placeholder])
        with graph.inserting_before(graph.output_node()):
            kept = graph.call_function(torch.ops.slimfit_fx.stash.default, (value, [gates[g] for g in wanted], debug))
        kept.meta = {k: v for k, v in value.meta.items() if k not in ("desc",)}
        kept.meta[GATES] = frozenset(wanted)
        kept.meta["eager_input_vals"] = ((value.meta["val"], [gates[g].meta["val"] for g in wanted], debug), {})
        kept.meta["val"] = torch.ops.slimfit_fx.stash.default(value.meta["val"], [], debug)
        _move_after(graph, kept, [value, *(gates[g] for g in wanted)])
        (stored,) = seam.replace(value, placeholder, [kept])
        stored.meta[GATES] = frozenset(wanted)
        placeholder.replace_all_uses_with(stored)
        _replace_in_plan(plan, placeholder, stored)
        seam.backward.graph.erase_node(placeholder)


def _move_after(graph: fx.Graph, node: fx.Node, inputs: list[fx.Node]) -> None:
    """Place ``node`` right behind the last of its inputs, so that what it copies can be freed early."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    last = max(inputs, key=lambda n: position[n])
    if last.op == "placeholder":
        last = graph.find_nodes(op="placeholder")[-1]
    last.append(node)


def _replace_in_plan(plan: ConePlan, old: fx.Node, new: fx.Node) -> None:
    for cone in plan.cones:
        cone.operands = [new if n is old else n for n in cone.operands]


def _insert_branch(backward: fx.GraphModule, cone: Cone, gate: fx.Node, known: dict[str, str], debug: bool) -> None:
    graph, val = backward.graph, cone.root.meta["val"]
    operands = [_laid_out(graph, n) for n in cone.operands]
    operands += missing_symbols(graph, operands, operands)[0]
    open_graph = _open_branch(cone, operands)
    closed_graph = _closed_branch(val, operands, debug)
    names = [
        _branch_module(backward, known, branch, f"cone_{cone.output}_{side}")
        for side, branch in (("open", open_graph), ("closed", closed_graph))
    ]
    with graph.inserting_before(_earliest(graph, [gate, *operands])):
        branches = [graph.get_attr(name) for name in names]
        call = graph.call_function(torch.ops.higher_order.cond, (gate, *branches, tuple(operands)))
        call.meta = {"val": (val,), CONE: cone.gate}
        result = graph.call_function(operator.getitem, (call, 0))
        result.meta = {"val": val}
        grad = graph.call_function(RELEASE, (result, [n for n in operands if ops.is_tensor(n)]))
        grad.meta = {**cone.root.meta, "val": val, CONE: cone.gate}
    output = graph.output_node()
    results = cast("Sequence[fx.Node | None]", output.args[0])
    output.args = (tuple(grad if n is cone.root else n for n in results),)


def _branch_module(backward: fx.GraphModule, known: dict[str, str], branch: fx.Graph, name: str) -> str:
    """The name of a module that does what ``branch`` does: branches that are alike are compiled once."""
    text = f"{name.rsplit('_', 1)[1]} {graph_text(branch.nodes)}"
    if text not in known:
        backward.add_submodule(name, fx.GraphModule({}, branch))
        known[text] = name
    return known[text]


def _earliest(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Node:
    """The first node before which all ``inputs`` are known: an early branch frees its operands early."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    last = max(inputs, key=lambda n: position[n])
    following = last.next
    while following.op == "placeholder":
        following = following.next
    return following


def _laid_out(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """The operand in its traced strides: what a pointwise kernel writes may be laid out otherwise by the compiler."""
    if not ops.is_tensor(operand) or not ops.is_cheap(ops.view_base(operand)):
        return operand
    known = [u for u in operand.users if u.target is LAID_OUT]
    if known:
        return known[0]
    with graph.inserting_after(operand):
        pinned = graph.call_function(LAID_OUT, (operand,))
    pinned.meta = {"val": operand.meta["val"], "eager_input_vals": ((operand.meta["val"],), {})}
    return pinned


def _open_branch(cone: Cone, operands: list[fx.Node]) -> fx.Graph:
    graph, env = fx.Graph(), {}
    for operand in operands:
        env[operand] = graph.placeholder(operand.name)
        env[operand].meta = dict(operand.meta)
        if operand.target is LAID_OUT:
            env[cast(fx.Node, operand.args[0])] = env[operand]
    for node in cone.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output((env[cone.root],))
    return graph


def _closed_branch(val: torch.Tensor, operands: list[fx.Node], debug: bool) -> fx.Graph:
    graph = fx.Graph()
    for operand in operands:
        graph.placeholder(operand.name).meta = dict(operand.meta)
    ghost = graph.call_function(
        torch.ops.slimfit_fx.ghost.default, (list(val.shape), list(val.stride()), val.dtype, val.device, debug)
    )
    ghost.meta["val"] = val
    graph.output((ghost,))
    return graph
