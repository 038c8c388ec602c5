"""The memory of one training step, from the allocator's events: what ``torch.profiler`` records, added up by address.

Counted are bytes above what was allocated when the step began (parameters, optimizer state, the batch). A block from
before the step that is released in it changes nothing. Resident set size is never looked at.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")

_BACKWARD_MARK = "slimfit_fx::backward"
_ALLOCATION = "[memory]"


@dataclass(frozen=True)
class StepMemory:
    """Memory of one step, in bytes above what was allocated when it began."""

    timeline: tuple[tuple[int, int], ...]
    """(ns since the step began, bytes) after every allocation and release; never empty."""
    backward_ns: int
    """When backward began."""

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at one time: the step peak."""
        return max(total for _, total in self.timeline)

    @property
    def peak_ns(self) -> int:
        """When the step peak was reached first."""
        return max(self.timeline, key=lambda point: point[1])[0]


def step_memory(
    forward: Callable[[], T], backward: Callable[[T], object], *, device: str | torch.device = "cpu"
) -> StepMemory:
    """Run ``backward(forward())`` and report the memory that it took on ``device``.

    Garbage is collected first, so that nothing from before is released in the step. The step runs slower than usual.
    """
    gc.collect()
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        with record_function(_BACKWARD_MARK + "_not_yet"):
            result = forward()
        with record_function(_BACKWARD_MARK):
            backward(result)
    del result
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    nodes = list(walk(recorded.profiler.kineto_results.experimental_event_tree()))
    return _add_up(nodes, torch.device(device))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the profiler's log lines off the terminal: torch's own switch for them is read before torch is imported."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def walk(tree: Iterable[Any]) -> Iterator[Any]:
    """Yield every node; iterative, since a profile nests as deep as the calls do."""
    stack = list(tree)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children)


def _add_up(nodes: Iterable[Any], device: torch.device) -> StepMemory:
    """Keep a table of live blocks by address: the profiler's own total drifts when blocks outlive a profile."""
    starts = {node.name: node.start_time_ns for node in nodes if node.name.startswith(_BACKWARD_MARK)}
    begin = starts[_BACKWARD_MARK + "_not_yet"]
    events = [node for node in nodes if node.name == _ALLOCATION and node.extra_fields.device.type == device.type]
    live: dict[int, int] = {}
    total, timeline = 0, [(0, 0)]
    for event in sorted(events, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        timeline.append((event.start_time_ns - begin, total))
    return StepMemory(tuple(timeline), starts[_BACKWARD_MARK] - begin)
