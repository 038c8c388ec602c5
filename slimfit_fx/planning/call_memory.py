"""What one call of an operator does to memory, measured: it runs once, on tensors of zeros, under the profiler.

::

    aten.convolution(x, w, ...)   ->  +786432 (the weights in oneDNN's order), +131072, -786432, +131072, -131072

Libraries below torch choose their temporaries by processor, thread count and size, and no formula follows them from
version to version; a run of the very call does. What survives the call are its results. Temporaries that another
thread makes come and go as that thread likes: of those, and of calls with many events, only the most that they can hold
together is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from slimfit_fx.planning.blocks import TensorSpec
from slimfit_fx.runtime.measure import silent, walk

_MANY = 64
_ALLOCATION = "[memory]"


@dataclass(frozen=True)
class Result:
    """One tensor that a call returns, and whose memory it is: a block of the call, an argument's, or nobody's."""

    spec: TensorSpec
    block: int | None = None
    argument: int | None = None
    """Index among the flattened arguments."""


@dataclass(frozen=True)
class CallMemory:
    """``events``: (block, bytes), bytes > 0 when it is made and < 0 when it is given back, in order of time.

    ``results``: what the call returns, flattened, a ``Result`` in place of each tensor. ``structure`` puts it together.
    """

    events: tuple[tuple[int, int], ...]
    results: tuple[Result | Any, ...]
    structure: TreeSpec

    @property
    def workspace_bytes(self) -> int:
        """The most that is alive beside the results."""
        kept = _kept(self.results)
        total = most = 0
        for block, delta in self.events:
            total += delta if block not in kept else 0
            most = max(most, total)
        return most


def can_measure() -> bool:
    """Whether calls can be measured now: only one profiler can be active in a process."""
    return not torch._C._autograd._profiler_enabled()


def measure_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallMemory:
    """The memory of ``func(*args, **kwargs)``, where a ``TensorSpec`` stands for a tensor of that kind.

    The call runs twice: what a library allocates once and for all is no part of it. Random state is left as it was. The
    tensors are all on one device, whose allocator is the one that is watched.

    Raises:
        whatever the call raises.
    """
    device = device_of(tree_flatten((args, kwargs))[0])
    with _undisturbed(device):
        real, named = tree_map(_zeros, (args, kwargs))
        func(*real, **named)
        with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            returned = func(*real, **named)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    nodes = walk(recorded.profiler.kineto_results.experimental_event_tree())
    on_device = (n for n in nodes if n.name == _ALLOCATION and n.extra_fields.device.type == device.type)
    found = sorted(on_device, key=lambda n: n.start_time_ns)
    return _summary(found, returned, tree_flatten((real, named))[0])


def device_of(leaves: Iterable[Any]) -> torch.device:
    """The device of the first tensor among ``leaves``, described or real, that is more than a number; else the CPU.

    A number may lie on the CPU beside a GPU's tensors.
    """
    tensors = [x for x in leaves if isinstance(x, TensorSpec | Tensor)]
    return next((x.device for x in (*(x for x in tensors if x.shape), *tensors)), torch.device("cpu"))


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No mode, no autograd, no autocast; the random state is put back."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda"),
    ):
        yield


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, TensorSpec):
        return leaf
    whole = torch.zeros(-(-leaf.nbytes // leaf.dtype.itemsize), dtype=leaf.dtype, device=leaf.device)
    return whole.as_strided(leaf.shape, leaf.strides)


def _summary(found: Sequence[Any], returned: Any, given: Sequence[Any]) -> CallMemory:
    owners = {_address(x): i for i, x in enumerate(given) if isinstance(x, Tensor)}
    live: dict[int, int] = {}
    events: list[tuple[int, int, int]] = []
    for number, node in enumerate(found):
        address, size = node.extra_fields.ptr, node.extra_fields.alloc_size
        if size > 0:
            live[address] = number
            events.append((number, size, node.start_tid))
        elif address in live:
            block = live.pop(address)
            events.append((block, -found[block].extra_fields.alloc_size, node.start_tid))
    flat, structure = tree_flatten(returned)
    results = tuple(_result(x, live, owners) if isinstance(x, Tensor) else x for x in flat)
    kept = _kept(results)
    dropped = set(live.values()) - kept  # a profile may end before what Python still held is given back
    events += [(b, -found[b].extra_fields.alloc_size, found[b].start_tid) for b in sorted(dropped)]
    threads = {thread for _, _, thread in events}
    if len(threads) == 1 and len(events) <= _MANY:
        return CallMemory(tuple((block, size) for block, size, _ in events), results, structure)
    return CallMemory(tuple(_folded(events, kept)), results, structure)


def _kept(results: Sequence[Any]) -> set[int]:
    return {r.block for r in results if isinstance(r, Result) and r.block is not None}


def _result(tensor: Tensor, live: dict[int, int], owners: dict[int, int]) -> Result:
    spec, address = TensorSpec.of(tensor), _address(tensor)
    if tensor.untyped_storage().nbytes() == 0:
        return Result(spec)
    return Result(spec, live.get(address), owners.get(address))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _folded(events: Iterable[tuple[int, int, int]], kept: set[int]) -> Iterator[tuple[int, int]]:
    """The results, then one block in place of all temporaries: the most of each thread, added up."""
    total: dict[int, int] = {}
    most: dict[int, int] = {}
    last = 0
    for block, size, thread in events:
        last = max(last, block)
        if block in kept:
            yield block, size
            continue
        total[thread] = total.get(thread, 0) + size
        most[thread] = max(most.get(thread, 0), total[thread])
    if any(most.values()):
        yield last + 1, sum(most.values())
        yield last + 1, -sum(most.values())
