"""A plan's timeline as a picture: a PNG drawn by matplotlib, or one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from slimfit_fx.planning.rows import MemoryPlan
from slimfit_fx.planning.timeline import Timeline

_INK, _QUIET, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_BEFORE, _AFTER = "#9aa3b2", "#0f766e"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 960, 380, 70, 40, 30
_UPDATE_SHARE = 0.12
"""Of the width: the optimizer's step."""


def save_picture(plan: MemoryPlan, path: Path) -> None:
    """Write the timeline of ``plan`` as ``path``, a ``.png`` or ``.html`` file.

    Raises:
        ModuleNotFoundError: a PNG is wanted and matplotlib is not installed.
        ValueError: another kind of file, or the plan has no timeline.
    """
    curves = _curves(plan)
    if path.suffix == ".html":
        path.write_text(_page(plan, curves), encoding="utf-8")
    elif path.suffix == ".png":
        _draw(plan, curves, path)
    else:
        raise ValueError(f"picture must be a .png or .html file, got {str(path)!r}")


def check_picture(path: Path, kinds: Sequence[str] = (".png", ".html")) -> None:
    """Say at once what ``save_picture`` would refuse. ``kinds``: the file names that it knows.

    Raises:
        ModuleNotFoundError: as ``save_picture``.
        ValueError: as ``save_picture``, or the folder does not exist.
    """
    if path.suffix not in kinds:
        raise ValueError(f"picture must be a {' or '.join(kinds)} file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"picture: there is no folder {str(path.parent)!r}")
    if path.suffix == ".png":
        _matplotlib()


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is needed for a PNG: install it, or ask for a .html file") from error


def _curves(plan: MemoryPlan) -> list[tuple[str, str, Timeline]]:
    """(name, colour, timeline), plain torch.compile first."""
    if plan.timeline is None:
        raise ValueError(f"this plan has no timeline: {plan.peak_unknown or 'make it with peak=True'}")
    ours = (f"slimfit_fx, {plan.preset}", _AFTER, plan.timeline)
    return [ours] if plan.before is None else [("torch.compile", _BEFORE, plan.before), ours]


def curve_points(timeline: Timeline) -> list[tuple[float, int]]:
    """(x, bytes): forward from 0 to 1, backward from 1 to 2, the optimizer's step from 2 on.

    Phases are equally wide, whatever the number of their events, so that two steps can be compared.
    """
    points = [(0.0, 0)]
    for start, values in enumerate((timeline.forward, timeline.backward)):
        points += [(start + (i + 1) / len(values), value) for i, value in enumerate(values)]
    if timeline.update:
        end, most = timeline.update
        points += [(2.0, end), (2 + _UPDATE_SHARE, most), (2 + 2 * _UPDATE_SHARE, most)]
    return points


def _draw(plan: MemoryPlan, curves: Sequence[tuple[str, str, Timeline]], path: Path) -> None:
    _matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    top = max(t.highest_bytes for _, _, t in curves) / 1e6
    for name, colour, timeline in curves:
        points = curve_points(timeline)
        x, mb = [p for p, _ in points], [size / 1e6 for _, size in points]
        axes.fill_between(x, mb, step="post", color=colour, alpha=0.22, linewidth=0)
        label = f"{name}: {timeline.highest_bytes / 1e6:,.0f} MB in {timeline.phase}"
        axes.step(x, mb, where="post", color=colour, linewidth=1.5, label=label)
    for edge, text in enumerate(("forward", "backward", "optimizer step")):
        axes.axvline(edge, color=_QUIET, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.annotate(text, (edge, 1.12 * top), (4, -12), textcoords="offset points", fontsize=9, color=_QUIET)
    axes.set(ylim=(0, 1.12 * top), xlim=(0, 2 + 2 * _UPDATE_SHARE), xticks=[])
    axes.set_ylabel("MB above what is there before the step", color=_QUIET)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title(plan), fontsize=12, color=_INK, loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93), labelcolor=_INK)
    figure.savefig(path)


def _title(plan: MemoryPlan) -> str:
    return f"Predicted memory of one training step, worst choice of units at freeze rate {plan.freeze_rate:g}"


def _page(plan: MemoryPlan, curves: Sequence[tuple[str, str, Timeline]]) -> str:
    top = 1.1 * max(t.highest_bytes for _, _, t in curves)
    drawn = "".join(_svg_curve(name, colour, timeline, top) for name, colour, timeline in curves)
    legend = "".join(
        f'<p><span style="color:{colour}">&#9632;</span> {html.escape(name)}: '
        f"<b>{timeline.highest_bytes / 1e6:,.1f} MB</b> in {timeline.phase}</p>"
        for name, colour, timeline in curves
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>slimfit_fx: memory of one step</title>'
        f"<style>body{{font:14px sans-serif;color:{_INK};max-width:1100px;margin:2em auto}}p{{margin:.2em 0}}"
        "table{border-collapse:collapse;font-size:12px}td,th{padding:2px 8px;text-align:left}</style></head><body>"
        f"<h2>{html.escape(_title(plan))}</h2>{legend}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{_axes(top)}{drawn}</svg>{plan._repr_html_()}</body></html>'
    )


def _place(x: float, size: float, top: float) -> tuple[float, float]:
    across = _LEFT + (_WIDTH - _LEFT) * x / (2 + 2 * _UPDATE_SHARE)
    return across, _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * size / top


def _svg_curve(name: str, colour: str, timeline: Timeline, top: float) -> str:
    steps, height = [], 0
    for x, size in curve_points(timeline):
        steps += [_place(x, height, top), _place(x, size, top)]
        height = size
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
    base = _place(0, 0, top)[1]
    closed = f"{_LEFT},{base:.1f} {path} {steps[-1][0]:.1f},{base:.1f}"
    return (
        f'<polygon points="{closed}" fill="{colour}" fill-opacity="0.2"/>'
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5">'
        f"<title>{html.escape(name)}</title></polyline>"
    )


def _axes(top: float) -> str:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = _place(0, share * top, top)
        parts.append(f'<line x1="{x}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(x - 6, y + 4, f"{share * top / 1e6:,.0f}", anchor="end"))
    for edge, name in enumerate(("forward", "backward", "optimizer step")):
        x, y = _place(edge, 0, top)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y}" stroke="{_QUIET}" stroke-dasharray="3 2"/>')
        parts.append(_text(x + 4, y + 16, name))
    return "".join(parts) + _text(4, 16, "MB above what is there before the step")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="{_QUIET}" text-anchor="{anchor}">{text}</text>'
