"""Write a plain tensor function into a graph: trace it once on fake tensors, copy its nodes with fresh metadata.

Used for codecs, whose ``encode`` and ``decode`` are ordinary functions of ATen operators. A trace is kept by the
caller's ``key``, so that twelve identical layers trace each codec once. One of known sizes is kept for the graphs to
come as well: a search for a budget writes the same codecs for every plan that it tries.
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

_KEPT = 1024
"""Traces that are kept for other graphs. Each has a few dozen nodes."""


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
        """Those of symbolic sizes, which mean nothing in another graph."""

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
        values = [n.meta["val"] for n in operands]
        full_key = (key, tuple(_signature(val) for val in values))
        if any(val._has_symbolic_sizes_strides for val in values):
            if full_key not in self._traces:
                self._traces[full_key] = _traced(function, values, self.mode, self.decompositions)
            return self._traces[full_key]
        return _SHARED.trace(function, values, full_key, self.decompositions)


class _SharedTraces:
    """Traces of known sizes, in a fake mode of their own: none keeps a captured graph alive."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, tuple[fx.Graph, dict[Any, Any]]] = {}
        self._mode: FakeTensorMode | None = None

    def trace(
        self, function: Callable[..., Any], values: Sequence[torch.Tensor], key: Hashable, table: dict[Any, Any]
    ) -> fx.Graph:
        """The trace of ``function`` for operands of these layouts; ``key`` names it and them."""
        found = self._traces.get((key, id(table)))  # the entry holds the table: no other one gets its id
        if found is None:
            self._mode = self._mode or FakeTensorMode()
            if len(self._traces) >= _KEPT:
                self._traces.clear()
            found = self._traces[key, id(table)] = _traced(function, values, self._mode, table), table
        return found[0]


_SHARED = _SharedTraces()


def _traced(
    function: Callable[..., Any], values: Sequence[torch.Tensor], mode: FakeTensorMode, table: dict[Any, Any]
) -> fx.Graph:
    """What ``function`` does to operands of these layouts, as a graph whose example values are of ``mode``."""
    with mode, torch.no_grad():
        fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        traced = make_fx(function, decomposition_table=table)(*fakes)
    traced.graph.eliminate_dead_code()
    return traced.graph


def _viewed(node: fx.Node) -> FakeTensor | None:
    """The example value that a view is one of."""
    base = node.args[0] if node.args else None
    val = base.meta.get("val") if isinstance(base, fx.Node) else None
    return val if isinstance(val, FakeTensor) else None


def _same_view(traced: FakeTensor, like: FakeTensor | None, base: FakeTensor | None) -> torch.Tensor | None:
    """The view of ``base`` that ``traced`` is of ``like``, on the meta device; None if that must be found out."""
    if base is None or like is None or len({traced.dtype, like.dtype, base.dtype}) > 1:
        return None
    if base._has_symbolic_sizes_strides:
        return None
    if traced.untyped_storage()._cdata != like.untyped_storage()._cdata:  # a reshape that had to copy
        return None
    offset = base.storage_offset() + traced.storage_offset() - like.storage_offset()
    with no_dispatch():
        return base.as_strided(traced.shape, traced.stride(), offset)


def _signature(val: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(map(str, val.shape)), tuple(map(str, val.stride())), val.dtype, str(val.device))
