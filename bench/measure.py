"""The memory of one training step, exact to the byte, from the allocator's own events.

What is counted: bytes handed out by torch's allocator of the chosen device while the step runs, above what was
allocated when it began (parameters, optimizer state, the batch). Resident set size is never looked at.

- CPU: every allocation and release of ``c10::CPUAllocator``, with its address, as the profiler records them
  (``torch/csrc/profiler/collection.h``, ``EventType::Allocation``). We keep our own table of addresses: a block that
  was allocated before the step and is released in it is counted apart (``foreign_frees``), because the profiler's
  running total drifts when blocks outlive a profile.
- CUDA: ``torch.cuda.max_memory_allocated``, and the same profiler events for the timeline when it is asked for.

Memory that a library takes behind the allocator's back (oneDNN scratch, thread stacks) is not seen, for any rival.
Needs nothing but torch. Works on torch 2.11 to 2.13.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_BACKWARD_MARK = "bench.measure::backward"
_ALLOCATION = "[memory]"


@dataclass(frozen=True)
class Block:
    """One allocated block that is alive at the peak: its size and the op whose call allocated it ("" if none)."""

    size_bytes: int
    op: str


@dataclass(frozen=True)
class PeakReport:
    """Memory of one step, in bytes above what was allocated when it began.

    ``timeline`` holds ``(ns, total_bytes)`` after every allocation and release, ns counted from the step's first event.
    The ``saved``, ``forward_peak`` and ``backward_peak`` figures are None unless ``backward`` was given to `step_peak`.
    """

    peak_bytes: int
    end_bytes: int
    timeline: tuple[tuple[int, int], ...] = ()
    peak_ns: int | None = None
    saved_bytes: int | None = None
    forward_peak_bytes: int | None = None
    backward_peak_bytes: int | None = None
    alive_at_peak: tuple[Block, ...] = ()
    foreign_frees: int = 0

    @property
    def peak_phase(self) -> str | None:
        """``"forward"`` or ``"backward"``, whichever holds the peak; None if the step was not split."""
        if self.forward_peak_bytes is None or self.backward_peak_bytes is None:
            return None
        return "forward" if self.forward_peak_bytes >= self.backward_peak_bytes else "backward"


@dataclass(frozen=True)
class Event:
    """An allocation (``delta_bytes`` > 0) or a release (< 0) of the block at ``address``."""

    ns: int
    delta_bytes: int
    address: int
    op: str


def step_peak(
    fn: Callable[[], Any],
    *,
    backward: Callable[[Any], Any] | None = None,
    device: str | torch.device = "cpu",
    timeline: bool = True,
) -> PeakReport:
    """Run ``fn()``, then ``backward(result)`` if given, and report the memory they took.

    The result of ``fn`` stays alive until the end of the step, as the loss does in a user's loop. Garbage is collected
    first, so that nothing from before is released during the step. ``timeline=False`` skips the profiler on CUDA
    (``timeline``, ``alive_at_peak`` and ``peak_ns`` stay empty); on CPU the events are the measurement itself.
    """
    where = torch.device(device)
    gc.collect()
    if where.type == "cuda":
        return _step_peak_cuda(fn, backward, where, timeline)
    return _step_peak_events(fn, backward, where)


def _step_peak_events(
    fn: Callable[[], Any],
    backward: Callable[[Any], Any] | None,
    device: torch.device,
    counters: _CudaCounters | None = None,
) -> PeakReport:
    events, marks = _recorded(fn, backward, device, counters)
    return replay(events, boundary_ns=marks[0] if backward is not None else None)


def recorded_step(fn: Callable[[], Any], backward: Callable[[Any], Any], device: str = "cpu") -> list[Event]:
    """Run ``backward(fn())``; every allocation and release on ``device`` in the order of time."""
    gc.collect()
    return _recorded(fn, backward, torch.device(device))[0]


def _recorded(
    fn: Callable[[], Any],
    backward: Callable[[Any], Any] | None,
    device: torch.device,
    counters: _CudaCounters | None = None,
) -> tuple[list[Event], list[int]]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        result = _run(fn, backward, counters)
    del result
    return _read_tree(prof.profiler.kineto_results.experimental_event_tree(), device)


def _step_peak_cuda(
    fn: Callable[[], Any], backward: Callable[[Any], Any] | None, device: torch.device, timeline: bool
) -> PeakReport:
    counters = _CudaCounters(device)
    drawn = PeakReport(0, 0)
    if timeline:
        drawn = _step_peak_events(fn, backward, device, counters)
    else:
        _run(fn, backward, counters)
    return counters.fill(drawn)


class _CudaCounters:
    """The caching allocator's own counters, read at the start, at the boundary and at the end of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.base = torch.cuda.memory_allocated(device)
        self.peaks: list[int] = []
        self.totals: list[int] = []

    def read(self) -> None:
        self.peaks.append(torch.cuda.max_memory_allocated(self.device) - self.base)
        self.totals.append(torch.cuda.memory_allocated(self.device) - self.base)
        torch.cuda.reset_peak_memory_stats(self.device)

    def fill(self, drawn: PeakReport) -> PeakReport:
        exact = replace(drawn, peak_bytes=max(self.peaks), end_bytes=self.totals[-1])
        if len(self.peaks) == 1:
            return exact
        return replace(
            exact, saved_bytes=self.totals[0], forward_peak_bytes=self.peaks[0], backward_peak_bytes=self.peaks[1]
        )


