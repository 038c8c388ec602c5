"""A timeline as text: a small block chart of the bytes that are alive over forward, backward and optimizer step.

::

    slimfit_fx, worst choice of 11 open units: 175.6 MB
      176 MB |            ▁▃█▆
             |      ▂▄▆████████▅▃▁
             |▁▃▅▇████████████████▇▅▂▁
             |forward    |backward      |optimizer step
"""

from __future__ import annotations

from collections.abc import Sequence

from slimfit_fx.planning.timeline import Timeline

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .:-=+*%#"
_UPDATE_COLUMNS = 14
"""Wide enough for its name."""


def draw_chart(
    timeline: Timeline, *, top_bytes: int, width: int = 88, height: int = 6, ascii_only: bool = False
) -> list[str]:
    """The lines of the chart. Its upper edge is ``top_bytes``; a column shows the most of the events it stands for."""
    marks = ASCII if ascii_only else BLOCKS
    phases = {"forward": timeline.forward, "backward": timeline.backward, "optimizer step": timeline.update}
    shares = _columns(timeline, width)
    levels = [_spread(phases[name], columns) for name, columns in shares.items()]
    axis = f"{top_bytes / 1e6:,.{0 if top_bytes >= 1e8 else 1}f} MB"
    lines = []
    for row in reversed(range(height)):
        body = "|".join("".join(_mark(value, top_bytes, row, height, marks) for value in part) for part in levels)
        lines.append(f"{axis if row == height - 1 else '':>12} |{body}".rstrip())
    names = "|".join(name[:columns].ljust(columns) for name, columns in shares.items())
    return [*lines, f"{'':>12} |{names}".rstrip()]


def _columns(timeline: Timeline, width: int) -> dict[str, int]:
    """Columns of each phase: by the number of its events, but never too few to be seen."""
    update = _UPDATE_COLUMNS if timeline.update else 0
    events = max(1, len(timeline.forward) + len(timeline.backward))
    rest = width - update
    forward = min(rest - 10, max(10, round(rest * len(timeline.forward) / events)))
    found = {"forward": forward, "backward": rest - forward}
    return {**found, "optimizer step": update} if update else found


def _spread(values: Sequence[int], columns: int) -> list[int]:
    """The largest value that falls into each column; fewer values than columns are repeated."""
    if not values:
        return [0] * columns
    bounds = [len(values) * c // columns for c in range(columns + 1)]
    return [max(values[a : max(b, a + 1)]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _mark(value: int, top: int, row: int, height: int, marks: str) -> str:
    full = len(marks) - 1
    eighths = round(value / max(1, top) * height * full) - row * full
    return marks[min(full, max(0, eighths))]
