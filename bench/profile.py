"""Where the time of a step goes: ``python -m bench.profile --rivals eager compile balanced --device cuda``.

On a GPU a step of short kernels takes as long as the Python that starts them. So three times are told apart: how long
the process takes to issue forward, backward and update; how long the device computes; how long a step takes when many
follow each other. Besides: the kernels that take longest, the Python functions that do, and how attention is computed,
since a product of all pairs of tokens where a fused kernel was meant is a matter of memory, too.

Each rival has a process of its own. Results go to ``bench/results/profile-*``.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from bench import report
from bench.rivals import Settings, Trainee, make_trainee
from bench.settings import TASKS, case_of, setting_of
from bench.time import time_step, waiting_clock

WARM_UP, STEPS, SHOWN = 14, 20, 30
"""Steps before anything is timed (every unit opens once in ten); steps of each measurement; lines of each list."""


@dataclass(frozen=True)
class Profile:
    """One rival's step, in milliseconds."""

    step_ms: float
    """When steps follow each other."""
    issue_ms: dict[str, float]
    """Forward, backward, update until the call returns; wait: until the device is done. Medians."""
    device_ms: float | None
    """What the kernels of a step take; None on a CPU, where nothing runs beside the process."""
    kernels: float
    """Kernels of a step; on a CPU operators."""
    longest: list[tuple[str, float, float]]
    """(kernel or operator, ms per step, calls per step), the longest first."""
    python: list[tuple[str, float, float]]
    """(function, own ms per step, calls per step), the longest first. Under a profiler, which slows Python down."""
    attention: list[str]
    """Operators of attention, and batched products, by name: those of a step."""


def measure(trainee: Trainee, steps: int = STEPS, warm_up: int = WARM_UP) -> Profile:
    """Profile steps of ``trainee``."""
    on_gpu, wait = torch.device(trainee.case.device).type == "cuda", waiting_clock(trainee.case.device)
    for _ in range(warm_up):
        trainee.step()
    began = wait()
    for _ in range(steps):
        trainee.step()
    step_ms = 1e3 * (wait() - began) / steps
    parts = [_issue(trainee, wait) for _ in range(steps)]
    issue_ms = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            trainee.step()
        wait()
    events = recorded.key_averages()
    names = sorted({e.key for e in events if "attention" in e.key or "bmm" in e.key})
    ran = [e for e in events if (e.self_device_time_total if on_gpu else e.self_cpu_time_total) > 0]
    if on_gpu:
        ran = [e for e in ran if e.device_type == torch.autograd.DeviceType.CUDA]
    cost = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3 / steps for e in ran}
    calls = {e.key: e.count / steps for e in ran}
    longest = sorted(((key, ms, calls[key]) for key, ms in cost.items()), key=lambda row: -row[1])
    return Profile(
        step_ms=step_ms,
        issue_ms=issue_ms,
        device_ms=sum(cost.values()) if on_gpu else None,
        kernels=sum(calls.values()),
        longest=longest[:SHOWN],
        python=_python(trainee, steps, wait),
        attention=names,
    )


def _issue(trainee: Trainee, wait: Callable[[], float]) -> dict[str, float]:
    began = wait()
    parts = time_step(trainee, perf_counter)
    waited_s = wait() - began - parts["step_s"]
    return {**{name: 1e3 * parts[f"{name}_s"] for name in ("forward", "backward", "update")}, "wait": 1e3 * waited_s}


def _python(trainee: Trainee, steps: int, wait: Callable[[], float]) -> list[tuple[str, float, float]]:
    """Functions by their own time. A backward that runs in a thread of autograd (on a GPU) is not seen."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        trainee.step()
    profiler.disable()
    wait()
    found = [
        (f"{path.rpartition('site-packages/')[2]}:{line} {name}", 1e3 * own / steps, calls / steps)
        for (path, line, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(found, key=lambda row: -row[1])[:SHOWN]


def as_table(profiles: dict[str, dict[str, Any]]) -> str:
    """One line per rival."""
    lines = [
        [name, p["step_ms"], *(p["issue_ms"][part] for part in ("forward", "backward", "update", "wait")),
         p["device_ms"], p["kernels"], ", ".join(p["attention"])]
        for name, p in profiles.items() if "error" not in p
    ]  # fmt: skip
    headers = ["", "step ms", "issue forward", "backward", "update", "then wait", "device ms", "kernels", "attention"]
    return str(tabulate(lines, headers=headers, floatfmt=".2f", missingval="-"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile every rival, print the tables, store them."""
    parser = argparse.ArgumentParser("python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="CoLA", help="of the paper's settings")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, help="default: the setting's own")
    parser.add_argument("--dtype", default="tf32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rivals", nargs="+", default=["eager", "compile", "balanced"])
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    setting = setting_of(given.task)
    case = replace(case_of(setting, dtype=given.dtype, device=given.device, batch=given.batch), layers=given.layers)
    if given.rival:
        found = measure(make_trainee(given.rival, case, Settings(setting.freeze_rate)))
        report.write_out(given.out, asdict(found))
        return 0
    report.check_rivals(given.rivals, parser)
    passed_on = report.forward_options(given, leave_out=("rivals", "rival", "no_save", "out"))
    found = {
        name: report.run_worker("bench.profile", [*passed_on, "--rival", name], timeout_s=600) for name in given.rivals
    }
    print(as_table(found))
    for name, one in found.items():
        for part in ("longest", "python") if "error" not in one else ():
            print(f"\n{name}, {part}:\n{tabulate(one[part], headers=['', 'ms', 'calls'], floatfmt='.3f')}")
    report.print_errors(found)
    if not given.no_save:
        document = {"case": case.to_dict(), "freeze_rate": setting.freeze_rate, "runs": found}
        path = report.save(f"profile-{case.name}", document, device=given.device, module="bench.profile")
        print(f"written: {path.name}")
    return int(any("error" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
