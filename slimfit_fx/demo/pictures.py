"""Two pictures of a fine-tuning: which units trained in which step, and memory over one step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_fx.demo.training import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _QUIET, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = ("#9aa3b2", "#0f766e")
"""Plain torch.compile, slimfit_fx."""
_CLOSED, _OPEN = "#eef1f5", "#0f766e"
_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")


def draw_gates(names: Sequence[str], history: Iterable[tuple[int, frozenset[str]]], path: Path) -> None:
    """Write a heat map of units x steps, and how often each unit trained, as a PNG.

    Args:
        names: the units, in model order.
        history: (step, units that trained in it), in order of the steps.
        path: of the picture.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    opened = [units for _, units in history]
    matrix = np.array([[name in units for units in opened] for name in names], dtype=float)
    figure = Figure(figsize=(12.5, 1.5 + 0.185 * len(names)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    left.imshow(matrix, aspect="auto", interpolation="nearest", cmap=ListedColormap([_CLOSED, _OPEN]), vmin=0, vmax=1)
    left.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7.5)
    left.set_xlabel("step")
    right.barh(range(len(names)), matrix.sum(axis=1), height=0.72, color=_OPEN)
    right.set_xlabel("steps trained")
    for axes in (left, right):
        _separate_layers(axes, names)
        _tidy(axes)
    _name_layers(right, names)
    legend = [Patch(color=_OPEN, label="trains"), Patch(facecolor=_CLOSED, edgecolor=_GRID, label="frozen")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    figure.suptitle(
        f"Which units train in which step: {1 - matrix.mean():.0%} of {len(names)} are frozen, "
        f"{int(matrix.any(axis=1).sum())} had their turn",
        fontsize=12, color=_INK, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path)


def draw_memory(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write memory over the measured step with the highest peak, one curve per outcome (two at most), as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for outcome, colour in zip(outcomes, _COLOURS, strict=False):
        _draw_step(axes, outcome, colour)
    axes.set_xlabel("time in the step, ms (with the profiler on)")
    axes.set_ylabel("MB above parameters and optimizer state")
    axes.set_ylim(0, 1.18 * max(outcome.memory.peak_bytes for outcome in outcomes) / 1e6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    _tidy(axes)
    axes.set_title("Memory over one training step (the worst one measured)", fontsize=12, color=_INK, loc="left")
    figure.savefig(path)


def _draw_step(axes: Axes, outcome: Outcome, colour: str) -> None:
    """Draw the curve, its peak in figures and the moment at which backward began."""
    memory = outcome.memory
    ms = [ns / 1e6 for ns, _ in memory.timeline]
    mb = [total / 1e6 for _, total in memory.timeline]
    axes.fill_between(ms, mb, step="post", color=colour, alpha=0.22, linewidth=0)
    axes.step(ms, mb, where="post", color=colour, linewidth=1.6)
    peak_ms, peak_mb = memory.peak_ns / 1e6, memory.peak_bytes / 1e6
    axes.plot(peak_ms, peak_mb, "o", color=colour, markersize=5)
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": _INK}
    axes.annotate(f"{outcome.name}: {peak_mb:.0f} MB", (peak_ms, peak_mb), (0, 8), fontsize=10, **text)
    at = memory.backward_ns / 1e6
    height = max((total for ns, total in memory.timeline if ns <= memory.backward_ns), default=0) / 1e6
    axes.plot([at, at], [0, height], color=colour, linewidth=1, linestyle=(0, (3, 2)))
    axes.annotate("backward", (at, 0), (4, 4), fontsize=8, textcoords="offset points", color=_QUIET)


def _short(name: str) -> str:
    """``"vit.layers.0.attention.q_proj.weight"`` as ``"attention.q_proj"``: its layer is written aside."""
    name = name.removesuffix(".weight")
    layer = _LAYER.search(name)
    return name[layer.end() :] if layer else name.partition(".")[2] or name


def _layers(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (number, first row, last row) of each run of units of one layer; the number is "" outside of layers."""
    runs: list[tuple[str, int, int]] = []
    for row, name in enumerate(names):
        found = _LAYER.search(name)
        number = found[1] if found else ""
        if runs and runs[-1][0] == number:
            runs[-1] = (number, runs[-1][1], row)
        else:
            runs.append((number, row, row))
    return runs


def _separate_layers(axes: Axes, names: Sequence[str]) -> None:
    for _, first, _ in _layers(names)[1:]:
        axes.axhline(first - 0.5, color="white", linewidth=2.5)
        axes.axhline(first - 0.5, color=_QUIET, linewidth=0.6)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Write the layers' names along the right side."""
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "rotation": 270, "va": "center", "clip_on": False}
    for number, first, last in _layers(names):
        if number:
            axes.text(1.06, (first + last) / 2, f"layer {number}", fontsize=8.5, color=_QUIET, **place)


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_QUIET, length=0)
    axes.xaxis.label.set_color(_QUIET)
    axes.yaxis.label.set_color(_QUIET)
