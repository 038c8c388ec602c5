"""The paper's twelve settings, trained by every rival: ``python -m bench memory``.

Memory in all on the device, step time, samples per second and recompiles (bench/cells.py says what is counted). On a
GPU everything is measured at the settings' own batches. On a CPU the batch is cut to ``--tokens`` for what is measured,
and the full batch is predicted; the tables say which, and never mix the two. Each cell has a process of its own and is
stored as soon as it is done, in ``bench/results/twelve-*.json``: a run that was stopped goes on when started again.
``python -m bench.emulated_gpu -m bench memory`` finds out what all of it takes on a GPU, without one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate

from bench import report
from bench.cells import HOW, Cell, Figures, figures_of, scaled
from bench.emulated_gpu import how_on_gpu, kind_of
from bench.rivals import ACTIVATION_BUDGETS, preset_of
from bench.settings import TASKS
from bench.tasks import Store, print_progress, run_tasks

BASELINES = ("eager-attention", "eager", "compile")
RIVALS = (
    *("eager-attention", "eager", "balanced", "balanced-cheap", "compile"),
    *("checkpoint", "lora", "lora-checkpoint", "max", "exact"),
    *("compile-checkpoint", "paper", "budget-50%", "budget-25%", "budget-10%", *ACTIVATION_BUDGETS),
)
"""In the order in which they are run: what the table cannot do without comes first."""
DTYPES = {"cuda": ("tf32", "bf16"), "cpu": ("fp32", "bf16")}
GOALS = {"eager-attention": 4.4, "eager": 3.0}
"""How many times less memory preset ``balanced`` shall take, mean over the twelve."""
HELD_TO_GOALS = ("balanced", "balanced-cheap")


def cells(
    device: str, hows: Sequence[str], dtypes: Sequence[str], tasks: Sequence[str], rivals: Sequence[str], tokens: int
) -> list[Cell]:
    """Return all cells, rival by rival; what is measured on a CPU has its batch cut to ``tokens``."""
    found = []
    for dtype in dtypes:
        for rival in rivals:
            for task in tasks:
                for how in hows:
                    cell = Cell(task, rival, dtype, device, how)
                    found.append(scaled(cell, tokens) if how == "measured" and device == "cpu" else cell)
    return found


def pairs(dtypes: Sequence[str], tasks: Sequence[str], rivals: Sequence[str], tokens: int) -> list[tuple[Cell, Cell]]:
    """Return (measured, predicted) cells of one and the same cut batch on a CPU."""
    measured = cells("cpu", ["measured"], dtypes, tasks, rivals, tokens)
    return [(cell, replace(cell, how="predicted")) for cell in measured]


def error_table(
    rows: Mapping[str, Mapping[str, Any]], found: Sequence[tuple[Cell, Cell]], tablefmt: str = "simple"
) -> str:
    """Format predicted against measured totals: one line per rival, the error in percent per setting; "" if none."""
    body = []
    for rival in dict.fromkeys(cell.rival for cell, _ in found):
        mine = {m.task: prediction_error(rows, m, p) for m, p in found if m.rival == rival}
        if any(error is not None for error in mine.values()):
            body.append([_shown(rival), *("-" if e is None else f"{e:+.1%}" for e in mine.values())])
    tasks = list(dict.fromkeys(cell.task for cell, _ in found))
    return str(tabulate(body, headers=["", *tasks], tablefmt=tablefmt, disable_numparse=True)) if body else ""


def prediction_error(rows: Mapping[str, Mapping[str, Any]], measured: Cell, predicted: Cell) -> float | None:
    """Return how far the predicted total lies above the measured one; None unless both are known."""
    one, other = figures_of(rows, measured), figures_of(rows, predicted)
    if not isinstance(one, Figures) or not isinstance(other, Figures):
        return None
    return other.total_bytes / one.total_bytes - 1


@dataclass(frozen=True)
class Line:
    """One rival's line of the table: means over all settings, None unless every one of them has a figure."""

    rival: str
    done: int
    failed: int
    mean_bytes: float | None
    ratios: tuple[float | None, ...]
    """How many times less than each of ``BASELINES``: the mean of the settings' ratios, as the paper averages."""
    step_ms: float | None
    samples_per_s: float | None
    recompiles: int | None


