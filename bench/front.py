"""Memory against throughput, all rivals, on BERT-base and ViT-B: ``python -m bench front``.

One plot per model (PNG, and the data as JSON beside it) with the Pareto front drawn: what nothing else beats in both.
The goal is that no rival's point lies beyond ours. On a GPU both are measured. On a CPU they are predicted: memory by
dry runs, throughput by what a roofline expects of forward and backward; ``--how measured`` measures there, too, with
the batch cut to ``--tokens``, but times of one process after the other differ by a quarter on the machines we had.
``python -m bench.emulated_gpu -m bench front --how predicted`` predicts those of a GPU: its kernels, by the rates of an
H200, as if nothing was lost between them.
Cells are those of ``python -m bench memory`` and stored with them, but for those that are measured on a CPU or
predicted for a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench import report
from bench.cells import HOW, Cell, Figures, figures_of, scaled
from bench.models import set_up
from bench.paper_table import store_of
from bench.rivals import ACTIVATION_BUDGETS, PRESETS, preset_of
from bench.tasks import Store, machines, print_progress, run_tasks
from slimfit_fx.planning.roofline import roofline_of

MODELS = {"bert": "CoLA", "vit": "CIFAR-10"}
"""Name in files -> the setting whose shapes are drawn."""
OURS = tuple(f"{preset}{level}" for level in ("", "-cheap", "-products", "-blocks") for preset in PRESETS) + tuple(
    f"lora-{preset}{level}-open" for level in ("-cheap", "-blocks") for preset in ("exact", "balanced", "max")
)
OTHERS = (
    *("compile", "eager", "eager-attention", "checkpoint", "compile-checkpoint", "lora", "lora-checkpoint"),
    *ACTIVATION_BUDGETS,
)
_STEPS = 10
"""Of ours, measured for their memory on a CPU."""


@dataclass(frozen=True)
class Point:
    """One way to train. ``ours``: slimfit_fx."""

    rival: str
    ours: bool
    total_bytes: int
    samples_per_s: float
    on_front: bool = False


def points_of(rows: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell]) -> list[Point]:
    """Return the points of the cells that have both figures, the least memory first.

    Expectations of different rooflines do not compare: those by the rates that most cells have are taken.
    """
    known = [(cell, found) for cell in cells if isinstance(found := figures_of(rows, cell), Figures)]
    rates = [found.roofline for _, found in known if _is_expected(found)]
    points = []
    for cell, found in known:
        rate = throughput(found)
        if rate is None or (_is_expected(found) and found.roofline != max(rates, key=rates.count)):
            continue
        points.append(Point(cell.rival, preset_of(cell.rival) is not None, found.total_bytes, rate))
    return mark_front(points)


def _is_expected(figures: Figures) -> bool:
    """Whether the throughput is the roofline's."""
    return figures.how == "predicted" and figures.expected_ms is not None


def throughput(figures: Figures) -> float | None:
    """Samples per second: measured, or expected by the roofline where nothing was measured."""
    if figures.how == "predicted" and figures.expected_ms is not None:
        return 1e3 * figures.batch / figures.expected_ms
    return figures.samples_per_s


def mark_front(points: Sequence[Point]) -> list[Point]:
    """The points by memory; those that no other beats are marked."""
    marked = [Point(**{**asdict(p), "on_front": not any(beats(q, p) for q in points)}) for p in points]
    return sorted(marked, key=lambda p: (p.total_bytes, -p.samples_per_s))


def beats(one: Point, other: Point) -> bool:
    """Whether ``one`` is no worse in both, and better in one."""
    no_worse = one.total_bytes <= other.total_bytes and one.samples_per_s >= other.samples_per_s
    return no_worse and (one.total_bytes, one.samples_per_s) != (other.total_bytes, other.samples_per_s)


def beyond_ours(points: Sequence[Point]) -> list[Point]:
    """The rivals' points that none of ours beats or equals: the goal is that there are none."""
    ours = [p for p in points if p.ours]

    def reached(p: Point) -> bool:
        return any(q.total_bytes <= p.total_bytes and q.samples_per_s >= p.samples_per_s for q in ours)

    return [p for p in points if not p.ours and not reached(p)]


def front_table(points: Sequence[Point], tablefmt: str = "simple") -> str:
    """Format one line per point."""
    body = [
        [f"slimfit_fx {p.rival}" if p.ours else p.rival, p.total_bytes / 1e9, p.samples_per_s, "*" * p.on_front]
        for p in points
    ]
    heads = ["", "GB in all", "samples/s", "front"]
    return str(tabulate(body, headers=heads, tablefmt=tablefmt, floatfmt=("", ".2f", ".2f")))


