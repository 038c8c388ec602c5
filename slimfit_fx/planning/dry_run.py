"""Run Inductor's generated code without computing anything: the same calls, on stand-ins that count bytes.

Inductor writes a Python function that allocates buffers, calls kernels and deletes names. Here that very function runs,
with kernels that do nothing, on ``StandIn`` tensors that know shape, strides, dtype and which ``Block`` of memory they
would hold. A block is counted when it is made and given back when Python drops its last reference, just as a tensor's
memory is. So every allocation, reuse, alias and release of the compiled step is seen in its order, for any pattern of
gates, before a byte is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from slimfit_fx.graph.joint import hint
from slimfit_fx.planning.labels import GRADIENT, LABEL
from slimfit_fx.planning.peak import Event, StepTrace
from slimfit_fx.planning.sizes import Symbolic, SymbolicTensor, describe_inputs, read_symbols, value_at

Wrapper = Callable[[list[Any]], Sequence[Any]]
_BRANCH = re.compile(r"(^|_)cone_\d+_open$")
"""Functions of open branches; those within a block carry the block's name in front."""


@dataclass(frozen=True)
class TensorSpec:
    """What a dry run must know of an input: sizes and strides are whole numbers, symbols by their examples."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a real or fake tensor."""
        shape, strides = tuple(map(hint, tensor.shape)), tuple(map(hint, tensor.stride()))
        return cls(shape, strides, tensor.dtype, tensor.device)


@dataclass(frozen=True)
class GeneratedCode:
    """One graph as Inductor wrote it."""

    source: str
    inputs: tuple[TensorSpec | int | None, ...]
    """None for what is neither a tensor nor a number."""
    names: tuple[str, ...]
    """Names of the inputs, as the graph has them."""
    labels: tuple[str, ...] = ()
    """What the inputs are called in reports; nothing for those that have no label."""
    symbolic: tuple[Symbolic, ...] | None = None
    """The inputs with symbols for sizes, where some size is one."""

    @classmethod
    def of(cls, source: str, graph: fx.Graph, inputs: Sequence[Any]) -> GeneratedCode:
        """The code of ``graph``, compiled for these example inputs."""
        nodes = graph.find_nodes(op="placeholder")
        names, labels = (tuple(str(n.target) for n in nodes), tuple(n.meta.get(LABEL, str(n.target)) for n in nodes))
        return cls(source, tuple(map(_spec_of, inputs)), names, labels, describe_inputs(inputs))

    def at(self, values: Mapping[Any, int]) -> GeneratedCode:
        """The same code, called with inputs of other sizes: ``values`` says what the symbols stand for.

        Raises:
            LookupError: a symbol is missing.
        """
        if self.symbolic is None:
            return self
        return dataclasses.replace(self, inputs=tuple(_spec_at(x, values) for x in self.symbolic))

    @property
    def tangents(self) -> int:
        """How many of the last inputs are gradients that arrive from outside."""
        return sum(name.startswith("tangents") for name in self.names)


def _spec_of(value: Any) -> TensorSpec | int | None:
    if isinstance(value, torch.Tensor):
        return TensorSpec.of(value)
    return hint(value) if isinstance(value, (int, torch.SymInt)) else None


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
    for tensor, name in zip(tensors, backward.labels[len(symbols) :], strict=False):
        if tensor.block is not None:
            meter.labels[tensor.block.number] = name
    arguments = [*symbols, *tensors, *late]
    del saved, symbols, tensors, late
    grads = load_wrapper(backward.source, run)(arguments)
    for grad in grads:
        if isinstance(grad, StandIn) and grad.block is not None:
            meter.labels[grad.block.number] = GRADIENT
    trace = StepTrace(tuple(meter.events), boundary, dict(meter.labels), num_gates)
    del grads, kept
    return trace


