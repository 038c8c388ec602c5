"""Put each cone behind its gate, and drop in forward what only closed cones would read.

::

    forward:  return loss, x                       return loss, gate, stash(x, [gate])
    backward: dW = mm(g.t(), x); return dx, dW ->  r = cond(gate, cone, ghost, (g, x)); dW = release(r, [g, x]); ...

``cond`` runs the cone when the gate is open and returns a ghost otherwise; ``stash`` returns x (a copy) or a ghost;
``release`` lets the operands go (runtime/hold.py says why). A cone on the OR of several gates is switched by
``any_open``; what it returns is read inside of cones on some of these gates.
Acts on a ``ConePlan`` only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

import slimfit_fx.runtime.ghosts
import slimfit_fx.runtime.hold  # noqa: F401  (registers the operators)
from slimfit_fx.graph import ops
from slimfit_fx.graph.canonical import graph_text
from slimfit_fx.graph.retrace import survives_pickling
from slimfit_fx.graph.symbols import missing_symbols
from slimfit_fx.passes.find_cones import CONE, Cone, ConePlan
from slimfit_fx.passes.saved import Seam

ANY_OPEN = torch.ops.slimfit_fx.any_open.default
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
    used = sorted(frozenset().union(*(c.gates for c in plan.cones)))
    here = {gate: gate_inputs[gate] for gate in used}
    there = dict(zip(used, seam.prepend([here[g] for g in used]), strict=True))
    for gate in used:
        here[gate].meta[GATE] = there[gate].meta[GATE] = gate
    _insert_stashes(seam, plan, here, debug)
    builder = _Builder(seam.backward, there, debug)
    for cone in plan.cones:
        builder.insert(cone)
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


class _Builder:
    """Puts branches into ``backward``, one by one, each behind those that it reads. ``gates``: its gate inputs."""

    def __init__(self, backward: fx.GraphModule, gates: Mapping[int, fx.Node], debug: bool) -> None:
        self.backward, self.graph, self._debug = backward, backward.graph, debug
        self._switches = {frozenset([gate]): node for gate, node in gates.items()}
        self._gates = gates
        self._modules: dict[str, str] = {}
        self._shared: dict[fx.Node, fx.Node] = {}
        """What stands for a value that several cones read."""

    def insert(self, cone: Cone) -> None:
        """One branch, and what it returns in place of the results of ``cone``."""
        graph, vals = self.graph, tuple(n.meta["val"] for n in cone.results)
        given = {n: self._shared.get(n) or _laid_out(graph, n) for n in cone.operands}
        given |= {n: n for n in missing_symbols(graph, list(given.values()), list(given.values()))[0]}
        operands = list(given.values())
        place = f"shared{len(self._shared)}" if cone.output is None else cone.output
        names = [
            self._module(branch, f"cone_{place}_{side}")
            for side, branch in (
                ("open", _open_branch(cone, given)),
                ("closed", _closed_branch(vals, operands, self._debug)),
            )
        ]
        switch = self._switch(cone.gates)
        with graph.inserting_before(_earliest(graph, [switch, *operands])):
            branches = [graph.get_attr(name) for name in names]
            call = graph.call_function(torch.ops.higher_order.cond, (switch, *branches, tuple(operands)))
            call.meta = {"val": vals, CONE: cone.gates}
            made = [graph.call_function(operator.getitem, (call, index)) for index in range(len(vals))]
            tensors = [n for n in operands if ops.is_tensor(n)]
            released = [graph.call_function(RELEASE, (result, tensors)) for result in made]
        for result, behind, root in zip(made, released, cone.results, strict=True):
            result.meta = {"val": root.meta["val"]}
            behind.meta = {**root.meta, CONE: cone.gates}
        instead = dict(zip(cone.results, released, strict=True))
        if cone.output is None:
            self._shared |= instead
            return
        output = graph.output_node()
        results = cast("Sequence[fx.Node | None]", output.args[0])
        output.args = (tuple(n if n is None else instead.get(n, n) for n in results),)

    def _switch(self, gates: frozenset[int]) -> fx.Node:
        """What says whether one of ``gates`` is open."""
        if gates not in self._switches:
            inputs = [self._gates[gate] for gate in sorted(gates)]
            with self.graph.inserting_before(_earliest(self.graph, inputs)):
                switch = self.graph.call_function(ANY_OPEN, (inputs,))
            switch.meta = {"val": inputs[0].meta["val"], GATES: gates}
            self._switches[gates] = switch
        return self._switches[gates]

    def _module(self, branch: fx.Graph, name: str) -> str:
        """The name of a module that does what ``branch`` does: branches that are alike are compiled once."""
        text = f"{name.rsplit('_', 1)[1]} {graph_text(branch.nodes)}"
        if text not in self._modules:
            module = _LazyGraphModule({}, branch)  # most never run as Python
            survives_pickling(module)
            self.backward.add_submodule(name, module)
            self._modules[text] = name
        return self._modules[text]


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


def _open_branch(cone: Cone, given: Mapping[fx.Node, fx.Node]) -> fx.Graph:
    """What ``cone`` does, on inputs that stand for the nodes in ``given``, in their order."""
    graph, env = fx.Graph(), {}
    for node, operand in given.items():
        env[node] = graph.placeholder(operand.name)
        env[node].meta = dict(operand.meta)
    for node in cone.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[n] for n in cone.results))
    return graph


def _closed_branch(vals: Sequence[torch.Tensor], operands: list[fx.Node], debug: bool) -> fx.Graph:
    graph = fx.Graph()
    for operand in operands:
        graph.placeholder(operand.name).meta = dict(operand.meta)
    ghosts = []
    for val in vals:
        described = (list(val.shape), list(val.stride()), val.dtype, val.device, debug)
        ghosts.append(graph.call_function(torch.ops.slimfit_fx.ghost.default, described))
        ghosts[-1].meta["val"] = val
    graph.output(tuple(ghosts))
    return graph
