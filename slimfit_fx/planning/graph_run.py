"""Walk through an fx graph without computing anything, as the interpreter route runs it: node by node.

A value is given back behind its last reader, in the order in which fx's own generated Python does that
(torch/fx/graph.py, ``CodeGen._gen_python_code``). Branches on gates are all taken; what happens inside of one is marked
as its gate's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slimfit_fx.planning.blocks import TensorSpec, spec_of
from slimfit_fx.planning.stand_ins import DryRun, StandIn

_COND = torch.ops.higher_order.cond
_SUBGRAPH = torch.ops.higher_order.invoke_subgraph


@dataclass(frozen=True)
class GraphCode:
    """One graph as the interpreter runs it. ``boxed``: it gives its inputs back when it has read them last."""

    module: fx.GraphModule
    inputs: tuple[TensorSpec | int | None, ...]
    """None for what is neither a tensor nor a number."""
    names: tuple[str, ...]
    """Names of the inputs."""
    written_back: int
    """How many of the first results are only copied into inputs that the user's code changes in place."""
    boxed: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """What the inputs are called in reports."""
        return self.names

    @classmethod
    def of(cls, module: fx.GraphModule, inputs: Sequence[Any], *, boxed: bool) -> GraphCode:
        """The code of ``module``, compiled for these example inputs."""
        specs = tuple(map(spec_of, inputs))
        return cls(module, specs, input_names(module.graph), written_back(module.graph), boxed)

    def load(self, run: DryRun) -> Callable[[list[Any]], Sequence[Any]]:
        """The graph as a function of a list of stand-ins, which it empties if it is boxed."""

        def call(arguments: list[Any]) -> Sequence[Any]:
            inputs = list(arguments)
            if self.boxed:
                arguments.clear()
            return run_graph(self.module, inputs, run)

        return call


def input_names(graph: fx.Graph) -> tuple[str, ...]:
    """Names of the inputs of ``graph``."""
    return tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))


def written_back(graph: fx.Graph) -> int:
    """How many of the first results are new values of inputs (torch/_functorch/_aot_autograd/descriptors.py)."""
    outputs = graph.find_nodes(op="output")
    descriptors = outputs[0].meta.get("desc") if outputs else None
    return sum(type(d).__name__ == "InputMutationAOTOutput" for d in descriptors or ())


def run_graph(module: fx.GraphModule, inputs: list[Any], run: DryRun) -> Sequence[Any]:
    """The results of ``module`` on ``inputs`` (stand-ins and numbers), which is emptied."""
    env: dict[fx.Node, Any] = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    inputs.clear()
    last_reads = _last_reads(module.graph)
    for node in module.graph.nodes:
        if node.op == "output":
            break
        if node.op != "placeholder":
            env[node] = _value(node, module, env, run)
        for done in last_reads.get(node, ()):
            del env[done]
    results: Any = module.graph.output_node().args[0]
    return fx.node.map_arg(results, lambda n: env[n])


def _value(node: fx.Node, module: fx.GraphModule, env: dict[fx.Node, Any], run: DryRun) -> Any:
    if node.op == "get_attr":
        attribute = operator.attrgetter(str(node.target))(module)
        return run.adopt(attribute)
    if node.op != "call_function":
        raise NotImplementedError(f"a dry run cannot follow a node of kind {node.op!r} ({node.name})")
    target: Any = node.target
    written: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(written, lambda n: env[n])
    if target is _COND:
        return _branch(run, *args)
    if target is _SUBGRAPH:
        return run_graph(args[0], list(args[2:]), run)
    if target is operator.getitem or not isinstance(target, torch._ops.OpOverload):
        return target(*args, **kwargs)
    if target in _SIZES:
        return _SIZES[target](*args)
    return run.call_operator(target, args, kwargs)


def _branch(run: DryRun, gate: StandIn, taken: fx.GraphModule, _: fx.GraphModule, operands: Sequence[Any]) -> Any:
    gate.item()
    return run.inside_branch(lambda: run_graph(taken, list(operands), run))()


_SIZES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sym_size.int: lambda x, dim: x.shape[dim],
    torch.ops.aten.sym_stride.int: lambda x, dim: x.strides[dim],
    torch.ops.aten.sym_numel.default: lambda x: torch.Size(x.shape).numel(),
}


def _last_reads(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node what nobody reads behind it, itself included if nobody reads it at all."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}

    def note(node: fx.Node, reader: fx.Node) -> None:
        if node not in seen:
            seen.add(node)
            found.setdefault(reader, []).append(node)

    for reader in reversed(graph.nodes):
        for node in reader._input_nodes:
            note(node, reader)
        if reader.op not in ("placeholder", "output") and not reader.users:
            note(reader, reader)
    return found
