"""From dynamo's graph to something that runs: through Inductor, or the interpreter with the very same passes."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

from slimfit_fx.capture.buffer_reuse import can_correct_estimate, gradients_weigh_nothing
from slimfit_fx.capture.call_stack import with_room
from slimfit_fx.capture.fallbacks import register_fallbacks
from slimfit_fx.capture.launches import kernels_started_directly
from slimfit_fx.capture.operands import checked_when_written
from slimfit_fx.capture.partitioner import GatedPartitioner
from slimfit_fx.graph.joint import module_path
from slimfit_fx.passes.insert_codecs import ENCODED
from slimfit_fx.planning.dry_run import GeneratedCode, StepCode
from slimfit_fx.planning.graph_run import GraphCode
from slimfit_fx.planning.labels import LABEL, saved_label
from slimfit_fx.planning.store import save_codes

_BOXED = getattr(fx.graph, "_BoxedCodeGen", None)
"""Generated Python that takes a list of inputs and empties it, so that each is freed behind its last reader."""

Compiled = Callable[..., Any]

_NO_FX_CACHE: dict[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
_NO_CACHE: dict[str, Any] = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
"""Of Inductor and of AOTAutograd, where code is written but not kept."""


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


def lower_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    partitioner: GatedPartitioner,
    codes: list[StepCode],
    *,
    dry: bool = False,
    key: str = "",
) -> Compiled:
    """Compile through Inductor; its joint passes, random-number handling and caches stay in force.

    ``codes`` receives what Inductor writes: forward, then backward (often not before it runs first; never, if the graph
    comes from AOTAutograd's cache, for which both are kept under ``key``). ``dry``: write the code but load and compile
    none of it; the result cannot be called.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {
        "custom_partitioner_fn": partitioner,
        # branches and blocks make a graph uncacheable unless vouched for: ours hold plain operators and no state
        "unsafe_marked_cacheable_functions": {
            "torch.ops.higher_order.cond": torch.__version__,
            "torch.ops.higher_order.invoke_subgraph": torch.__version__,
        },
        # a block's results would be padded inside of it, while its callers take them to be dense (and it costs memory)
        "comprehensive_padding": False,
    }
    if hasattr(inductor_config, "reorder_for_peak_memory"):
        # it takes a branch for the gradient it may return, and puts it off to the end, with all that the branch reads
        patches["reorder_for_peak_memory"] = False
    if not can_correct_estimate():
        patches["allow_buffer_reuse"] = False
    functorch: dict[str, Any] = {"donated_buffer": False}  # Inductor would reuse the storage of a ghost
    if dry:
        patches |= _NO_FX_CACHE
        functorch |= _NO_CACHE
    register_fallbacks()
    with torch._functorch.config.patch(functorch):
        inner = _inner_compile(codes, dry, key)
        with kernels_started_directly():  # those of a graph that is in the cache are loaded here
            compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner, config_patches=patches)
        return compiled


