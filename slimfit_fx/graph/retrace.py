"""Graphs with branches survive being pickled.

A graph module is pickled as its Python code, and unpickled by tracing that code again. ``cond`` refuses the proxies
that it then meets. Torch keeps the backward graph with every entry of its autograd cache, for compiled autograd: blocks
in it are unpickled together with the entry, so that an entry with a branch inside a block could never be read.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import fx


class BranchTracer(fx.Tracer):
    """Traces code in which branches are called."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As torch's own."""
        with mock.patch("torch._higher_order_ops.cond.validate_subgraph_args_types", lambda operands: None):
            return super().trace(root, concrete_args)


def survives_pickling(module: fx.GraphModule) -> None:
    """Let ``module`` be unpickled by a tracer that knows branches."""
    module._tracer_cls = BranchTracer
