"""How long a process needs to issue a step to a GPU: ``python -m bench.emulated_gpu -m bench host-time``.

A GPU that is fast enough waits for Python: a step of short kernels takes as long as the process needs to start them.
On the emulated GPU, whose kernels do nothing, a step takes that time and no more. So what is measured here is a lower
bound of a step's time, and at the small settings of the paper about that time itself.

A virtual machine is now fast, now slow. So between steps a loop of plain Python and small tensors is timed as well, the
step counts in units of it, and figures are given as if the loop had always taken what it took at its fastest. Each
rival has a process of its own, which is started ``--rounds`` times, all rivals in turn; the median round counts.
Nothing else should run. Results go to ``bench/results/host-time-emulated.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate

from bench import emulated_gpu, report
from bench.models import DTYPES
from bench.rivals import Settings, Trainee, make_trainee
from bench.settings import TASKS, case_of, setting_of
from bench.time import time_step

RIVALS = ("eager", "compile", "balanced-cheap", "balanced", "max")
WARM_UP, STEPS, ROUNDS = 24, 100, 3
"""Steps before anything is timed (every unit opens once in ten or twenty); timed steps; processes of each rival."""
PARTS = ("forward", "backward", "update", "step")
HEADS = ("", *(f"{part} ms" for part in PARTS), "step / eager's", "allocations")
FORMATS = ("", ".1f", ".1f", ".1f", ".1f", ".2f", ".0f")


def reference_s() -> float:
    """Return how long this process takes for a fixed piece of work like a step's: Python, and calls into torch."""
    tensor, found = torch.empty(4), []
    began = perf_counter()
    for _ in range(3000):
        found.append(tensor.view(2, 2))
    for number in range(20_000):
        number + 1  # noqa: B018 (it is the work)
    return perf_counter() - began


def measure(trainee: Trainee, steps: int = STEPS, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Return the medians of each part of a step in units of ``reference_s``, and the smallest of that."""
    for _ in range(warm_up):
        trainee.step()
    before = allocations(trainee.case.device)
    found, references = [], []
    for _ in range(steps):
        around = [reference_s()]
        parts = time_step(trainee, perf_counter)
        around.append(reference_s())
        references += around
        found.append({part: parts[f"{part}_s"] / statistics.mean(around) for part in PARTS})
    made = (allocations(trainee.case.device) - before) / steps
    medians = {part: statistics.median(step[part] for step in found) for part in PARTS}
    return {**medians, "reference_s": min(references), "allocations": made}


def allocations(device: str) -> int:
    """Return how many blocks PyTorch's allocator has handed out so far; 0 on a CPU, where it does not count them."""
    if torch.device(device).type != "cuda":
        return 0
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def combine(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rounds of one rival, and the median of each figure over those that did not fail."""
    good = [one for one in rounds if "error" not in one]
    if not good:
        return {"error": rounds[0]["error"], "rounds": list(rounds)}
    figures = (*PARTS, "allocations")
    return {"rounds": list(rounds), **{name: statistics.median(one[name] for one in good) for name in figures}}


def in_ms(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Return what a unit is: the reference at its fastest over all rounds of all rivals."""
    return 1e3 * min(one["reference_s"] for row in results.values() for one in row["rounds"] if "error" not in one)


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Return a line for each rival of one case that did not fail."""
    good = {name: row for name, row in results.items() if "error" not in row}
    if not good:
        return []
    unit, eager = in_ms(good), good.get("eager")
    return [
        [f"`{name}`", *(unit * row[part] for part in PARTS), eager and row["step"] / eager["step"], row["allocations"]]
        for name, row in good.items()
    ]


def run_rounds(rivals: Sequence[str], rounds: int, work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return the combined rounds of each rival; ``work`` runs one."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name in rivals:
            found[name].append(work(name))
    return {name: combine(rows) for name, rows in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every rival at every setting, print the tables, store them."""
    parser = argparse.ArgumentParser("python -m bench host-time", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["CoLA", "CIFAR-10"], help="of the paper's")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["tf32"])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rival:
        setting = setting_of(given.tasks[0])
        case = case_of(setting, dtype=given.dtypes[0], device=given.device)
        report.write_out(given.out, measure(make_trainee(given.rival, case, Settings(setting.freeze_rate))))
        return 0
    report.check_rivals(given.rivals, parser)
    kind = emulated_gpu.kind_of(given.device)
    cases: dict[str, Any] = report.stored(f"host-time-{kind}").get("cases", {})
    failed = False
    for task in given.tasks:
        for dtype in given.dtypes:
            shared = ["--tasks", task, "--dtypes", dtype, "--device", given.device]
            results = run_rounds(
                given.rivals,
                given.rounds,
                lambda name, shared=shared: report.run_worker(  # type: ignore[misc]
                    "bench.host_time", [*shared, "--rival", name], timeout_s=600
                ),
            )
            case = f"{task}, {dtype}"
            cases[case] = {"results": results, **report.stamp(given.device, "bench.host_time")}
            print(f"{case}:\n{tabulate(lines(results), headers=HEADS, floatfmt=FORMATS, missingval='-')}", flush=True)
            report.print_errors(results)
            failed |= any("error" in row for row in results.values())
            if not given.no_save:
                report.save(f"host-time-{kind}", {"cases": cases}, device=given.device, module="bench.host_time")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