def lines(rows: Mapping[str, Mapping[str, Any]], table: Sequence[Cell]) -> list[Line]:
    """Sum up ``table``, the cells of one way of finding out and one dtype."""
    by_place = {(cell.rival, cell.task): figures_of(rows, cell) for cell in table}
    tasks = list(dict.fromkeys(cell.task for cell in table))
    return [_line(rival, tasks, by_place) for rival in dict.fromkeys(cell.rival for cell in table)]


def _line(rival: str, tasks: Sequence[str], by_place: Mapping[tuple[str, str], Figures | str | None]) -> Line:
    mine = [by_place[rival, task] for task in tasks]
    known = [found for found in mine if isinstance(found, Figures)]
    whole = len(known) == len(tasks)
    return Line(
        rival,
        done=sum(found is not None for found in mine),
        failed=sum(isinstance(found, str) for found in mine),
        mean_bytes=_mean(found.total_bytes for found in known) if whole else None,
        ratios=tuple(_mean_ratio(known, base, tasks, by_place) if whole else None for base in BASELINES),
        step_ms=_mean(found.step_ms for found in known) if whole else None,
        samples_per_s=_mean(found.samples_per_s for found in known) if whole else None,
        recompiles=_most(found.recompiles for found in known),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def _mean_ratio(
    mine: Sequence[Figures], base: str, tasks: Sequence[str], by_place: Mapping[tuple[str, str], Any]
) -> float | None:
    others = [by_place.get((base, task)) for task in tasks]
    if not all(isinstance(other, Figures) for other in others):
        return None
    return statistics.fmean(
        other.total_bytes / found.total_bytes for other, found in zip(others, mine, strict=True) if other is not None
    )


def _most(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def mean_table(found: Sequence[Line], tablefmt: str = "simple") -> str:
    """Format the means: one line per rival."""
    body = [
        [_shown(line.rival), None if line.mean_bytes is None else line.mean_bytes / 1e9, *line.ratios, line.step_ms,
         line.samples_per_s, line.recompiles, _remark(line)]
        for line in found if line.done
    ]  # fmt: skip
    heads = ["", "mean GB", *(f"{base} / it" for base in BASELINES), "ms per step", "samples/s", "recompiles", ""]
    return str(
        tabulate(body, headers=heads, tablefmt=tablefmt, floatfmt=("", *[".2f"] * 4, ".1f", ".1f"), missingval="-")
    )


def _shown(rival: str) -> str:
    return rival if preset_of(rival) is None else f"slimfit_fx {rival}"


def _remark(line: Line) -> str:
    parts = [
        f"{line.failed} failed" if line.failed else "",
        f"{line.done} of {len(TASKS)} done" * (line.done < len(TASKS)),
    ]
    return ", ".join(filter(None, parts))


def task_table(rows: Mapping[str, Mapping[str, Any]], table: Sequence[Cell], tablefmt: str = "simple") -> str:
    """Format GB in all: one line per rival, one column per setting; the error's kind where a cell failed."""
    tasks = list(dict.fromkeys(cell.task for cell in table))
    by_place = {(cell.rival, cell.task): figures_of(rows, cell) for cell in table}
    body = []
    for rival in dict.fromkeys(cell.rival for cell in table):
        mine = [by_place[rival, task] for task in tasks]
        if any(found is not None for found in mine):
            body.append([_shown(rival), *map(_gigabytes, mine)])
    return str(tabulate(body, headers=["GB", *tasks], tablefmt=tablefmt, missingval="-", disable_numparse=True))


def _gigabytes(found: Figures | str | None) -> str:
    if isinstance(found, str):
        return error_kind(found)
    return "-" if found is None else f"{found.total_bytes / 1e9:.2f}"


def error_kind(text: str) -> str:
    """Return the name of the error that a worker ended with, as short as a table needs it."""
    words = [word.strip(":").rpartition(".")[2] for word in text.split()]
    return next((word for word in words if word.endswith(("Error", "Exception", "Unsupported"))), "failed")


def verdicts(found: Sequence[Line]) -> list[str]:
    """Say of each goal whether ``balanced`` reaches it, also with cheap recompute; nothing while cells are missing."""
    said = []
    for mine in (line for line in found if line.rival in HELD_TO_GOALS):
        for base, value in zip(BASELINES, mine.ratios, strict=True):
            if base in GOALS and value is not None:
                bound = report.Bound(mine.rival, base, GOALS[base], at_least=True)
                said.append(f"{mine.rival}, {base} / it: {value:.2f}, wanted {bound.text}: {bound.verdict(value)}")
    return said


def ceiling(rows: Mapping[str, Mapping[str, Any]], table: Sequence[Cell], base: str) -> float | None:
    """Return the mean ratio of a step that took nothing above parameters, AdamW's state of all of them, and the batch.

    No way to train can do better in fp32 with AdamW that trains every parameter at some time.
    """
    found = {cell.task: figures_of(rows, cell) for cell in table if cell.rival == base}
    known = [f for f in found.values() if isinstance(f, Figures)]
    if not known or len(known) < len(found):
        return None
    return statistics.fmean(f.total_bytes / (f.parameter_bytes + f.optimizer_bytes + f.batch_bytes) for f in known)


def bound_by_update(rows: Mapping[str, Mapping[str, Any]], table: Sequence[Cell], rival: str) -> tuple[int, int]:
    """(settings in which the optimizer's step of ``rival`` takes more than forward and backward, settings known)."""
    found = [figures_of(rows, cell) for cell in table if cell.rival == rival]
    known = [f for f in found if isinstance(f, Figures) and f.step_bytes is not None and f.update_bytes is not None]
    return sum((f.update_bytes or 0) > (f.step_bytes or 0) for f in known), len(known)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench memory", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--how", nargs="+", choices=HOW, help="default: measured on a GPU, both on a CPU")
    parser.add_argument("--dtypes", nargs="+", help="default: tf32 bf16 on a GPU, fp32 bf16 on a CPU")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), metavar="RIVAL", help="see bench/rivals.py")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch that is measured on a CPU")
    parser.add_argument("--minutes", type=float, help="stop in time; run again to go on")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one cell may take")
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side: for memory alone, not for times")
    parser.add_argument("--validate", action="store_true", help="predict what is measured on a CPU, and compare")
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    options = parser.parse_args(arguments)
    report.check_rivals(options.rivals, parser)
    kind = torch.device(options.device).type
    options.how = options.how or ([how_on_gpu()] if kind == "cuda" else ["measured", "predicted"])
    options.dtypes = options.dtypes or list(DTYPES[kind])
    return options


