"""Work that is done piece by piece: each in a process of its own, stored as soon as it is finished.

A run that is stopped goes on where it was: what is stored is not done again. With a deadline nothing is begun that the
deadline leaves no time for, and a piece that the deadline cuts short counts as not done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

import torch

from bench import report

_LEAST_S = 20.0
"""With less time than this to the deadline nothing is begun."""


@dataclass(frozen=True)
class Task:
    """One call of ``python -m module arguments --out FILE``; ``key`` names its result."""

    key: str
    module: str
    arguments: tuple[str, ...]
    limit_s: float = 900.0
    environment: tuple[tuple[str, str], ...] = ()


class Store:
    """Results by key in one JSON file, rewritten after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else {}

    def put(self, key: str, row: Mapping[str, Any], *, device: str) -> None:
        """Keep ``row``, with the machine, the versions, the commit and the time."""
        self.rows[key] = {**row, "machine": report.machine(device), "commit": report.commit(), "date": report.now()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        os.replace(draft, self.path)


@dataclass(frozen=True)
class Progress:
    """How far a run came. ``failed``: keys of the tasks whose result is an error."""

    done: int
    left: int
    failed: tuple[str, ...]


def run_tasks(
    tasks: Sequence[Task],
    store: Store,
    *,
    device: str,
    minutes: float | None = None,
    again: bool = False,
    jobs: int = 1,
    lacks: Callable[[Mapping[str, Any]], bool] = lambda row: False,
    say: Callable[[str], None] = lambda _: None,
    run: Callable[..., dict[str, Any]] = report.run_worker,
    clock: Callable[[], float] = monotonic,
) -> Progress:
    """Do the tasks that ``store`` has no result of, in order, until ``minutes`` are over.

    Args:
        tasks: what is to be done; tasks of one key are done once.
        store: where results go.
        device: whose machine is noted with them.
        minutes: the time that may be taken; None: as long as it takes.
        again: do all of them, also those that are stored.
        jobs: how many are done side by side; times that they measure mean nothing then (``without_times``).
        lacks: says of a stored result that it is to be found out again.
        say: called with a line per task.
        run: does one task; for tests.
        clock: seconds; for tests.
    """
    end = None if minutes is None else clock() + 60 * minutes
    firsts: dict[str, Task] = {}
    for task in tasks:
        firsts.setdefault(task.key, task)
    unique = list(firsts.values())
    pending = [t for t in unique if again or t.key not in store.rows or lacks(store.rows[t.key])]
    numbers = iter(range(1, len(pending) + 1))
    lock = Lock()

    def do(task: Task) -> bool:
        """Do one and keep its result; False if the time is over."""
        with lock:
            room = None if end is None else end - clock()
            if room is not None and room < _LEAST_S:
                return False
            say(f"{next(numbers)} of {len(pending)}: {task.key} ...")
        limit = task.limit_s if room is None else min(task.limit_s, room)
        outcome = run(task.module, list(task.arguments), environment=dict(task.environment), timeout_s=limit)
        if outcome.get("timed_out") and limit < task.limit_s:
            return False
        row = {k: v for k, v in outcome.items() if k != "timed_out"}
        with lock:
            store.put(task.key, row if jobs == 1 else without_times(row), device=device)
        return True

    if jobs == 1:
        all(map(do, pending))  # up to the first that there is no time for
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(do, pending))
    left = sum(task.key not in store.rows for task in unique)
    failed = tuple(task.key for task in unique if "error" in store.rows.get(task.key, {}))
    return Progress(len(unique) - left, left, failed)


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without the times in it: others used the device while they were measured."""
    figures = row.get("figures")
    kept = {k: v for k, v in row.items() if k != "seconds"}
    return {**kept, "figures": {**figures, "step_ms": None}} if isinstance(figures, Mapping) else kept


def lacks_times(row: Mapping[str, Any]) -> bool:
    """Whether ``without_times`` took the step time of a measured cell."""
    figures = row.get("figures")
    return isinstance(figures, Mapping) and figures.get("step_ms", 0.0) is None


def print_progress(progress: Progress, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how far it came, and why what failed did."""
    for key in progress.failed:
        print(f"{key} failed: {rows[key]['error']}")
    print(f"{progress.done} done, {progress.left} left" + ("; run it again to go on" if progress.left else ""))


def has_device(device: str) -> bool:
    """Whether this machine has it."""
    return torch.device(device).type != "cuda" or torch.cuda.is_available()


def machines(rows: Iterable[Mapping[str, Any]], *, commits: bool = True) -> list[str]:
    """Return one line for each machine that the rows come from: processor or accelerator, versions, commits."""
    lines: dict[str, set[str]] = {}
    for row in rows:
        machine = row["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        line = f"{device_of(machine)}; Python {machine['python']}, {versions}"
        lines.setdefault(line, set()).add(short_commit(row))
    if not commits:
        return sorted(lines)
    return [f"{line}; commit {', '.join(sorted(found))}" for line, found in sorted(lines.items())]


def device_of(machine: Mapping[str, Any]) -> str:
    """Return the accelerator's name, or the processor's and how many threads torch had of it."""
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    threads = machine["torch_threads"]
    return f"{machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}"


def short_commit(row: Mapping[str, Any]) -> str:
    """Return the commit that a row was measured at, as tables show it; "+" behind it: files differed from it."""
    commit = row.get("commit") or "no commit"
    return commit[:10] + ("+" if commit.endswith("+") else "")
