"""Everything that a GPU can tell, in calls of a few minutes: ``python -m bench gpu --minutes 9``, until none is left.

In this order, so that a short loan of a machine tells most:

1. ``headline``: BERT-base on SQuAD's shapes and ViT-B/16 at 384 pixels, batch 128, under caps of 32, 16 and 12 GB;
2. ``profile``: where a step's time goes when kernels are short, and which operators attention becomes;
3. ``table``: the paper's twelve settings, every rival, TF32 and then bf16: memory and throughput;
4. ``front``: what the plots need beyond that;
5. ``compile``: compile times, cold and warm;
6. ``trainer``: the Hugging Face Trainer with and without us;
7. ``peak``: predicted against measured peaks.

On the emulated GPU (``python -m bench.emulated_gpu -m bench gpu --only headline table peak``) the groups that tell of
memory alone can be had without a GPU.

Memory does not depend on who else uses the GPU: ``--jobs 8`` finds it out for eight pieces side by side, and leaves
step times for a later call without ``--jobs``. Each piece has a process of its own and is stored at once
(``bench/results/*-cuda.json``), so a call that is cut short loses one piece at most. Without ``--minutes`` it runs to
the end. ``python -m bench report`` renders what is there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from time import monotonic

from bench import front, headline, peak, report, trainer
from bench.emulated_gpu import how_on_gpu, kind_of
from bench.paper_table import DTYPES, RIVALS, cells, store_of
from bench.settings import TASKS
from bench.tasks import Store, Task, has_device, lacks_times, print_progress, run_tasks

LIMIT_S = 500.0
"""For one piece; less than the shortest useful ``--minutes``."""
_PROFILED = ("eager", "compile", "balanced")
_COMPILED = ("compile", "balanced", "exact", "max")
_COMPILE_CASE = ("--layers", "12", "--batch", "32", "--dtype", "tf32")


def headline_tasks(device: str) -> list[Task]:
    """Both cases, ours first under every cap."""
    return [
        headline.task_of(task, rival, cap, dtype=dtype, device=device, limit_s=LIMIT_S)
        for dtype in DTYPES["cuda"]
        for rival in headline.RIVALS
        for cap in headline.CAPS_GB
        for task in headline.TASKS
    ]


def profile_tasks(device: str) -> list[Task]:
    """A step of BERT with short kernels, and one of a ViT whose tokens divide by nothing."""
    return [
        Task(
            f"profile, {task}, {layers} layers, {dtype}, {name}", "bench.profile",
            ("--task", task, "--layers", layers, "--dtype", dtype, "--rival", name, "--device", device), LIMIT_S,
        )
        for dtype in DTYPES["cuda"] for task, layers in (("CoLA", "12"), ("ImageNet", "2")) for name in _PROFILED
    ]  # fmt: skip


def table_tasks(device: str) -> list[Task]:
    """The twelve settings."""
    chosen = cells(device, [how_on_gpu()], DTYPES["cuda"], TASKS, RIVALS, 0)
    return [cell.as_task(LIMIT_S) for cell in chosen]


def front_tasks(device: str) -> list[Task]:
    """The points of both plots."""
    return [
        cell.as_task(LIMIT_S)
        for dtype in DTYPES["cuda"]
        for model in front.MODELS
        for cell in front.cells(model, dtype=dtype, device=device, how="measured")
    ]


def compile_tasks(device: str) -> list[Task]:
    """Cold and warm compile times, each rival in empty caches of its own."""
    return [
        Task(f"compile, {name}", "bench.gpu", ("--compile", name, "--device", device), LIMIT_S) for name in _COMPILED
    ]


def trainer_tasks(device: str) -> list[Task]:
    """200 steps of each rival under the Hugging Face Trainer."""
    return [
        Task(f"trainer, {name}", "bench.trainer", ("--rival", name, "--device", device), LIMIT_S)
        for name in trainer.RIVALS
    ]


def peak_tasks(device: str) -> list[Task]:
    """Predicted against measured peaks."""
    return [
        Task(f"peak, {number}", "bench.peak", ("--device", device, "--worker", str(number)), LIMIT_S)
        for number in range(len(peak.cases(device)))
    ]


GROUPS: dict[str, Callable[[str], list[Task]]] = {
    "headline": headline_tasks,
    "profile": profile_tasks,
    "table": table_tasks,
    "front": front_tasks,
    "compile": compile_tasks,
    "trainer": trainer_tasks,
    "peak": peak_tasks,
}
"""In the order in which they run."""


def stores(device: str) -> dict[str, Store]:
    """Where each group's results go; the front's cells lie with the table's."""
    kind = kind_of(device)
    own = {
        name: Store(report.RESULTS / f"gpu-{name}-{kind}.json")
        for name in ("headline", "profile", "compile", "trainer", "peak")
    }
    table = store_of(device)
    return {**own, "table": table, "front": table}


def time_compiles(name: str, device: str) -> dict[str, float]:
    """Return the seconds that ``name`` takes to compile, cold and warm."""
    from bench import time

    options = time.parse([*_COMPILE_CASE, "--device", device, "--rivals", name, "--no-save"])
    found: dict[str, float] = time.bench_compile(options, report.case_of(options))[name]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, for as long as ``--minutes`` allows; return 0 when nothing is left."""
    options = parse(arguments)
    if options.compile:
        report.write_out(options.out, time_compiles(options.compile, options.device))
        return 0
    kept, began, left = stores(options.device), monotonic(), 0
    if not options.list and not has_device(options.device):
        print(f"python -m bench gpu: there is no {options.device} here; --list shows what it would do", file=sys.stderr)
        return 2
    for name in options.only:
        tasks = [task for task in GROUPS[name](options.device) if re.search(options.match, task.key)]
        if options.list:
            for key in dict.fromkeys(task.key for task in tasks):
                print(f"{'done' if key in kept[name].rows else '    '} {name}: {key}")
            continue
        minutes = None if options.minutes is None else options.minutes - (monotonic() - began) / 60
        progress = run_tasks(
            tasks, kept[name], device=options.device, minutes=minutes, again=options.again,
            jobs=options.jobs, lacks=lacks_times if options.jobs == 1 else lambda row: False,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        print(f"\n{name}:")
        print_progress(progress, kept[name].rows)
        left += progress.left
    return int(left > 0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, help="time for this call; default: until all is done")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    parser.add_argument("--jobs", type=int, default=1, help="pieces side by side: for memory alone, not for times")
    parser.add_argument("--match", default="", metavar="REGEX", help="only pieces whose key contains it")
    parser.add_argument("--list", action="store_true", help="print the pieces and run nothing")
    parser.add_argument("--compile", choices=_COMPILED, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