@dataclass
class Meter:
    """Writes down every block that is made and given back. ``round_to``: the allocator's granularity in bytes."""

    round_to: int = 1
    events: list[Event] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    branch: int | None = None
    """The gate inside whose branch the code runs now."""

    def allocate(self, nbytes: int, label: str, owners: frozenset[int] = frozenset()) -> Block:
        """A new block of ``nbytes``; it is given back when nobody refers to it any more."""
        size = -(-nbytes // self.round_to) * self.round_to
        block = Block(self, len(self.labels), size, owners if self.branch is None else frozenset([self.branch]))
        self.labels[block.number] = label
        self._note(block, size)
        return block

    def release(self, block: Block) -> None:
        """Called by a block that nobody refers to any more."""
        self._note(block, -block.size)

    def workspace(self, nbytes: int, label: str) -> None:
        """A block that is there for the length of one call only."""
        if nbytes > 0:
            self.allocate(nbytes, label)

    def _note(self, block: Block, delta: int) -> None:
        if block.size:
            self.events.append(Event(delta, block.number, block.owners, self.branch))


class Block:
    """A piece of memory, alive as long as something refers to it."""

    __slots__ = ("meter", "number", "owners", "size")

    def __init__(self, meter: Meter, number: int, size: int, owners: frozenset[int]) -> None:
        self.meter, self.number, self.size, self.owners = meter, number, size, owners

    def __del__(self) -> None:
        self.meter.release(self)


class StandIn:
    """In place of a tensor: shape, strides, dtype, device and the block that it holds (None: memory not of the step).

    ``gate``: its number, for a gate. All gates are open in a dry run; what only an open one brings is marked as its.
    """

    def __init__(
        self,
        run: DryRun,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        block: Block | None,
        gate: int | None = None,
    ) -> None:
        self.run, self.shape, self.strides = run, tuple(shape), tuple(strides)
        self.dtype, self.device, self.block, self.gate = dtype, device, block, gate

    def item(self) -> bool:
        """What the generated code branches on."""
        if self.gate is None:
            raise NotImplementedError("the generated code reads a number out of a tensor that is no gate")
        self.run.next_branch = self.gate
        return True

    def size(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.shape

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.strides

    def like(self, shape: Sequence[int], strides: Sequence[int]) -> StandIn:
        """Another view of the same block."""
        return StandIn(self.run, shape, strides, self.dtype, self.device, self.block)

    @classmethod
    def __torch_function__(
        cls, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stand in for an operator that the generated code calls."""
        flat, _ = tree_flatten((args, kwargs or {}))
        run = next(leaf.run for leaf in flat if isinstance(leaf, StandIn))
        adopted, named = tree_map(run.adopt, (args, dict(kwargs or {})))
        return run.call_operator(func, adopted, named)


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
    """In place of ``extern_kernels``: fills its ``out``, or answers as the operator would."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real = getattr(self._real, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return kwargs["out"] if "out" in kwargs else real(*args, **kwargs)

        return call


class DryRun:
    """One pretended execution: its meter, and what the generated code finds in place of torch's functions."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.next_branch: int | None = None
        """The gate that the code has just branched on."""
        self._known: dict[Any, Any] = {}

    # -- making stand-ins ----------------------------------------------------------------------------------------------
    def input(self, spec: TensorSpec | int | None, *, gate: int | None) -> Any:
        """An input of the step, whose memory was there before it."""
        return self.of(spec, None, gate) if isinstance(spec, TensorSpec) else spec

    def tangent(self, spec: TensorSpec | int | None, label: str) -> Any:
        """A gradient that arrives from outside, in memory of its own."""
        if not isinstance(spec, TensorSpec):
            return spec
        return self.of(spec, self.meter.allocate(storage_bytes(spec.shape, spec.strides, spec.dtype.itemsize), label))

    def of(self, spec: TensorSpec, block: Block | None, gate: int | None = None) -> StandIn:
        """A stand-in that holds ``block``."""
        return StandIn(self, spec.shape, spec.strides, spec.dtype, spec.device, block, gate)

    def empty(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: Any,
        owners: frozenset[int] = frozenset(),
    ) -> StandIn:
        """A new buffer of the generated code."""
        size = storage_bytes(shape, strides, dtype.itemsize)
        label = f"{'x'.join(map(str, shape)) or 'scalar'} {str(dtype).removeprefix('torch.')}"
        return StandIn(self, shape, strides, dtype, torch.device(device), self.meter.allocate(size, label, owners))

    def inside_branch(self, function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """Run the function of a taken branch; what it allocates belongs to the gate that was asked last."""

        def call(args: list[Any]) -> Any:
            self.meter.branch, self.next_branch = self.next_branch, None
            try:
                return function(args)
            finally:
                self.meter.branch = None

        return call

    def adopt(self, leaf: Any) -> Any:
        """A real tensor was made by an operator without tensor arguments, as ghosts are: it counts for nothing."""
        return self.of(TensorSpec.of(leaf), None) if isinstance(leaf, torch.Tensor) else leaf

    # -- operators -----------------------------------------------------------------------------------------------------
    def call_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` would return: new blocks, or those of its arguments where it aliases them."""
        name = str(getattr(func, "_schema", func)).split("(", maxsplit=1)[0]
        if name == "slimfit_fx::stash":
            return self._stash(*args)
        if "out" in kwargs:
            return kwargs["out"]
        schema = getattr(func, "_schema", None)
        results = self._example(func, args, kwargs)
        flat, spec = tree_flatten(results)
        aliases = _aliases(schema, args, kwargs) if schema is not None else []
        made = [self._result(value, aliases[i] if i < len(aliases) else None) for i, value in enumerate(flat)]
        self.meter.workspace(workspace_bytes(name, args), name)
        return tree_unflatten(made, spec)

    def _result(self, value: Any, source: StandIn | None) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if source is not None:
            return source.like(value.shape, value.stride())
        return self.empty([int(s) for s in value.shape], [int(s) for s in value.stride()], value.dtype, value.device)

    def _stash(self, x: StandIn, gates: Sequence[StandIn], debug: bool) -> StandIn:
        numbers = frozenset(gate.gate for gate in gates if gate.gate is not None)
        return self.empty(x.shape, x.strides, x.dtype, x.device, frozenset() if debug else numbers)

    def _example(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = repr((str(func), tree_map(_describe, (args, kwargs))))
        if key not in self._known:
            with self.mode:
                fakes = tree_map(_as_fake, (args, kwargs))
                self._known[key] = func(*fakes[0], **fakes[1])
        return self._known[key]


def _describe(leaf: Any) -> Any:
    return (leaf.shape, leaf.strides, str(leaf.dtype), str(leaf.device)) if isinstance(leaf, StandIn) else leaf


def _as_fake(leaf: Any) -> Any:
    if isinstance(leaf, StandIn):
        return torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device=leaf.device)
    return leaf


def _aliases(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[StandIn | None]:
    """For each result of an operator the argument whose memory it shares, or None."""
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    found: list[StandIn | None] = []
    for result in schema.returns:
        source = None
        if result.alias_info is not None:
            wanted = result.alias_info.before_set
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.before_set & wanted:
                    source = given.get(argument.name)
        found.append(source if isinstance(source, StandIn) else None)
    return found


def storage_bytes(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first to the last element; 0 for an empty tensor."""
    if math.prod(shape) == 0:
        return 0
    return itemsize * (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)))


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
    for name in [n for n in names if _BRANCH.search(n)]:
        names[name] = run.inside_branch(names[name])
    names["extern_kernels"] = _ExternKernels(names["extern_kernels"])
    call: Wrapper = names["call"]
    return call


def _allocator(run: DryRun, device: str) -> Callable[..., StandIn]:
    return lambda size, stride, dtype: run.empty(size, stride, dtype, device)


def workspace_bytes(name: str, args: Sequence[Any]) -> int:
    """Bytes that an operator allocates for itself, while it runs, through torch's allocator.

    Source of the CPU flash attention's: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, one buffer for all threads.
    """
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return _cpu_flash_bytes(args, backward=name.endswith("_backward"))
    if name == "aten::convolution_backward" and args[0].device.type == "cpu":
        return _cpu_convolution_bytes(*args[:3])
    return 0


def _cpu_convolution_bytes(gradient: Any, value: Any, weight: Any) -> int:
    """An estimate, measured with oneDNN on two threads: copies in blocks of 16 channels, and one image per thread."""
    threads = torch.get_num_threads()
    channels = max(1, weight.shape[1])
    blocked = -(-channels // 16) * 16 / channels * math.prod(weight.shape) * weight.dtype.itemsize
    image = math.prod(value.shape[1:]) * value.dtype.itemsize
    copied = math.prod(gradient.shape) * gradient.dtype.itemsize
    return int(blocked * (1 + threads) / 2 + image * threads + copied)


def _cpu_flash_bytes(args: Sequence[Any], *, backward: bool) -> int:
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    queries, head = query.shape[-2:]
    queries_at_once = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    keys_at_once = min(key.shape[-2], 512)
    scores = queries_at_once * keys_at_once
    elements = 2 * scores if backward else scores + queries_at_once * (2 + head)
    return 4 * elements * torch.get_num_threads()
