"""Memory against time as a PNG: one dot per way to train, the front drawn as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Point = tuple[str, bool, int, float, bool]
"""(name, ours, bytes, ms, on the front)."""


def draw_front(points: Sequence[Point], path: Path) -> None:
    """Draw ``points`` into ``path``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is needed for a picture: install it") from error
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for ours, colour, label in ((True, "#0f766e", "slimfit_fx"), (False, "#9aa3b2", "rivals")):
        chosen = [p for p in points if p[1] is ours]
        axes.scatter([p[2] / 1e6 for p in chosen], [p[3] for p in chosen], color=colour, label=label, zorder=3)
        for name, _, peak, ms, _ in chosen:
            axes.annotate(name, (peak / 1e6, ms), fontsize=7, xytext=(4, 3), textcoords="offset points")
    front = sorted((p[2] / 1e6, p[3]) for p in points if p[4])
    axes.plot([x for x, _ in front], [y for _, y in front], color="#0f766e", linewidth=1, alpha=0.6)
    axes.set_xlabel("step peak, MB (predicted)")
    axes.set_ylabel("forward + backward, ms (expected by the roofline)")
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)
