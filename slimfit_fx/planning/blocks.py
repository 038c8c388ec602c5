"""Memory in a dry run: what is known of a tensor, blocks that are made and given back, and who writes it down.

::

    meter = Meter()
    block = meter.allocate(64, "x")   # events: +64
    del block                         # events: +64, -64: when nothing refers to it, as a tensor's memory
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slimfit_fx.graph.joint import hint
from slimfit_fx.planning.peak import Event
from slimfit_fx.planning.roofline import Work


@dataclass(frozen=True)
class TensorSpec:
    """What a dry run must know of an input: sizes and strides are whole numbers, symbols by their examples."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    room: int = 0
    """Bytes of the whole memory that it is a part of, if that is known."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a real or fake tensor."""
        shape, strides = tuple(map(hint, tensor.shape)), tuple(map(hint, tensor.stride()))
        return cls(shape, strides, tensor.dtype, tensor.device)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TensorSpec:
        """The spec that ``to_dict`` wrote, also if it has been through JSON."""
        shape, strides = tuple(stored["shape"]), tuple(stored["strides"])
        dtype, device = getattr(torch, stored["dtype"]), torch.device(stored["device"])
        return cls(shape, strides, dtype, device, stored["room"])

    @property
    def nbytes(self) -> int:
        """Bytes that hold it."""
        return max(self.room, storage_bytes(self.shape, self.strides, self.dtype.itemsize))


def spec_of(value: Any) -> TensorSpec | int | None:
    """What a dry run must know of an example input; None if it is neither a tensor nor a number."""
    if isinstance(value, torch.Tensor):
        return TensorSpec.of(value)
    return hint(value) if isinstance(value, (int, torch.SymInt)) else None


@dataclass
class Meter:
    """Writes down every block that is made and given back. ``round_to``: the allocator's granularity in bytes."""

    round_to: int = 1
    events: list[Event] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    branch: frozenset[int] = frozenset()
    """The gates of the branch inside which the code runs now."""
    work: list[Work] = field(default_factory=list)
    """What was computed, were it computed."""

    def allocate(self, nbytes: int, label: str, owners: frozenset[int] = frozenset()) -> Block:
        """A new block of ``nbytes``; it is given back when nobody refers to it any more."""
        size = -(-nbytes // self.round_to) * self.round_to
        block = Block(self, len(self.labels), size, self.branch or owners)
        self.labels[block.number] = label
        self._note(block, size)
        return block

    def release(self, block: Block) -> None:
        """Called by a block that nobody refers to any more."""
        self._note(block, -block.size)

    def release_unless_open(self, block: Block, gate: int) -> None:
        """The block is given back now if ``gate`` is closed, and as ever if it is open."""
        self.events.append(Event(-block.size, block.number, unless=frozenset([gate])))
        block.owners = frozenset([gate])

    def note_work(self, flops: float, tensors: Iterable[TensorSpec]) -> None:
        """A kernel that does so many operations and reads or writes these tensors."""
        specs = list(tensors)
        dtype = next((str(s.dtype).removeprefix("torch.") for s in specs if s.dtype.is_floating_point), "float32")
        nbytes = sum(storage_bytes(s.shape, s.strides, s.dtype.itemsize) for s in specs)
        self.work.append(Work(flops, nbytes, dtype, self.branch))

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


def storage_bytes(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first to the last element; 0 for an empty tensor."""
    if math.prod(shape) == 0:
        return 0
    return itemsize * (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor in row-major order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def is_dense(spec: TensorSpec) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    step = 1
    for stride, size in sorted((s, n) for n, s in zip(spec.shape, spec.strides, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True
