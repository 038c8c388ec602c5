"""From dynamo's graph to something that runs: through Inductor, or the interpreter with the very same passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from slimfit_fx.capture.buffer_reuse import can_correct_estimate, gradients_weigh_nothing
from slimfit_fx.capture.partitioner import GatedPartitioner

Compiled = Callable[..., Any]


def add_gate_inputs(gm: fx.GraphModule, count: int) -> fx.GraphModule:
    """A copy of dynamo's graph with ``count`` more inputs behind its own.

    Dynamo's graph itself is read again later: never edit it.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    for old, new in env.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    inputs = graph.find_nodes(op="placeholder")
    where = inputs[-1] if inputs else graph._root
    for index in range(count):
        with graph.inserting_after(where):
            where = graph.placeholder(f"slimfit_gate_{index}")
            where._dynamo_source = None
    extended = fx.GraphModule(gm, graph)
    extended.meta = dict(gm.meta)
    extended._param_name_to_source = getattr(gm, "_param_name_to_source", {})  # type: ignore[assignment]
    return extended


def lower_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], partitioner: GatedPartitioner) -> Compiled:
    """Compile through Inductor; its joint passes, random-number handling and caches stay in force."""
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {
        "custom_partitioner_fn": partitioner,
        # a branch makes a graph uncacheable unless it is vouched for: ours holds plain operators and no state
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.cond": torch.__version__},
    }
    if hasattr(inductor_config, "reorder_for_peak_memory"):
        # it takes a branch for the gradient it may return, and puts it off to the end, with all that the branch reads
        patches["reorder_for_peak_memory"] = False
    if not can_correct_estimate():
        patches["allow_buffer_reuse"] = False
    # with donated buffers Inductor would reuse the storage of a ghost
    with torch._functorch.config.patch(donated_buffer=False):
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=_compile_inner, config_patches=patches)
        return compiled


def _compile_inner(*args: Any, **kwargs: Any) -> Any:
    """Inductor's inner compile of one graph, forward or backward; a backward may be compiled long after its forward."""
    from torch._inductor.compile_fx import compile_fx_inner

    with gradients_weigh_nothing():
        return compile_fx_inner(*args, **kwargs)


def lower_with_interpreter(gm: fx.GraphModule, inputs: Sequence[Any], partitioner: GatedPartitioner) -> Compiled:
    """Run the rewritten graphs operator by operator: no C++ compiler, the same passes."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Compiled:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=partitioner,
        decompositions=select_decomp_table(),
    )
    with torch._functorch.config.patch(donated_buffer=False):
        return backend(gm, list(inputs))


def has_compiler(device: torch.device) -> str | None:
    """None if Inductor can generate code for ``device`` here, else what is missing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed or does not support this GPU"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # Inductor raises types of its own, which differ between versions
        return f"no C++ compiler: {error}"
    return None
