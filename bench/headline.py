"""The two headline cases under a hard cap: BERT-base on SQuAD's shapes and ViT-B/16 at 384 pixels, both batch 128.

A run trains some steps and must not run out of memory. On a GPU the cap is the caching allocator's own
(``torch.cuda.set_per_process_memory_fraction``), so fragmentation counts. On a CPU nothing can be capped: the total of
each step, by allocator events, is held against the cap. 1 GB = 10^9 bytes.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from bench import emulated_gpu, report
from bench.cells import Cell, measure_on_cpu
from bench.rivals import Settings, make_trainee
from bench.settings import case_of, setting_of
from bench.tasks import Task

TASKS = ("SQuAD 2.0", "ImageNet")
CAPS_GB = (32, 16, 12)
RIVALS = ("balanced", "balanced-cheap", "max", "budget", "eager-attention", "eager", "compile", "checkpoint")
"""``budget``: the planner, with what the cap leaves when a tenth is kept free for fragmentation and the batch."""
STEPS = 50
_SHARE_FOR_PLANNER = 0.9


@dataclass(frozen=True)
class Outcome:
    """How a run under a cap ended. ``reason``: why it did not fit; empty if it did."""

    fits: bool
    steps: int
    """Finished ones."""
    total_bytes: int | None
    reserved_bytes: int | None
    seconds: float
    last_loss: float | None
    reason: str = ""


def cap_fraction(cap_bytes: int, device_bytes: int) -> float:
    """Return the share of the device's memory that is ``cap_bytes``; all of it if there is less.

    Raises:
        ValueError: the cap is not positive.
    """
    if cap_bytes <= 0:
        raise ValueError(f"a cap must be positive, got {cap_bytes} bytes")
    return min(1.0, cap_bytes / device_bytes)


def rival_under(name: str, cap_bytes: int) -> str:
    """Return the rival's full name: the planner is told its budget."""
    return f"budget-{int(_SHARE_FOR_PLANNER * cap_bytes)}" if name == "budget" else name


def task_of(task: str, rival: str, cap_gb: int, *, dtype: str, device: str, limit_s: float) -> Task:
    """Return the work of one run, as a process of its own."""
    arguments = ("--task", task, "--rival", rival, "--cap-gb", str(cap_gb), "--dtype", dtype, "--device", device)
    key = f"{task}, {dtype}, {cap_gb} GB, {rival}"
    return Task(key, "bench.headline", arguments, limit_s, (("PYTORCH_ALLOC_CONF", "expandable_segments:True"),))


def train(task: str, rival: str, cap_bytes: int, *, dtype: str, device: str, steps: int, batch: int | None) -> Outcome:
    """Train ``steps`` steps in ``cap_bytes``."""
    setting = setting_of(task)
    case = case_of(setting, dtype=dtype, device=device, batch=batch)
    settings, name, began = Settings(setting.freeze_rate), rival_under(rival, cap_bytes), perf_counter()
    if torch.device(device).type != "cuda":
        cell = Cell(task, rival, dtype, device, "measured", batch)
        figures = measure_on_cpu(make_trainee(name, case, settings), steps)
        fits = figures.total_bytes <= cap_bytes
        reason = "" if fits else f"a step takes {figures.total_bytes} bytes in all ({cell.key})"
        return Outcome(fits, steps, figures.total_bytes, None, perf_counter() - began, None, reason)
    return _under_cap(name, case, settings, cap_bytes, steps)


def _under_cap(name: str, case: Any, settings: Settings, cap_bytes: int, steps: int) -> Outcome:
    device, done, loss, began = torch.device(case.device), 0, None, perf_counter()
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_fraction(cap_bytes, whole), device)
    reason = ""
    try:
        trainee = make_trainee(name, case, settings)
        for _ in range(steps):
            trainee.clear()
            value = trainee.forward()
            trainee.backward(value)
            trainee.update()
            loss, done = None if emulated_gpu.is_active() else float(value.detach()), done + 1
        if not math.isfinite(loss or 0.0):
            reason = f"the loss is {loss}"
    except torch.cuda.OutOfMemoryError as error:
        reason = f"out of memory in step {done + 1}: {_wanted(error)}, {_where(error)}"
    except ValueError as error:
        reason = f"refused: {str(error)[:300]}"
    most, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Outcome(not reason, done, most, reserved, perf_counter() - began, loss, reason)


def _wanted(error: BaseException) -> str:
    found = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
    return found.group().lower() if found else str(error)[:200]


def _where(error: BaseException) -> str:
    """The line of code that ran out of memory."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {last.name}: {last.line}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one run, and write how it ended to ``--out``."""
    parser = argparse.ArgumentParser("python -m bench.headline", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--rival", choices=RIVALS, required=True)
    parser.add_argument("--cap-gb", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, help="default: the setting's own")
    parser.add_argument("--out", required=True)
    given = parser.parse_args(arguments)
    outcome = train(
        given.task, given.rival, int(given.cap_gb * 1e9), dtype=given.dtype, device=given.device, steps=given.steps,
        batch=given.batch,
    )  # fmt: skip
    report.write_out(given.out, {"task": given.task, "rival": given.rival, "cap_gb": given.cap_gb,
                                 "dtype": given.dtype, "outcome": asdict(outcome)})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
