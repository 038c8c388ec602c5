"""Run Inductor's generated code without computing anything: the same calls, on stand-ins that count bytes.

Inductor writes a Python function that allocates buffers, calls kernels and deletes names. Here that very function runs,
with kernels that do nothing, on ``StandIn`` tensors (stand_ins.py). A block is counted when it is made and given back
when Python drops its last reference, just as a tensor's memory is. So every allocation, reuse, alias and release of the
compiled step is seen in its order, for any pattern of gates, before a byte is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.blocks import Meter, TensorSpec, contiguous_strides, is_dense, spec_of
from slimfit_fx.planning.caching_allocator import ROUND, hands_out_more
from slimfit_fx.planning.graph_run import GraphCode, input_names, written_back
from slimfit_fx.planning.labels import GRADIENT, LABEL
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.sizes import Symbolic, SymbolicTensor, describe_inputs, read_symbols, value_at
from slimfit_fx.planning.stand_ins import DryRun, StandIn

Wrapper = Callable[[list[Any]], Sequence[Any]]
_FREES_TANGENTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether AOTAutograd lets go of gradients from outside while backward runs. That of a loss is held by the caller."""
_LAST_GRADIENT_FIRST = _FREES_TANGENTS
"""Whether what holds the gradients last when they are dropped is a tuple of Python's, which begins at its end."""
_OPEN_BRANCH = re.compile(r"(?:^|_)cone_\w*_open$")