def _run(fn: Callable[[], Any], backward: Callable[[Any], Any] | None, counters: _CudaCounters | None) -> Any:
    """Run both halves, the second one under a profiler range whose start is the boundary between them."""
    result = fn()
    if backward is not None:
        if counters is not None:
            counters.read()
        with record_function(_BACKWARD_MARK):
            backward(result)
    if counters is not None:
        counters.read()
    return result


def _read_tree(tree: Sequence[Any], device: torch.device) -> tuple[list[Event], list[int]]:
    """Return the allocator events of ``device`` in order of time, and the start times of the backward marks."""
    events: list[Event] = []
    marks: list[int] = []
    for node, parent in _walk(tree):
        if node.name == _BACKWARD_MARK:
            marks.append(node.start_time_ns)
        elif node.name == _ALLOCATION and node.extra_fields.device.type == device.type:
            if device.index is not None and node.extra_fields.device.index not in (device.index, None):
                continue
            fields = node.extra_fields
            op = parent.name if parent is not None and parent.name != _BACKWARD_MARK else ""
            events.append(Event(node.start_time_ns, fields.alloc_size, fields.ptr, op))
    events.sort(key=lambda event: event.ns)
    return events, marks


def _walk(tree: Iterable[Any]) -> Iterator[tuple[Any, Any | None]]:
    """Yield every node with its parent, parents first; iterative, since a profile nests as deep as the calls do."""
    stack: list[tuple[Any, Any | None]] = [(node, None) for node in reversed(list(tree))]
    while stack:
        node, parent = stack.pop()
        yield node, parent
        stack.extend((child, node) for child in reversed(node.children))


def replay(events: Sequence[Event], *, boundary_ns: int | None = None) -> PeakReport:
    """Add ``events`` up in the order given; ``boundary_ns`` splits them into forward and backward."""
    start = events[0].ns if events else 0
    live: dict[int, Event] = {}
    alive: list[Event] = []
    points = [(0, 0)]
    total = peak = peak_ns = foreign = 0
    for event in events:
        foreign += event.delta_bytes <= 0 and event.address not in live
        total += _apply(event, live)
        points.append((event.ns - start, total))
        if total > peak:
            peak, peak_ns, alive = total, event.ns - start, list(live.values())
    report = PeakReport(peak, total, tuple(points), peak_ns, alive_at_peak=_blocks(alive), foreign_frees=foreign)
    return report if boundary_ns is None else _split(report, boundary_ns - start)


def _apply(event: Event, live: dict[int, Event]) -> int:
    """Update the table of live blocks; return the change of the total, 0 for the release of a block we never saw."""
    gone = live.pop(event.address, None)
    before = gone.delta_bytes if gone is not None else 0
    if event.delta_bytes <= 0:
        return -before
    live[event.address] = event  # an address handed out again was released out of our sight
    return event.delta_bytes - before


def _split(report: PeakReport, boundary_ns: int) -> PeakReport:
    """Fill in the figures of the two halves, from the timeline."""
    forward = [total for ns, total in report.timeline if ns < boundary_ns] or [0]
    backward = [total for ns, total in report.timeline if ns >= boundary_ns]
    return replace(
        report,
        saved_bytes=forward[-1],
        forward_peak_bytes=max(forward),
        backward_peak_bytes=max([forward[-1], *backward]),
    )


def _blocks(events: Iterable[Event]) -> tuple[Block, ...]:
    return tuple(sorted((Block(e.delta_bytes, e.op) for e in events), key=lambda b: -b.size_bytes))
