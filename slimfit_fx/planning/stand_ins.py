"""Stand-ins for tensors, and operators on them that compute nothing but move blocks of memory as the real ones do.

A ``StandIn`` knows shape, strides, dtype, device and the ``Block`` that it holds. Views share a block; Python's own
references decide when it is given back. What an operator allocates for itself, and in which order, comes from
workspaces.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from slimfit_fx.planning.blocks import Block, Meter, TensorSpec, contiguous_strides, storage_bytes
from slimfit_fx.planning.call_memory import CallMemory, Result
from slimfit_fx.planning.roofline import operator_flops
from slimfit_fx.planning.workspaces import call_memory, workspace_bytes


class StandIn:
    """In place of a tensor: shape, strides, dtype, device and the block that it holds (None: memory not of the step).

    ``gates``: of what says whether one of them is open. All are, in a dry run; what only an open one brings is marked
    as its.
    """

    def __init__(
        self,
        run: DryRun,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        block: Block | None,
        gates: frozenset[int] = frozenset(),
    ) -> None:
        self.run, self.shape, self.strides = run, tuple(shape), tuple(strides)
        self.dtype, self.device, self.block, self.gates = dtype, device, block, gates

    def item(self) -> bool:
        """What the generated code branches on."""
        if not self.gates:
            raise NotImplementedError("the generated code reads a number out of a tensor that is no gate")
        self.run.next_branch = self.gates
        return True

    def size(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.shape

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.strides

    # What Inductor does with the partial sums of two reductions in one kernel of a GPU, in a buffer of one dimension:
    # ws[0:n].view(rows, columns).sum(dim=0).view([columns]).to(torch.bfloat16)
    def __getitem__(self, part: slice) -> StandIn:
        """A stretch of a buffer."""
        return self.like((len(range(*part.indices(self.shape[0]))),), self.strides)

    def view(self, *shape: Any) -> StandIn:
        """As of a contiguous tensor."""
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return self.like(wanted, contiguous_strides(wanted))

    def sum(self, dim: int) -> Any:
        """Along one dimension, as the three below."""
        return self._reduced(torch.ops.aten.sum.dim_IntList, [dim])

    def amax(self, dim: int) -> Any:
        """As of a tensor."""
        return self._reduced(torch.ops.aten.amax.default, [dim])

    def amin(self, dim: int) -> Any:
        """As of a tensor."""
        return self._reduced(torch.ops.aten.amin.default, [dim])

    def prod(self, dim: int) -> Any:
        """As of a tensor."""
        return self._reduced(torch.ops.aten.prod.dim_int, dim)

    def _reduced(self, operator: Any, dim: Any) -> Any:
        return self.run.call_operator(operator, (self, dim), {})

    def to(self, dtype: torch.dtype) -> Any:
        """A copy of another dtype."""
        return self.run.call_operator(torch.ops.aten._to_copy.default, (self,), {"dtype": dtype})

    def zero_(self) -> StandIn:
        """Writes where it is."""
        return self

    @property
    def spec(self) -> TensorSpec:
        """All of it but the block."""
        return TensorSpec(self.shape, self.strides, self.dtype, self.device, self.block.size if self.block else 0)

    def like(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None = None) -> StandIn:
        """Another view of the same block."""
        return StandIn(self.run, shape, strides, dtype or self.dtype, self.device, self.block)

    @classmethod
    def __torch_function__(
        cls, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stand in for an operator that the generated code calls."""
        flat, _ = tree_flatten((args, kwargs or {}))
        run = next(leaf.run for leaf in flat if isinstance(leaf, StandIn))
        adopted, named = tree_map(run.adopt, (args, dict(kwargs or {})))
        return run.call_operator(func, adopted, named)


