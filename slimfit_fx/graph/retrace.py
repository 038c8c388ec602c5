"""Graphs with branches survive being pickled.

A graph module is pickled as its Python code, and unpickled by tracing that code again. Torch keeps the backward graph
with every entry of its autograd cache, for compiled autograd: blocks and branches in it are unpickled together with
the entry, and held as long as the compiled graph. Torch's own tracer has two shortcomings there:

* ``cond`` and ``invoke_subgraph`` refuse the proxies that they meet, so that an entry with a branch or a tile inside a
  block could never be read;
* an operator that takes no tensor (the zeros that an embedding's gradient is added to) runs while it is traced, and its
  result becomes a constant of the module: memory that a warm start holds and a cold one does not.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

INVOKE = torch.ops.higher_order.invoke_subgraph


class BranchTracer(fx.Tracer):
    """Traces code in which branches are called and tensors are made, and runs none of it."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As torch's own."""
        self._makers = _Makers()
        with (
            mock.patch("torch._higher_order_ops.cond.validate_subgraph_args_types", lambda operands: None),
            mock.patch.object(type(INVOKE), "__call__", HigherOrderOperator.__call__),
            FakeTensorMode(allow_non_fake_inputs=True),
            self._makers,
        ):
            return super().trace(root, concrete_args)

    def create_arg(self, a: Any) -> Any:
        """As torch's own; a tensor that the code made is the result of the call that made it, not a constant."""
        made = self._makers.made.get(id(a)) if isinstance(a, torch.Tensor) else None
        if made is None:
            return super().create_arg(a)
        if made.call.node is None:
            call = made.call
            call.node = self.create_proxy("call_function", call.target, call.args, call.kwargs).node
        if made.place is None:
            return made.call.node
        return self.create_node("call_function", operator.getitem, (made.call.node, made.place), {})


@dataclass
class _Call:
    """A call that was made while tracing, and its node once there is one."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node | None = None


@dataclass
class _Made:
    """A tensor (kept, so that nothing else takes its id), the call that made it, and its place among the results."""

    tensor: torch.Tensor
    call: _Call
    place: int | None


class _Makers(TorchDispatchMode):
    """Remembers which call made a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results, call = func(*args, **(kwargs or {})), _Call(func, args, dict(kwargs or {}))
        several = isinstance(results, (tuple, list))
        for place, result in enumerate(results if several else [results]):
            if isinstance(result, torch.Tensor):
                self.made[id(result)] = _Made(result, call, place if several else None)
        return results


def survives_pickling(module: fx.GraphModule) -> None:
    """Let ``module`` be unpickled by a tracer that knows branches and runs nothing."""
    module._tracer_cls = module.graph._tracer_cls = BranchTracer  # the graph's is what copies of the module take over
