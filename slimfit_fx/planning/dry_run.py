"""Run Inductor's generated code without computing anything: the same calls, on stand-ins that count bytes.

Inductor writes a Python function that allocates buffers, calls kernels and deletes names. Here that very function runs,
with kernels that do nothing, on ``StandIn`` tensors (stand_ins.py). A block is counted when it is made and given back
when Python drops its last reference, just as a tensor's memory is. So every allocation, reuse, alias and release of the
compiled step is seen in its order, for any pattern of gates, before a byte is allocated.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from slimfit_fx.graph.joint import hint
from slimfit_fx.planning.blocks import Meter, TensorSpec
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.stand_ins import DryRun, StandIn

Wrapper = Callable[[list[Any]], Sequence[Any]]
_OPEN_BRANCH = re.compile(r"(?:^|_)cone_\w*_open$")


@dataclass(frozen=True)
class GeneratedCode:
    """One graph as Inductor wrote it."""

    source: str
    inputs: tuple[TensorSpec | int | None, ...]
    """None for what is neither a tensor nor a number."""
    names: tuple[str, ...]
    """Names of the inputs, as the graph has them."""

    @classmethod
    def of(cls, source: str, graph: fx.Graph, inputs: Sequence[Any]) -> GeneratedCode:
        """The code of ``graph``, compiled for these example inputs."""
        names = tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))
        return cls(source, tuple(map(_spec_of, inputs)), names)

    @property
    def tangents(self) -> int:
        """How many of the last inputs are gradients that arrive from outside."""
        return sum(name.startswith("tangents") for name in self.names)


def _spec_of(value: Any) -> TensorSpec | int | None:
    if isinstance(value, torch.Tensor):
        return TensorSpec.of(value)
    return hint(value) if isinstance(value, (int, torch.SymInt)) else None


def trace_step(forward: GeneratedCode, backward: GeneratedCode, *, first_gate: int, num_gates: int) -> StepTrace:
    """All memory events of a compiled forward and backward, every gate open.

    The inputs ``first_gate ... first_gate + num_gates - 1`` of forward are its gates. What the user is given is held to
    the end, as if he kept it.

    Raises:
        NotImplementedError: the generated code does what a dry run cannot follow.
    """
    on_gpu = any(isinstance(x, TensorSpec) and x.device.type == "cuda" for x in forward.inputs)
    meter = Meter(round_to=512 if on_gpu else 1)
    run = DryRun(meter)
    gates = range(first_gate, first_gate + num_gates)
    inputs = [run.input(x, gate=i - first_gate if i in gates else None) for i, x in enumerate(forward.inputs)]
    results = list(load_wrapper(forward.source, run)(inputs))
    num_saved = len(backward.inputs) - backward.tangents
    kept, saved = results[: len(results) - num_saved], results[len(results) - num_saved :]
    del results
    boundary = len(meter.events)
    names = backward.names[-backward.tangents :] if backward.tangents else ()
    late = [run.tangent(x, name) for x, name in zip(backward.inputs[num_saved:], names, strict=True)]
    # symbols come first in backward and last in forward (torch/_functorch/partitioners.py)
    symbols, tensors = [s for s in saved if not isinstance(s, StandIn)], [s for s in saved if isinstance(s, StandIn)]
    for tensor, name in zip(tensors, backward.names[len(symbols) :], strict=False):
        if tensor.block is not None:
            meter.labels[tensor.block.number] = name
    arguments = [*symbols, *tensors, *late]
    del saved, symbols, tensors, late
    grads = load_wrapper(backward.source, run)(arguments)
    trace = StepTrace(tuple(meter.events), boundary, dict(meter.labels), num_gates)
    del grads, kept
    return trace


class _Kernel:
    """A compiled kernel that computes nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def run(self, *args: Any, **kwargs: Any) -> None:
        """As Triton kernels are started."""
        return None


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
    for name in [n for n in names if n.startswith("empty_strided_")]:
        device = name.removeprefix("empty_strided_").split("_")[0]
        names[name] = _allocator(run, device)
    names["empty_strided"] = lambda size, stride, dtype=torch.float32, device="cpu", **_: run.empty(
        size, stride, dtype, device
    )
    names["reinterpret_tensor"] = lambda x, size, stride, offset=0: x.like(size, stride)
    for name in [n for n in names if _OPEN_BRANCH.search(n) and callable(names[n])]:
        names[name] = run.inside_branch(names[name])
    names["extern_kernels"] = _ExternKernels(names["extern_kernels"], run)
    call: Wrapper = names["call"]
    return call


def _allocator(run: DryRun, device: str) -> Callable[..., StandIn]:
    return lambda size, stride, dtype: run.empty(size, stride, dtype, device)