class DryRun:
    """One pretended execution: its meter, and what operators do to memory."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.next_branch = frozenset[int]()
        """The gates that the code has just branched on."""
        self._known: dict[Any, Any] = {}

    # -- making stand-ins ----------------------------------------------------------------------------------------------
    def input(self, spec: TensorSpec | int | None, *, gate: int | None) -> Any:
        """An input of the step, whose memory was there before it."""
        gates = frozenset() if gate is None else frozenset([gate])
        return self.of(spec, None, gates) if isinstance(spec, TensorSpec) else spec

    def tangent(self, spec: TensorSpec | int | None, label: str) -> Any:
        """A gradient that arrives from outside, in memory of its own."""
        if not isinstance(spec, TensorSpec):
            return spec
        return self.of(spec, self.meter.allocate(storage_bytes(spec.shape, spec.strides, spec.dtype.itemsize), label))

    def of(self, spec: TensorSpec, block: Block | None, gates: frozenset[int] = frozenset()) -> StandIn:
        """A stand-in that holds ``block``."""
        return StandIn(self, spec.shape, spec.strides, spec.dtype, spec.device, block, gates)

    def empty(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: Any,
        owners: frozenset[int] = frozenset(),
    ) -> StandIn:
        """A new buffer; an empty one, as ghosts are made of, holds no block."""
        spec = TensorSpec(tuple(shape), tuple(strides), dtype, torch.device(device))
        size = storage_bytes(shape, strides, dtype.itemsize)
        return self.of(spec, self.meter.allocate(size, _label(spec), owners) if size else None)

    def inside_branch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Run the function of a taken branch; what it allocates belongs to the gates that were asked last."""

        def call(*args: Any) -> Any:
            outer, self.meter.branch, self.next_branch = self.meter.branch, self.next_branch, frozenset()
            try:
                return function(*args)
            finally:
                self.meter.branch = outer

        return call

    def adopt(self, leaf: Any) -> Any:
        """A real tensor was made by an operator without tensor arguments, as ghosts are: it counts for nothing."""
        return self.of(TensorSpec.of(leaf), None) if isinstance(leaf, torch.Tensor) else leaf

    # -- operators -----------------------------------------------------------------------------------------------------
    def call_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None) -> Any:
        """What ``func(*args, **kwargs)`` would return: new blocks, or those of its arguments where it aliases them."""
        name = name or str(getattr(func, "_schema", func)).split("(", maxsplit=1)[0].split(".")[0]
        if name == "slimfit_fx::stash":
            return self._stash(*args)
        if name == "slimfit_fx::any_open":
            return self._any_open(*args)
        described = tree_map(_spec_of, (args, kwargs))
        self._note_work(name, func, described)
        memory = call_memory(name, func, *described)
        if memory is not None:
            return self._replay(memory, func, args, kwargs)
        made = self._seeming(func, args, kwargs)
        nbytes = workspace_bytes(name, func, *described)
        if nbytes:
            self.meter.allocate(nbytes, name)
        return made

    def _note_work(self, name: str, func: Any, described: tuple[Any, Any]) -> None:
        specs = [leaf for leaf in tree_flatten(described)[0] if isinstance(leaf, TensorSpec)]
        if not specs or _does_no_work(func):
            return
        shapes = tree_map(lambda leaf: leaf.shape if isinstance(leaf, TensorSpec) else leaf, described[0])
        out = described[1].get("out")
        result = out.shape if isinstance(out, TensorSpec) else None
        self.meter.note_work(operator_flops(name, func, shapes, result), specs)

    def _replay(self, memory: CallMemory, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make and give back the blocks of a measured call, and hand its results the blocks that are theirs."""
        labels = {r.block: _label(r.spec) for r in memory.results if isinstance(r, Result)}
        blocks: dict[int, Block] = {}
        for number, size in memory.events:
            if size > 0:
                blocks[number] = self.meter.allocate(size, labels.get(number, str(func)))
            else:
                del blocks[number]
        if isinstance(kwargs.get("out"), StandIn):
            return kwargs["out"]
        flat, _ = tree_flatten((args, kwargs))
        return tree_unflatten([self._result(r, blocks, flat) for r in memory.results], memory.structure)

    def _result(self, result: Result | Any, blocks: Mapping[int, Block], arguments: Sequence[Any]) -> Any:
        if not isinstance(result, Result):
            return result
        if result.argument is not None:
            source = arguments[result.argument]
            return source.like(result.spec.shape, result.spec.strides, result.spec.dtype)
        return self.of(result.spec, None if result.block is None else blocks[result.block])

    def _seeming(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Results as fake tensors and the operator's schema have them, each in a block of its own."""
        if "out" in kwargs:
            return kwargs["out"]
        flat, structure = tree_flatten(self._example(func, args, kwargs))
        schema = getattr(func, "_schema", None)
        aliases = _aliases(schema, args, kwargs) if schema is not None else []
        aliases += [aliases[-1] if schema is not None and len(aliases) == 1 else None] * (len(flat) - len(aliases))
        return tree_unflatten([self._new(v, s) for v, s in zip(flat, aliases, strict=True)], structure)

    def _new(self, value: Any, source: StandIn | None) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        spec = TensorSpec.of(value)
        if source is not None:
            return source.like(spec.shape, spec.strides, spec.dtype)
        return self.empty(spec.shape, spec.strides, spec.dtype, spec.device)

    def _stash(self, x: StandIn, gates: Sequence[StandIn], debug: bool) -> StandIn:
        return self.empty(x.shape, x.strides, x.dtype, x.device, frozenset() if debug else _all_of(gates))

    def _any_open(self, gates: Sequence[StandIn]) -> StandIn:
        switch = self.empty((), (), torch.bool, "cpu")
        switch.gates = _all_of(gates)
        return switch

    def _example(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = repr((str(func), tree_map(_spec_of, (args, kwargs))))
        if key not in self._known:
            with self.mode:
                fakes = tree_map(_as_fake, (args, kwargs))
                self._known[key] = func(*fakes[0], **fakes[1])
        return self._known[key]


def _all_of(gates: Sequence[StandIn]) -> frozenset[int]:
    return frozenset().union(*(gate.gates for gate in gates))


def _does_no_work(func: Any) -> bool:
    """Views, and gradients of closed units: nothing is read or written."""
    schema = getattr(func, "_schema", None)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns) and not schema.is_mutable
    return aliases or "ghost" in str(func)


def _label(spec: TensorSpec) -> str:
    return f"{'x'.join(map(str, spec.shape)) or 'scalar'} {str(spec.dtype).removeprefix('torch.')}"


def _spec_of(leaf: Any) -> Any:
    return leaf.spec if isinstance(leaf, StandIn) else leaf


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
