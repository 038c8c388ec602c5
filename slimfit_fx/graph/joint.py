"""The joint graph as the planner and the passes see it: which input is which gate, which output is whose gradient.

Inputs and outputs are identified by the descriptors that AOTAutograd writes (``meta["desc"]``:
torch/_functorch/_aot_autograd/descriptors.py), never by their shape or position in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from slimfit_fx.graph import ops

STATIC = -1
"""Stands, in a set of gates, for a gradient that no gate can close."""


@dataclass(frozen=True)
class GateLayout:
    """Which flat inputs of one captured graph are the parameters of which gate. It names no layer.

    ``num_inputs`` counts the inputs of the user's graph; gate ``k`` is the input ``num_inputs + k``.
    ``params[k]`` are the indices, among the inputs, of the parameters that gate ``k`` freezes.
    """

    num_inputs: int
    params: tuple[tuple[int, ...], ...]

    def gate_at(self, index: int) -> int | None:
        """The gate that this flat input of the extended graph is, or None."""
        gate = index - self.num_inputs
        return gate if 0 <= gate < len(self.params) else None

    @property
    def gate_of_param(self) -> dict[int, int]:
        """Flat input -> the gate that freezes this parameter."""
        return {param: gate for gate, params in enumerate(self.params) for param in params}


@dataclass
class JointGraph:
    """One traced forward+backward graph.

    ``grads[j]`` is the gate of joint output ``num_fwd_outputs + j``, or STATIC; ``grads_of[j]`` names the input that
    it is the gradient of, if that is known.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    layout: GateLayout
    gates: dict[int, fx.Node] = field(default_factory=dict)
    grads: list[int] = field(default_factory=list)
    grads_of: list[str | None] = field(default_factory=list)
    param_inputs: frozenset[fx.Node] = frozenset()

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``module``."""
        return self.module.graph

    def outputs(self) -> list[fx.Node | None]:
        """The user's outputs, then the gradients."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def grad_nodes(self) -> list[fx.Node | None]:
        """The gradients; None for an input that has none."""
        return self.outputs()[self.num_fwd_outputs :]


def _input_index(desc: object) -> int | None:
    return getattr(desc, "idx", None) if type(desc).__name__ == "PlainAOTInput" else None


def read_joint(
    module: fx.GraphModule, num_fwd_outputs: int, layout: GateLayout, static_inputs: Iterable[int] = ()
) -> JointGraph:
    """Read gates, parameters and gradients of a joint graph from its descriptors. Changes nothing."""
    joint = JointGraph(module, num_fwd_outputs, layout)
    placeholders = module.graph.find_nodes(op="placeholder")
    statics = set(static_inputs)
    params = {i for group in layout.params for i in group} | statics
    param_inputs, names = set(), dict[int, str]()
    for node in placeholders:
        index = _input_index(node.meta.get("desc"))
        if index is None:
            continue
        names[index] = node.name
        if index >= layout.num_inputs:
            joint.gates[index - layout.num_inputs] = node
        elif index in params:
            param_inputs.add(node)
    joint.param_inputs = frozenset(param_inputs)
    descs = module.graph.output_node().meta.get("desc") or [None] * len(joint.outputs())
    gate_of_param = layout.gate_of_param
    for desc in list(descs)[num_fwd_outputs:]:
        index = _input_index(getattr(desc, "grad_of", None))
        joint.grads.append(STATIC if index is None else gate_of_param.get(index, STATIC))
        joint.grads_of.append(None if index is None else names.get(index))
    return joint


def backward_closure(joint: JointGraph) -> set[fx.Node]:
    """Every node that depends on a tangent: what can only run in backward."""
    closure: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            if type(node.meta.get("desc")).__name__ == "TangentAOTInput" or "tangents" in str(node.target):
                closure.add(node)
        elif node.op != "output" and any(i in closure for i in node.all_input_nodes):
            closure.add(node)
    return closure


def forward_needs(joint: JointGraph) -> set[fx.Node]:
    """Every node that the user's outputs (and in-place updates of inputs) depend on."""
    roots = [n for n in joint.outputs()[: joint.num_fwd_outputs] if isinstance(n, fx.Node)]
    closure = backward_closure(joint)
    roots += [n for n in joint.graph.nodes if n not in closure and n.op == "call_function" and not n.users]
    needed: set[fx.Node] = set()
    while roots:
        node = roots.pop()
        if node not in needed:
            needed.add(node)
            roots.extend(node.all_input_nodes)
    return needed


def nbytes(node: fx.Node) -> int:
    """Bytes of the node's value; a symbolic size counts with its hint. 0 for what is not a tensor."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return 0
    return hint(val.numel()) * val.element_size()


def hint(size: int | torch.SymInt) -> int:
    """A plain number for a size: its value, or the example it was traced with."""
    if isinstance(size, int):
        return size
    value = getattr(size.node, "hint", None)
    if value is None:
        try:
            value = size.node.shape_env.size_hint(size.node.expr)
        except Exception:  # an unbacked symbol has no hint: any guess only changes a price
            value = 4096
    return int(value)


_OF_A_DICT = re.compile(r"\.__dict__\['_modules'\]\['([^']*)'\]")
"""How dynamo spells a submodule of a class with a ``__getattr__`` of its own."""


def module_path(node: fx.Node) -> str:
    """Where in the model the value was made ("encoder.layer.0.output.dense"), for reports only."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = _OF_A_DICT.sub(r".\1", path)
    return path.replace("L['self'].", "").replace("L['self']", "").replace("L['fn'].", "")


__all__ = [
    "STATIC",
    "GateLayout",
    "JointGraph",
    "backward_closure",
    "forward_needs",
    "hint",
    "module_path",
    "nbytes",
    "ops",
    "read_joint",
]