@dataclass(frozen=True)
class GeneratedCode:
    """One graph as Inductor wrote it."""

    source: str
    inputs: tuple[TensorSpec | int | None, ...]
    """None for what is neither a tensor nor a number."""
    names: tuple[str, ...]
    """Names of the inputs, as the graph has them."""
    written_back: int
    """How many of the first results are only copied into inputs that the user's code changes in place."""
    labels: tuple[str, ...] = ()
    """What the inputs are called in reports."""
    symbolic: tuple[Symbolic, ...] | None = None
    """The inputs with symbols for sizes, where some size is one."""

    @classmethod
    def of(cls, source: str, graph: fx.Graph, inputs: Sequence[Any]) -> GeneratedCode:
        """The code of ``graph``, compiled for these example inputs."""
        labels = tuple(n.meta.get(LABEL, str(n.target)) for n in graph.find_nodes(op="placeholder"))
        specs, described = tuple(map(spec_of, inputs)), describe_inputs(inputs)
        return cls(source, specs, input_names(graph), written_back(graph), labels, described)

    def at(self, values: Mapping[Any, int]) -> GeneratedCode:
        """The same code, called with inputs of other sizes: ``values`` says what the symbols stand for.

        Raises:
            LookupError: a symbol is missing.
        """
        if self.symbolic is None:
            return self
        return dataclasses.replace(self, inputs=tuple(_spec_at(x, values) for x in self.symbolic))

    def to_dict(self) -> dict[str, Any]:
        """As plain values; sizes are those of the example inputs."""
        inputs = [x.to_dict() if isinstance(x, TensorSpec) else x for x in self.inputs]
        return {
            "source": self.source,
            "inputs": inputs,
            "names": self.names,
            "written_back": self.written_back,
            "labels": self.labels,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> GeneratedCode:
        """The code that ``to_dict`` wrote, also if it has been through JSON."""
        inputs = tuple(TensorSpec.from_dict(x) if isinstance(x, dict) else x for x in stored["inputs"])
        names, labels = tuple(stored["names"]), tuple(stored["labels"])
        return cls(stored["source"], inputs, names, stored["written_back"], labels)

    def load(self, run: DryRun) -> Wrapper:
        """The code as a function of a list of stand-ins, which it empties."""
        return load_wrapper(self.source, run)


StepCode = GeneratedCode | GraphCode


def _spec_at(value: Symbolic, values: Mapping[Any, int]) -> TensorSpec | int | None:
    if isinstance(value, SymbolicTensor):
        shape, strides = (tuple(value_at(s, values) for s in sizes) for sizes in (value.shape, value.strides))
        return TensorSpec(shape, strides, value.dtype, value.device)
    return None if value is None else value_at(value, values)


def codes_at(codes: Sequence[GeneratedCode], arguments: Sequence[Any]) -> list[GeneratedCode]:
    """The codes of forward and backward as a call of the graph with ``arguments`` would run them.

    Raises:
        LookupError: a size depends on more than the arguments.
    """
    values = read_symbols(codes[0].symbolic or (), arguments)
    return [code.at(values) for code in codes]


def num_tangents(code: StepCode) -> int:
    """How many of the last inputs are gradients that arrive from outside."""
    return sum(name.startswith("tangents") for name in code.names)


def _num_generators(code: StepCode) -> int:
    """How many states of random generators arrive behind the tangents: a GPU's, to draw once more what forward drew."""
    return sum(name.startswith("bwd_rng_state") for name in code.names)


def trace_step(
    forward: StepCode, backward: StepCode, layout: GateLayout, *, passed_on: frozenset[int] = frozenset()
) -> StepTrace:
    """All memory events of a compiled forward and backward, every gate open.

    What the user is given is held to the end, as if he kept it. ``passed_on``: the inputs that another graph computed;
    their gradients go on to that graph, where they are counted.

    Raises:
        NotImplementedError: the generated code does what a dry run cannot follow.
    """
    on_gpu = any(isinstance(x, TensorSpec) and x.device.type == "cuda" for x in forward.inputs)
    meter = Meter(round_to=ROUND if on_gpu else 1)
    run = DryRun(meter)
    inputs = [run.input(x, gate=layout.gate_at(i)) for i, x in enumerate(forward.inputs)]
    results = list(forward.load(run)(inputs))
    num_saved = len(backward.inputs) - num_tangents(backward) - _num_generators(backward)
    saved = results[len(results) - num_saved :]
    kept = results[forward.written_back : len(results) - num_saved]
    del results, inputs
    boundary = len(meter.events)
    late = [run.tangent(x, "gradient of an output") for x in backward.inputs[num_saved:]]
    arguments = [*_as_backward_takes_them(saved, backward.labels or backward.names, meter), *late]
    held = [x for x in late if not _FREES_TANGENTS or (isinstance(x, StandIn) and not x.shape)]
    saved.clear()
    late.clear()
    grads = list(backward.load(run)(arguments))
    arguments.clear()
    if len(grads) == len(forward.inputs):
        _drop_closed(grads, layout, meter)
    held.clear()
    grads = [None if i in passed_on else grad for i, grad in enumerate(grads)]
    if len(grads) == len(forward.inputs):
        _accumulate(grads, forward.inputs, run)
    for grad in grads:
        if isinstance(grad, StandIn) and grad.block is not None:
            meter.labels[grad.block.number] = GRADIENT
    gate_bytes = _gate_bytes(forward.inputs, layout)
    trace = StepTrace(
        tuple(meter.events),
        boundary,
        dict(meter.labels),
        len(layout.params),
        tuple(meter.work),
        gate_bytes,
        caching=on_gpu and hands_out_more(),
    )
    del grads, kept
    return trace


def _gate_bytes(inputs: Sequence[Any], layout: GateLayout) -> tuple[int, ...]:
    """Bytes of the gradients of each gate's parameters; empty if some are no plain tensors."""
    specs = [[inputs[i] for i in params] for params in layout.params]
    if not all(isinstance(spec, TensorSpec) for of_gate in specs for spec in of_gate):
        return ()
    return tuple(sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in of_gate) for of_gate in specs)


def _as_backward_takes_them(saved: Sequence[Any], names: Sequence[str], meter: Meter) -> list[Any]:
    """The saved values in backward's order: symbols first (torch/_functorch/partitioners.py); blocks get its names."""
    symbols, tensors = [s for s in saved if not isinstance(s, StandIn)], [s for s in saved if isinstance(s, StandIn)]
    for tensor, name in zip(tensors, names[len(symbols) :], strict=False):
        if tensor.block is not None:
            meter.labels[tensor.block.number] = name
    return [*symbols, *tensors]


def _drop_closed(grads: Sequence[Any], layout: GateLayout, meter: Meter) -> None:
    """Gradients that are computed whether or not their gate is open are dropped behind backward if it is closed.

    In the order in which the engine lets go of what holds them (runtime/grad_gate.py).
    """
    blocks = [grad.block if isinstance(grad, StandIn) else None for grad in grads]
    gates = layout.gate_of_param
    dropped = [(gate, blocks[param]) for gate, params in enumerate(layout.params) for param in params]
    for gate, block in reversed(dropped) if _LAST_GRADIENT_FIRST else dropped:
        readers = {gates.get(i) for i, other in enumerate(blocks) if other is block}
        if block is not None and not block.owners and readers == {gate}:
            meter.release_unless_open(block, gate)