def labels_of(points: Sequence[Point]) -> list[tuple[str, tuple[float, float]]]:
    """Return what is written at which (GB, samples per second): points that lie on one another share a line."""
    found: dict[tuple[float, float], list[str]] = {}
    for p in points:
        place = (p.total_bytes / 1e9, p.samples_per_s)
        near = (q for q in found if all(abs(a - b) <= 0.01 * max(a, b) for a, b in zip(place, q, strict=True)))
        found.setdefault(next(near, place), []).append(p.rival)
    return [(", ".join(names), place) for place, names in found.items()]


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw ``points`` into a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for ours, colour, label in ((True, "#0f766e", "slimfit_fx"), (False, "#9aa3b2", "rivals")):
        chosen = [p for p in points if p.ours is ours]
        places = [(p.total_bytes / 1e9, p.samples_per_s) for p in chosen]
        axes.scatter([x for x, _ in places], [y for _, y in places], color=colour, label=label, zorder=3)
        for text, place in labels_of(chosen):
            axes.annotate(text, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    line = [(p.total_bytes / 1e9, p.samples_per_s) for p in points if p.on_front]
    axes.plot([x for x, _ in line], [y for _, y in line], color="#b45309", linewidth=1, label="front")
    axes.set(xlabel="memory in all, GB", ylabel="samples per second", title=title.replace(": ", "\n", 1))
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)


def cells(model: str, *, dtype: str, device: str, how: str, tokens: int = 0) -> list[Cell]:
    """Return the cells of one plot: ours, then everybody else. ``tokens``: of a batch that is measured on a CPU."""
    found = [Cell(MODELS[model], rival, dtype, device, how) for rival in (*OURS, *OTHERS)]
    if how == "predicted" or torch.device(device).type == "cuda":
        return found
    return [replace(scaled(cell, tokens), steps=_STEPS, times=True) for cell in found]


def title_of(model: str, cell: Cell) -> str:
    """Say what the plot that ``cell`` belongs to shows, and whether it is measured."""
    case = cell.case
    size = f"{case.resolution} pixels" if model == "vit" else f"length {case.length}"
    name = {"bert": "BERT-base", "vit": "ViT-B/16"}[model]
    launches = ", without launches" * (torch.device(cell.device).type == "cuda")
    predicted = f"predicted (throughput: roofline, forward and backward{launches})"
    source = "measured" if cell.how == "measured" else predicted
    return f"{name}, batch {case.batch}, {size}, {case.dtype}, {torch.device(cell.device).type}: {source}"


def front_store(device: str, how: str) -> Store:
    """Return where the cells lie: with those of the tables, or, if these have no such figures, in their own file."""
    kind = torch.device(device).type
    is_apart = (kind, how) in {("cpu", "measured"), ("cuda", "predicted")}
    return Store(report.RESULTS / f"points-{kind}.json") if is_apart else store_of(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables, draw the plots; return 1 with ``--check`` if a rival's point is beyond."""
    options = parse(arguments)
    store = front_store(options.device, options.how)
    status = 0
    for model in options.models:
        chosen = cells(model, dtype=options.dtype, device=options.device, how=options.how, tokens=options.tokens)
        lacks = _other_rates(options.device, options.dtype) if options.how == "predicted" else lambda row: False
        progress = run_tasks(
            [cell.as_task(options.limit) for cell in chosen], store, device=options.device, minutes=options.minutes,
            again=options.again, jobs=options.jobs, lacks=lacks,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        print_progress(progress, store.rows)
        sources = machines(store.rows[cell.key] for cell in chosen if cell.key in store.rows)
        status |= _publish(title_of(model, chosen[0]), points_of(store.rows, chosen), sources, model, options)
    return status if options.check else 0


def _other_rates(device: str, dtype: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the throughput of a stored result was expected by other rates than this machine's."""
    set_up(dtype)  # rates depend on it
    here = asdict(roofline_of(torch.device(device)))
    return lambda row: "figures" in row and row["figures"].get("roofline") != here


def _publish(title: str, points: Sequence[Point], sources: Sequence[str], model: str, options: Any) -> int:
    beyond = beyond_ours(points)
    print(f"\n{title}\n{front_table(points)}")
    print(f"rivals' points beyond ours: {', '.join(p.rival for p in beyond) or 'none'}")
    if points:
        kind = torch.device(options.device).type + "-predicted" * (options.how == "predicted")
        path = report.RESULTS / f"front-{model}-{options.dtype}-{kind}"
        document = {"title": title, "how": options.how, "sources": sources, "points": [asdict(p) for p in points]}
        path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        draw(points, title, path.with_suffix(".png"))
        print(f"written: {path.name}.json, {path.name}.png")
    return int(bool(beyond) or not points)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench front", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", help="default: tf32 on a GPU, fp32 on a CPU")
    parser.add_argument("--how", choices=HOW, help="default: measured on a GPU, predicted on a CPU")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch that is measured on a CPU")
    parser.add_argument("--minutes", type=float, help="stop in time; run again to go on")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one point may take")
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    parser.add_argument("--jobs", type=int, default=1, help="points side by side, where they are predicted")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a rival's point lies beyond ours")
    options = parser.parse_args(arguments)
    on_gpu = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ("tf32" if on_gpu else "fp32")
    options.how = options.how or ("measured" if on_gpu else "predicted")
    if options.jobs > 1 and options.how != "predicted":
        parser.error(f"--jobs {options.jobs}: what is {options.how} runs one by one, for the sake of times")
    return options


if __name__ == "__main__":
    sys.exit(main())
