"""Write a plain tensor function into a graph: trace it once on fake tensors, copy its nodes with fresh metadata.

Used for codecs, whose ``encode`` and ``decode`` are ordinary functions of ATen operators. A trace is kept by the
caller's ``key``, so that twelve identical layers trace each codec once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._mode_utils import no_dispatch

from slimfit_fx.graph import ops


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph's example values live in."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise ValueError("the graph holds no fake tensor: it was not traced by AOTAutograd")


def run_fake(mode: FakeTensorMode, node: fx.Node) -> Any:
    """The example value of a call, computed from those of its arguments."""
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


class TemplateWriter:
    """Copies traced functions into one graph, in operators that the lowering knows (its ``decompositions``)."""

    def __init__(self, graph: fx.Graph, decompositions: dict[Any, Any]) -> None:
        self.graph, self.decompositions = graph, decompositions
        self.mode = fake_mode_of(graph)
        self._traces: dict[Hashable, fx.Graph] = {}

    def write(
        self, function: Callable[..., Any], operands: Sequence[fx.Node], *, key: Hashable, before: fx.Node
    ) -> list[fx.Node]:
        """Insert ``function(*operands)`` before a node; returns the nodes of its results."""
        trace = self._trace(function, operands, key)
        env: dict[fx.Node, Any] = dict(zip(trace.find_nodes(op="placeholder"), operands, strict=True))
        meta = {
            k: operands[0].meta[k]
            for k in ("nn_module_stack", "stack_trace", "partitioner_tag")
            if k in operands[0].meta
        }
        results: list[fx.Node] = []
        with self.graph.inserting_before(before):
            for node in trace.nodes:
                if node.op == "call_function":
                    env[node] = self.graph.call_function(
                        node.target, *fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                    )
                    env[node].meta = dict(meta)
                    env[node].meta["val"] = self._value_of(env[node], node)
                elif node.op == "output":
                    flat = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
                    results = [env[n] for n in flat]
        return results

    def _value_of(self, call: fx.Node, template: fx.Node) -> Any:
        """The example value of a call; ``template`` is the same call with operands of the same layout.

        Computed again only where it must be: for symbolic sizes, and for a view of what is no plain value.
        """
        traced = template.meta.get("val")
        if not isinstance(traced, FakeTensor) or traced._has_symbolic_sizes_strides:
            return run_fake(self.mode, call)
        if ops.is_view(call):
            view = _same_view(traced, _viewed(template), _viewed(call))
            return run_fake(self.mode, call) if view is None else FakeTensor(self.mode, view, traced.device)
        with no_dispatch():
            layout = torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype, device="meta")
        return FakeTensor(self.mode, layout, traced.device)

    def _trace(self, function: Callable[..., Any], operands: Sequence[fx.Node], key: Hashable) -> fx.Graph:
        full_key = (key, tuple(_signature(n.meta["val"]) for n in operands))
        if full_key not in self._traces:
            with self.mode, torch.no_grad():
                fakes = [
                    torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
                    for v in (n.meta["val"] for n in operands)
                ]
                traced = make_fx(function, decomposition_table=self.decompositions)(*fakes)
            traced.graph.eliminate_dead_code()
            self._traces[full_key] = traced.graph
        return self._traces[full_key]


def _viewed(node: fx.Node) -> FakeTensor | None:
    """The example value that a view is one of."""
    base = node.args[0] if node.args else None
    val = base.meta.get("val") if isinstance(base, fx.Node) else None
    return val if isinstance(val, FakeTensor) else None


def _same_view(traced: FakeTensor, like: FakeTensor | None, base: FakeTensor | None) -> torch.Tensor | None:
    """The view of ``base`` that ``traced`` is of ``like``, on the meta device; None if it is no such view."""
    if base is None or like is None or len({traced.dtype, like.dtype, base.dtype}) > 1:
        return None
    if traced.untyped_storage()._cdata != like.untyped_storage()._cdata:  # a reshape that had to copy
        return None
    offset = base.storage_offset() + traced.storage_offset() - like.storage_offset()
    with no_dispatch():
        return base.as_strided(traced.shape, traced.stride(), offset)


def _signature(val: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(map(str, val.shape)), tuple(map(str, val.stride())), val.dtype, str(val.device))
