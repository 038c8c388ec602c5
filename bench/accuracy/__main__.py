"""``python -m bench accuracy``: train what is missing, write each finished cell at once, print the tables.

A run that was stopped goes on where it was: give the same command again. ``--table`` only prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bench.accuracy import claims, table
from bench.accuracy.cells import METHODS, PRESETS, QUICK_METHODS, Method, Row, named_methods, slimfit
from bench.accuracy.run import count_cells, run
from bench.accuracy.side_by_side import Finished, ReadStore, train_side_by_side
from bench.accuracy.store import Store
from bench.accuracy.tasks import TASKS, named_tasks
from bench.accuracy.tasks.base import Task
from bench.accuracy.tasks.hub import PAPER_TASKS, hub_task
from bench.accuracy.train import Trainer
from bench.report import RESULTS, ROOT, commit, machine

SEEDS, QUICK_SEEDS = 5, 2
CACHE = ROOT / "build" / "accuracy"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m bench accuracy", description=__doc__)
    made.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds, fewer rates, less data")
    made.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help=f"of: {', '.join(TASKS)}")
    made.add_argument(
        "--hub", nargs="+", default=[], metavar="TASK", help=f"the paper's tasks instead, of: {', '.join(PAPER_TASKS)}"
    )
    made.add_argument(
        "--data", type=Path, help="with --hub: folder with TASK/train.parquet and so on; default: download"
    )
    made.add_argument("--weights", type=Path, help="with --hub: folder of a model; default: download the paper's")
    made.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="names as in the table")
    made.add_argument("--seeds", type=int, help=f"default {SEEDS}, {QUICK_SEEDS} with --quick")
    made.add_argument("--tuning-seeds", type=int, help="seeds that try all learning rates; default: 3, 1 with --quick")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument(
        "--executor",
        choices=("inductor", "interpreter"),
        default="interpreter",
        help="slimfit_fx's; default: interpreter, since compiling a model takes longer than training a cell",
    )
    made.add_argument("--jobs", type=int, help="methods side by side; default: one per CPU core, 1 on a GPU")
    made.add_argument("--threads", type=int, help="CPU threads of torch, of each job; default: the cores' share")
    made.add_argument("--cache", type=Path, default=CACHE, help="folder for weights that are pretrained here")
    made.add_argument("--out", type=Path, help="result file; default: bench/results/accuracy-DEVICE.jsonl")
    made.add_argument("--table", action="store_true", help="train nothing, print what is there")
    return made


def chosen_tasks(options: argparse.Namespace) -> tuple[Task, ...]:
    """The tasks that the command line asks for.

    Raises:
        ValueError: unknown names.
    """
    if options.hub:
        return tuple(hub_task(name, data=options.data, weights=options.weights) for name in options.hub)
    return named_tasks(options.tasks, "quick" if options.quick else "full", options.cache)


def chosen_methods(options: argparse.Namespace, tasks: Sequence[Task]) -> tuple[Method, ...]:
    """The methods that the command line asks for; by default also the presets at the freeze rates of the tasks.

    Raises:
        ValueError: unknown names.
    """
    of_tasks = (slimfit(preset, task.paper_rate) for task in tasks for preset in PRESETS)
    known = tuple(dict.fromkeys((*METHODS, *of_tasks)))
    if options.methods:
        return named_methods(options.methods, known)
    return QUICK_METHODS if options.quick else known


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print; return 0."""
    made = parser()
    options = made.parse_args(arguments)
    for name in ("seeds", "tuning_seeds", "jobs", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            made.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        tasks = chosen_tasks(options)
        methods = chosen_methods(options, tasks)
    except ValueError as error:
        made.error(str(error))
    store = store_of(options)
    if not options.table:
        train(tasks, methods, store, options, sys.argv[1:] if arguments is None else arguments)
    print(report(store, tasks, methods))
    return 0


def store_of(options: argparse.Namespace) -> Store:
    """Where the finished cells lie."""
    return Store(options.out or RESULTS / f"accuracy-{torch.device(options.device).type}.jsonl")


def train(
    tasks: Sequence[Task],
    methods: Sequence[Method],
    store: Store,
    options: argparse.Namespace,
    arguments: Sequence[str],
) -> None:
    """Finish the cells that ``store`` lacks, with a bar of all cells and, one after the other, one of the steps."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = options.jobs or (cores if torch.device(options.device).type == "cpu" else 1)
    jobs = min(jobs, len(tasks) * len(methods))
    torch.set_num_threads(options.threads or max(1, cores // jobs))
    made_by = {"commit": commit(), "machine": machine(options.device), "executor": options.executor}
    store.add_header({**made_by, "scale": tasks[0].scale})
    seeds = seeds_of(options)
    with tqdm(
        total=count_cells(tasks, methods, seeds, options.tuning_seeds), unit="cell", dynamic_ncols=True, smoothing=0.1
    ) as cells:

        def finished(row: Row, is_new: bool) -> None:
            cells.update(1)
            cell = row.cell
            if is_new:
                cells.write(
                    f"{cell.task} {cell.method} seed {cell.seed} lr {cell.learning_rate:g}: validation "
                    f"{row.validation:.4f}, {row.steps} steps, {row.seconds:.0f} s"
                )

        if jobs == 1:
            with tqdm(unit="step", leave=False, dynamic_ncols=True, position=1) as steps:
                run(tasks, methods, seeds, store, trainer_of(options, steps), finished, options.tuning_seeds)
            return
        for task in tasks:
            task.load(0)
            for seed in seeds:
                task.make_model(seed)  # what is made once and kept on disk is not made by several
        given = [*arguments, "--threads", str(torch.get_num_threads()), "--jobs", "1"]
        of_tasks = "--hub" if options.hub else "--tasks"
        pieces = [[*given, of_tasks, t.name, "--methods", m.name] for t in tasks for m in methods]
        train_side_by_side(pieces, jobs, train_piece, store, finished)


def train_piece(arguments: Sequence[str], finished: Finished) -> None:
    """Train what a command line asks for, and write nothing: a piece of a run with several jobs."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    tasks = chosen_tasks(options)
    known = ReadStore(store_of(options).path)
    methods = chosen_methods(options, tasks)
    run(tasks, methods, seeds_of(options), known, trainer_of(options), finished, options.tuning_seeds)


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds that are trained."""
    return range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))


def trainer_of(options: argparse.Namespace, steps: Any = None) -> Any:
    """What trains a cell. ``steps``: a bar of its steps."""

    def progress(done: int, total: int, loss: float) -> None:
        if steps is None:
            return
        if done == 1:
            steps.reset(total)
        steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
        steps.update(1)

    return Trainer(device=torch.device(options.device), executor=options.executor, progress=progress)


def report(store: Store, tasks: Sequence[Task], methods: Sequence[Method]) -> str:
    """The tables of what ``store`` holds."""
    found = {task.name: claims.standings(store.rows_of(task.name, task.scale), task, methods) for task in tasks}
    return table.report(tasks, found, claims.claims(found, tasks))


if __name__ == "__main__":
    sys.exit(main())
