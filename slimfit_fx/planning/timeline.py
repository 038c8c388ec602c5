"""The memory of one step in the order of its events, and who is alive at its peak: data for charts and tables.

Formatting is elsewhere: chart.py (text), picture.py (PNG and HTML), table.py (who is alive).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from slimfit_fx.planning.labels import read_label
from slimfit_fx.planning.peak import StepTrace


@dataclass(frozen=True)
class AliveRow:
    """Blocks of one name that are alive at the peak. ``kind``: ``saved``, ``gradient`` or ``temporary``."""

    kind: str
    what: str
    module: str
    """The module that made the value; empty where it is not known."""
    count: int
    size_bytes: int
    """Of all ``count`` blocks."""


@dataclass(frozen=True)
class Timeline:
    """One training step, in bytes above what is there before it (parameters, optimizer state, the batch)."""

    forward: tuple[int, ...]
    """After every allocation and release of forward."""
    backward: tuple[int, ...]
    """The same of backward."""
    update: tuple[int, int] | tuple[()]
    """Gradients when backward is done, then the most that the optimizer's step takes; empty if it is not known."""
    peak_bytes: int
    """Of forward and backward."""
    saved_bytes: int
    """Held between them."""
    alive: tuple[AliveRow, ...]
    """Who is alive at the peak, largest first."""

    @property
    def highest_bytes(self) -> int:
        """The highest point of all three phases."""
        return max((0, *self.forward, *self.backward, *self.update))

    @property
    def phase(self) -> str:
        """Where the highest point is: ``forward``, ``backward`` or ``optimizer step``."""
        phases = {"forward": self.forward, "backward": self.backward, "optimizer step": self.update}
        return max(phases, key=lambda name: max(phases[name], default=0))


def read_timeline(trace: StepTrace, open_gates: Collection[int], *, update_bytes: int | None = None) -> Timeline:
    """The step of ``trace`` with these gates open; ``update_bytes`` is what the optimizer's step takes."""
    peak = trace.peak(open_gates)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for alive in peak.alive_at_peak:
        label = read_label(alive.label)
        groups.setdefault((label.kind, label.what, label.module), []).append(alive.size_bytes)
    rows = [AliveRow(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
    return Timeline(
        forward=peak.timeline[: trace.boundary],
        backward=peak.timeline[trace.boundary :],
        update=() if update_bytes is None else (peak.end_bytes, update_bytes),
        peak_bytes=peak.peak_bytes,
        saved_bytes=peak.saved_bytes,
        alive=tuple(sorted(rows, key=lambda row: -row.size_bytes)),
    )
