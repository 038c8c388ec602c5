"""The memory of one training step as a list of events, and what any pattern of gates makes of it.

A :class:`StepTrace` holds every allocation and release of a compiled forward and backward, in order, as the generated
code makes them (dry_run.py), in bytes above what is there before the step: parameters, optimizer state, the batch.
Blocks that exist only when certain gates are open name them, so that one trace answers for every pattern:

    bytes(t | open) = sum of the blocks alive at t whose owners are nobody (always there) or meet ``open``

What happens inside a branch counts only for patterns that take the branch.

CUDA's caching allocator hands out more than is asked for (caching_allocator.py): how much depends on what earlier steps
left free. A pattern's events are replayed with it twice, from an empty one on, and the worse time counts.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimfit_fx.planning.caching_allocator import CachingAllocator
from slimfit_fx.planning.patterns import Patterns
from slimfit_fx.planning.roofline import Work


@dataclass(frozen=True)
class Event:
    """One allocation (``delta_bytes`` > 0) or release (< 0) of a block."""

    delta_bytes: int
    block: int
    """Number of the block."""
    owners: frozenset[int] = frozenset()
    """The block exists if one of these gates is open; always, if there are none."""
    branch: frozenset[int] = frozenset()
    """It happens inside a branch that runs if one of these gates is open."""
    unless: frozenset[int] = frozenset()
    """It does not happen if one of these gates is open."""


@dataclass(frozen=True)
class Alive:
    """A block that is alive at the peak."""

    label: str
    size_bytes: int
    gates: frozenset[int]


@dataclass(frozen=True)
class StepPeak:
    """What one pattern of gates makes of a step, in bytes above what is there before it."""

    peak_bytes: int
    forward_peak_bytes: int
    saved_bytes: int
    """Held between forward and backward."""
    end_bytes: int
    """Held when backward is done: the gradients, and what the user keeps."""
    timeline: tuple[int, ...]
    """Bytes after every event."""
    peak_event: int
    """Index of the event, in ``timeline``, at which the peak is reached first."""
    alive_at_peak: tuple[Alive, ...]
    """Largest first."""

    @property
    def phase(self) -> str:
        """``"forward"`` or ``"backward"``, whichever holds the peak."""
        return "forward" if self.peak_bytes == self.forward_peak_bytes else "backward"


@dataclass(frozen=True)
class StepTrace:
    """All memory events of a step. ``boundary`` is the index of the first event of backward."""

    events: tuple[Event, ...]
    boundary: int
    labels: Mapping[int, str]
    num_gates: int
    work: tuple[Work, ...] = ()
    """What the kernels do, in order; for an expectation of the time only."""
    gate_bytes: tuple[int, ...] = ()
    """Of the gradients of what each gate freezes; empty if that is not known."""
    caching: bool = False
    """Whether the blocks come from CUDA's caching allocator; the events hold what is asked for."""

    def peak(self, open_gates: Collection[int]) -> StepPeak:
        """The step with exactly these gates open."""
        chosen = frozenset(open_gates)
        return (self._handed_out(chosen) if self.caching else self)._peak(chosen)

    def _handed_out(self, chosen: frozenset[int]) -> StepTrace:
        """The same step, with the bytes that the allocator hands out, the first time or the second."""
        allocator, tries = CachingAllocator(), list[tuple[int, dict[int, int]]]()
        for _ in range(2):
            addresses, sizes, peak = dict[int, int](), dict[int, int](), 0
            for event in self.events:
                if happens(event, chosen) and event.delta_bytes > 0:
                    addresses[event.block] = allocator.take(event.delta_bytes)
                    sizes[event.block] = allocator.size_of(addresses[event.block])
                    peak = max(peak, allocator.allocated_bytes)
                elif happens(event, chosen):
                    allocator.let_go(addresses.pop(event.block))
            for address in addresses.values():
                allocator.let_go(address)
            tries.append((peak, sizes))
        most = max(tries, key=lambda found: found[0])[1]

        def handed_out(event: Event) -> Event:
            size = most.get(event.block, abs(event.delta_bytes))
            return dataclasses.replace(event, delta_bytes=size if event.delta_bytes > 0 else -size)

        return dataclasses.replace(self, events=tuple(map(handed_out, self.events)), caching=False)

    def _peak(self, chosen: frozenset[int]) -> StepPeak:
        total = peak = saved = forward_peak = 0
        peak_event, timeline, alive = 0, [], {}  # type: tuple[int, list[int], dict[int, Event]]
        at_peak: dict[int, Event] = {}
        for index, event in enumerate(self.events):
            if index == self.boundary:
                saved, forward_peak = total, peak
            if happens(event, chosen):
                total += event.delta_bytes
                alive[event.block] = event
                if event.delta_bytes < 0:
                    del alive[event.block]
                if total > peak:
                    peak, peak_event, at_peak = total, index, dict(alive)
            timeline.append(total)
        found = [Alive(self.labels.get(e.block, ""), e.delta_bytes, e.owners) for e in at_peak.values()]
        found.sort(key=lambda a: -a.size_bytes)
        if self.boundary >= len(self.events):
            saved, forward_peak = total, peak
        return StepPeak(peak, forward_peak, saved, total, tuple(timeline), peak_event, tuple(found))

    def worst(self, count: int, most_bytes: int | None = None) -> tuple[int, frozenset[int]]:
        """(upper bound on the peak over all patterns of ``count`` open gates, the pattern that it was met with).

        At every moment the ``count`` gates that own most are taken. Exact where blocks have one owner, and for no and
        for all gates; where several gates share blocks the bound may exceed what any one pattern reaches.

        ``most_bytes``: only patterns whose gradients take so many bytes at most. The bound may exceed what any of these
        reaches: gates are told apart by what they own beside gradients, which are taken for ``most_bytes`` together.

        What CUDA's caching allocator hands out beyond what is asked for is that of the pattern, or with no gate open.
        """
        allowed = Patterns(count, most_bytes, self.gate_bytes)
        bound, pattern = 0, frozenset[int]()
        for always, owned, shared, branch in self._moments():
            if branch and not count:  # nobody is there then
                continue
            best = max(branch, key=lambda gate: (owned.get(gate, 0), -gate), default=None)
            others = ((size, gate) for gate, size in owned.items() if gate != best)
            chosen = [gate for _, gate in heapq.nlargest(max(0, count - len(branch[:1])), others)]
            chosen = [*(() if best is None else (best,)), *chosen]
            total = always + sum(owned.get(gate, 0) for gate in chosen)
            if total > bound and allowed.excludes(chosen):
                total = min(total, always + allowed.most_owned(owned))
                chosen = allowed.largest(owned, first=chosen)
            if total > bound and shared:
                total = min(total, always + allowed.most_owned_once(owned, shared))
            if total > bound:
                bound, pattern = total, frozenset(chosen)
        return bound + max(map(self._more_than_asked_for, {frozenset[int](), pattern})), pattern

    def _more_than_asked_for(self, chosen: frozenset[int]) -> int:
        return self.peak(chosen).peak_bytes - self._peak(chosen).peak_bytes if self.caching else 0

    def _moments(self) -> Iterator[tuple[int, dict[int, int], dict[frozenset[int], int], Sequence[int]]]:
        """After every allocation: bytes that are always there, by gate, those of several by owners, its branch's gates.

        By gate a block of several counts for each of them.
        """
        always, owned, shared = 0, dict[int, int](), dict[frozenset[int], int]()
        for event in self.events:
            if event.unless:  # such blocks belong to everybody until the end: only ever too much
                continue
            for gate in event.owners:
                owned[gate] = owned.get(gate, 0) + event.delta_bytes
            if not event.owners:
                always += event.delta_bytes
            elif len(event.owners) > 1:
                shared[event.owners] = shared.get(event.owners, 0) + event.delta_bytes
                if not shared[event.owners]:
                    del shared[event.owners]
            if event.delta_bytes > 0:
                yield always, owned, shared, sorted(event.branch)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return {
            "events": [[e.delta_bytes, e.block, *map(sorted, (e.owners, e.branch, e.unless))] for e in self.events],
            "boundary": self.boundary,
            "labels": {str(block): label for block, label in self.labels.items()},
            "num_gates": self.num_gates,
            "work": [[w.flops, w.nbytes, w.dtype, sorted(w.gates)] for w in self.work],
            "gate_bytes": list(self.gate_bytes),
            "caching": self.caching,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepTrace:
        """The inverse of :meth:`to_dict`."""
        events = tuple(Event(delta, block, *map(frozenset, gates)) for delta, block, *gates in data["events"])
        labels = {int(block): label for block, label in data["labels"].items()}
        work = tuple(Work(f, n, dtype, frozenset(gates)) for f, n, dtype, gates in data.get("work", ()))
        gate_bytes = tuple(data.get("gate_bytes", ()))
        caching = bool(data.get("caching", False))
        return cls(events, int(data["boundary"]), labels, int(data["num_gates"]), work, gate_bytes, caching)


@dataclass(frozen=True)
class PeakForecast:
    """The peak of one step, in bytes above what is there before it, for the patterns of gates that matter."""

    closed_bytes: int
    """All units closed."""
    open_bytes: int
    """All units open."""
    worst_bytes: int
    """An upper bound for every choice of ``open_count`` open units."""
    open_count: int
    worst_units: tuple[str, ...]
    """The choice that the bound was met with."""
    alive: tuple[tuple[str, int, int], ...]
    """Who is alive at the peak of that choice: (what, how many, bytes in all), largest first."""
    most_open_bytes: int | None = None
    """What the gradients of such a choice take at most, if the scheduler sees to that."""


def forecast(
    trace: StepTrace, names: Sequence[str], open_count: int, most_open_bytes: int | None = None
) -> PeakForecast:
    """Sum ``trace`` up; ``names[k]`` names gate ``k``. ``most_open_bytes``: of gradients of open units."""
    count = min(open_count, trace.num_gates)
    bound, pattern = trace.worst(count, most_open_bytes)
    groups: dict[str, list[int]] = {}
    for alive in trace.peak(pattern).alive_at_peak:
        of = ", ".join(names[g] for g in sorted(alive.gates & pattern))
        groups.setdefault(f"{alive.label}, for {of}" if of else alive.label, []).append(alive.size_bytes)
    rows = sorted(((what, len(sizes), sum(sizes)) for what, sizes in groups.items()), key=lambda row: -row[2])
    return PeakForecast(
        closed_bytes=trace.peak(()).peak_bytes,
        open_bytes=trace.peak(range(trace.num_gates)).peak_bytes,
        worst_bytes=bound,
        open_count=count,
        worst_units=tuple(sorted(names[g] for g in pattern)),
        alive=tuple(rows),
        most_open_bytes=most_open_bytes,
    )


def happens(event: Event, chosen: frozenset[int]) -> bool:
    """Whether the event is one of a step in which these gates are open."""
    return not event.unless & chosen and (not event.owners or bool(event.owners & chosen))


def join(traces: Sequence[StepTrace], gates: Sequence[Sequence[int]]) -> StepTrace:
    """One step made of several graphs: their forwards in order, then their backwards in reverse order.

    ``gates[i][k]`` is the number, in the result, of gate ``k`` of ``traces[i]``.
    """
    forward: list[Event] = []
    backward: list[list[Event]] = []
    labels: dict[int, str] = {}
    offset = 0
    for trace, numbers in zip(traces, gates, strict=True):
        moved = [_moved(e, offset, numbers) for e in trace.events]
        labels |= {block + offset: label for block, label in trace.labels.items()}
        offset += 1 + max((e.block for e in trace.events), default=0)
        forward += moved[: trace.boundary]
        backward.append(moved[trace.boundary :])
    late = [event for events in reversed(backward) for event in events]
    total = 1 + max((g for numbers in gates for g in numbers), default=-1)
    work = tuple(
        dataclasses.replace(w, gates=frozenset(numbers[g] for g in w.gates))
        for trace, numbers in zip(traces, gates, strict=True)
        for w in trace.work
    )
    gate_bytes, caching = _joined_gate_bytes(traces, gates, total), any(trace.caching for trace in traces)
    return StepTrace(tuple(forward + late), len(forward), labels, total, work, gate_bytes, caching)


def _joined_gate_bytes(traces: Sequence[StepTrace], gates: Sequence[Sequence[int]], total: int) -> tuple[int, ...]:
    """Several graphs may use one parameter: its gradient is there once."""
    if not all(trace.gate_bytes for trace in traces if trace.num_gates):
        return ()
    found = [0] * total
    for trace, numbers in zip(traces, gates, strict=True):
        for size, number in zip(trace.gate_bytes, numbers, strict=True):
            found[number] = max(found[number], size)
    return tuple(found)


def _moved(event: Event, offset: int, numbers: Sequence[int]) -> Event:
    gates = (frozenset(numbers[g] for g in kind) for kind in (event.owners, event.branch, event.unless))
    return Event(event.delta_bytes, event.block + offset, *gates)