def store_of(device: str) -> Store:
    """Return the stored cells of this kind of device."""
    return Store(report.RESULTS / f"twelve-{kind_of(device)}.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables."""
    options = parse(arguments)
    chosen = cells(options.device, options.how, options.dtypes, options.tasks, options.rivals, options.tokens)
    compared = pairs(options.dtypes, options.tasks, options.rivals, options.tokens) if options.validate else []
    if compared:
        chosen = [cell for pair in compared for cell in pair]
    store = store_of(options.device)
    if options.list:
        for key in dict.fromkeys(cell.key for cell in chosen):
            print(f"{'done' if key in store.rows else '    '} {key}")
        return 0
    progress = run_tasks(
        [cell.as_task(options.limit) for cell in chosen], store, device=options.device, minutes=options.minutes,
        again=options.again, jobs=options.jobs, say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    if compared:
        print(f"\npredicted above measured, total on the device\n{error_table(store.rows, compared)}")
    for how in [] if compared else options.how:
        for dtype in options.dtypes:
            table = [cell for cell in chosen if (cell.how, cell.dtype) == (how, dtype)]
            found = lines(store.rows, table)
            print(f"\n{how}, {dtype}, {options.device}; total on the device\n{task_table(store.rows, table)}")
            print(f"\n{mean_table(found)}")
            print("\n".join(verdicts(found)))
    print_progress(progress, store.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