def _inner_compile(codes: list[StepCode], dry: bool, key: str) -> Callable[..., Any]:
    """Inductor's inner compile of one graph, forward or backward; a backward may be compiled long after its forward."""

    @with_room  # a backward's caller is not our backend
    def compile_inner(module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        graph = copy_ends(module.graph)
        loads = nothing_loaded() if dry else contextlib.nullcontext()
        with gradients_weigh_nothing(), checked_when_written(), kernels_started_directly(), loads:
            compiled = compile_fx_inner(module, example_inputs, **kwargs)
        source = getattr(compiled, "source_code", None)
        if source:
            codes.append(GeneratedCode.of(source, graph, example_inputs))
            if key and not dry and len(codes) == 2:
                save_codes(key, codes)
        return compiled

    return compile_inner


def copy_ends(graph: fx.Graph) -> fx.Graph:
    """A graph with the inputs of ``graph``, their labels and what is said of its outputs.

    The compiler changes the graph that it is given.
    """
    copied = fx.Graph()
    for node in graph.find_nodes(op="placeholder"):
        encoded = node.meta.get(ENCODED)
        name = str(node.target) if encoded is None else encoded[0]
        label = saved_label(name, module_path(node), encoded=encoded is not None)
        copied.placeholder(str(node.target)).meta[LABEL] = label
    copied.output(()).meta["desc"] = graph.output_node().meta.get("desc")
    return copied


def write_plain_code(gm: fx.GraphModule, inputs: Sequence[Any], codes: list[GeneratedCode]) -> None:
    """Let Inductor write the code of ``gm`` as plain ``torch.compile`` would; none of it is compiled."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_inner(module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        graph = copy_ends(module.graph)
        with nothing_loaded():
            compiled: Any = compile_fx_inner(module, example_inputs, **kwargs)
        codes.append(GeneratedCode.of(compiled.source_code, graph, example_inputs))
        return compiled

    with torch._functorch.config.patch(_NO_CACHE):
        compile_fx(add_gate_inputs(gm, 0), list(inputs), inner_compile=compile_inner, config_patches=_NO_FX_CACHE)


@contextlib.contextmanager
def nothing_loaded() -> Iterator[None]:
    """Inductor writes its code, but neither loads it nor compiles its kernels.

    Those for a CPU are written without vectors, in a fifth of the time: what is allocated around them is the same. Nor
    is the compiler asked which vectors it knows, which takes another process.
    """
    from torch._inductor import cpu_vec_isa
    from torch._inductor.codecache import PyCodeCache

    def unloaded(key: str, path: str, *_: Any, **__: Any) -> types.ModuleType:
        module = types.ModuleType("slimfit_fx_unloaded")
        module.__file__, module.call = path, _never  # type: ignore[attr-defined]
        return module

    with (
        mock.patch.object(PyCodeCache, "load_by_key_path", unloaded),
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", list),
    ):
        yield


def _never(*_: Any) -> Any:
    raise RuntimeError("this graph was compiled for its memory plan only")


def lower_with_interpreter(
    gm: fx.GraphModule, inputs: Sequence[Any], partitioner: GatedPartitioner, codes: list[StepCode]
) -> Compiled:
    """Run the rewritten graphs operator by operator: no C++ compiler, the same passes.

    ``codes`` receives the graphs that are run: forward, then backward.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def compiler(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        use_native_casts(graph)
        codes.append(GraphCode.of(graph, example_inputs, boxed=_BOXED is not None))
        if _BOXED is None:
            return make_boxed_func(graph.forward)
        graph.graph.set_codegen(_BOXED())
        graph.recompile()
        return make_boxed(with_room(graph.forward))

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=partitioner,
        decompositions=decompositions(),
    )
    with torch._functorch.config.patch(donated_buffer=False):
        return backend(gm, list(inputs))


def lower_plain(gm: fx.GraphModule, inputs: Sequence[Any], executor: str) -> Compiled:
    """Run a graph without gradients as ``torch.compile`` would, with the decompositions that all other graphs get.

    Layer norm, say, is not the same to the last bit with and without them.
    """
    if executor == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, list(inputs))  # type: ignore[return-value]
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Compiled:
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, decompositions=decompositions())(gm, list(inputs))


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's. Some of them (max_pool2d's) name ``torch._inductor.lowering`` without importing it."""
    import torch._inductor.lowering  # noqa: F401
    from torch._inductor.decomposition import select_decomp_table

    found: dict[Any, Callable[..., Any]] = select_decomp_table()
    return found


def use_native_casts(module: fx.GraphModule) -> int:
    """Replace casts by the operator of torch that does the same; Inductor's decompositions brought them.

    ::

        prims.convert_element_type(x, dtype)   ->   aten._to_copy(x, dtype=dtype)

    The former is written in Python down to the copy: a quarter of the time of a step of a small model. Modules inside
    of ``module`` (branches, blocks) are changed, too. Returns how many were replaced.
    """
    count = 0
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        casts = part.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
        for node in casts:
            value, dtype = node.args
            node.target, node.args, node.kwargs = torch.ops.aten._to_copy.default, (value,), {"dtype": dtype}
        if casts:
            part.recompile()
        count += len(casts)
    return count


def make_boxed(function: Compiled) -> Compiled:
    """Mark ``function`` as one that takes a list and may empty it, as AOTAutograd wants to know."""

    def boxed(arguments: list[Any]) -> Any:
        return function(arguments)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


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