def _accumulate(grads: list[Any], inputs: Sequence[TensorSpec | int | None], run: DryRun) -> None:
    """What autograd does with the gradients: it takes those over that lie in memory as their parameter does.

    The others are copied, and those that serve two parameters (torch/csrc/autograd/functions/accumulate_grad.h).
    """
    for index, wanted in enumerate(inputs):
        grad = grads[index]
        if not isinstance(grad, StandIn) or not isinstance(wanted, TensorSpec):
            continue
        shared = any(other is grad for other in grads[index + 1 :])
        if shared or not _laid_out_as(grad.spec, wanted):
            strides = wanted.strides if is_dense(wanted) else contiguous_strides(wanted.shape)
            owners = grad.block.owners if grad.block is not None else frozenset()
            grads[index] = run.empty(wanted.shape, strides, grad.dtype, grad.device, owners)


def _laid_out_as(grad: TensorSpec, param: TensorSpec) -> bool:
    """Autograd's layout contract (torch/csrc/autograd/utils/grad_layout_contract.h)."""
    expected = param.strides if is_dense(param) else contiguous_strides(param.shape)
    return all(s == e for n, s, e in zip(grad.shape, grad.strides, expected, strict=True) if n != 1)


class _Kernel:
    """A compiled kernel that computes nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in args if isinstance(x, StandIn)]
        if tensors:
            tensors[0].run.meter.note_work(0.0, (x.spec for x in tensors))

    def run(self, *args: Any, **kwargs: Any) -> None:
        """As Triton kernels are started."""
        self(*args)


class _NoCompile:
    """In place of Inductor's ``AsyncCompile``: every kernel is one that computes nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return (lambda *_, **__: None) if name == "wait" else (lambda *_, **__: _Kernel())


class _ExternKernels:
    """In place of ``extern_kernels``: what the operators do to memory, and nothing else."""

    def __init__(self, real: Any, run: DryRun) -> None:
        self._real, self._run = real, run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real = getattr(self._real, name)
        return lambda *args, **kwargs: self._run.call_operator(real, args, kwargs, f"aten::{name}")


def load_wrapper(source: str, run: DryRun) -> Wrapper:
    """The ``call`` function of Inductor's generated ``source``, with everything that allocates or computes replaced.

    Raises:
        NotImplementedError: the source has no ``call`` function (C++ wrappers, CUDA graph partitions of another kind).
    """
    module = types.ModuleType("slimfit_fx_dry_run")
    with mock.patch("torch._inductor.async_compile.AsyncCompile", _NoCompile):
        exec(compile(source, "<dry run>", "exec"), module.__dict__)
    names = module.__dict__
    if "call" not in names:
        raise NotImplementedError("the generated code has no Python function `call`")
    nothing = lambda *_, **__: None  # noqa: E731
    names.update(
        {n: nothing for n in ("assert_size_stride", "assert_alignment", "run_intermediate_hooks") if n in names}
    )
    if "copy_if_misaligned" in names:  # torch 2.13, on a GPU: what it takes for a step's memory is aligned
        names["copy_if_misaligned"] = lambda x, *_: x
    for name in [n for n in names if n.startswith("empty_strided_")]:
        device = name.removeprefix("empty_strided_").split("_")[0]
        names[name] = _allocator(run, device)
    names["empty_strided"] = lambda size, stride, dtype=torch.float32, device="cpu", **_: run.empty(
        size, stride, dtype, device
    )
    names["reinterpret_tensor"] = functools.partial(_reinterpreted, run)
    for name in [n for n in names if _OPEN_BRANCH.search(n) and callable(names[n])]:
        names[name] = run.inside_branch(names[name])
    names["extern_kernels"] = _ExternKernels(names["extern_kernels"], run)
    call: Wrapper = names["call"]
    return call


def _reinterpreted(run: DryRun, x: Any, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> StandIn:
    """A view; one of a real tensor, which is empty, is a ghost and counts for nothing."""
    if isinstance(x, StandIn):
        return x.like(size, stride)
    return run.of(TensorSpec(tuple(size), tuple(stride), x.dtype, x.device), None)


def _allocator(run: DryRun, device: str) -> Callable[..., StandIn]:
    return lambda size, stride, dtype: run.empty(size, stride, dtype, device)
