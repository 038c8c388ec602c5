"""One cell of the tables: one of the paper's settings, trained by one rival. Measured, emulated or predicted.

Figures are everything that training holds on the device: parameters, buffers, optimizer state, the batch, and on top
the larger of the step's peak (activations, gradients, workspaces) and the optimizer's.

- Measured on a GPU: the caching allocator's peak over the steps after the first; samples per second from the median
  step. On a CPU: allocator events of each step (bench/measure.py); step times only if asked for.
- Emulated: the same on a GPU whose kernels do nothing (bench/emulated_gpu); no times.
- Predicted: bench/predict.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch

from bench import emulated_gpu, report
from bench.measure import step_peak
from bench.models import Case, parameter_bytes, state_bytes
from bench.predict import predict, tensor_bytes
from bench.rivals import Settings, Trainee, make_trainee, preset_of
from bench.settings import case_of, cpu_batch, setting_of
from bench.tasks import Task
from bench.time import noted_compiles, time_step
from slimfit_fx.planning.workspaces import library_bytes

HOW = ("measured", "emulated", "predicted")
_TIMED_STEPS = 5
_PLAIN_STEPS = 3


@dataclass(frozen=True)
class Cell:
    """What is found out. ``batch``: None for the setting's own."""

    task: str
    rival: str
    dtype: str
    device: str
    how: str
    batch: int | None = None
    steps: int = 25
    """Measured steps; on a CPU, where they are slow, the rivals whose steps do not differ take fewer."""
    times: bool = False
    """Measure step times on a CPU as well."""

    @property
    def case(self) -> Case:
        """Model and batch."""
        return case_of(setting_of(self.task), dtype=self.dtype, device=self.device, batch=self.batch)

    @property
    def settings(self) -> Settings:
        """slimfit_fx's settings."""
        return Settings(freeze_rate=setting_of(self.task).freeze_rate)

    @property
    def key(self) -> str:
        """Names the result. Tasks whose figures cannot differ share it, as CoLA and MRPC do."""
        case = self.case
        size = f"{case.resolution}px" if case.model == "vit" else f"{case.length}tok"
        rate = "" if preset_of(self.rival) is None else f" freeze{self.settings.freeze_rate:g}"
        words = "" if case.model == "vit" else f" vocab{case.vocab}"
        shape = f"{case.model} {case.batch}x{size}{words} {case.head}{case.labels}"
        return f"{self.how} {case.device} {case.dtype} {shape}{rate} {self.rival}"

    def as_task(self, limit_s: float) -> Task:
        """The work for it, as a process of its own."""
        flags = {
            "--task": self.task, "--rival": self.rival, "--dtype": self.dtype, "--device": self.device,
            "--how": self.how, "--batch": self.batch, "--steps": self.steps,
        }  # fmt: skip
        arguments = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
        return Task(self.key, "bench.cells", (*arguments, *(["--times"] if self.times else [])), limit_s)


@dataclass(frozen=True)
class Figures:
    """What was found. None where it is not known, or was not asked for."""

    how: str
    batch: int
    total_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    step_bytes: int | None = None
    """The step's peak above what is there before it."""
    update_bytes: int | None = None
    """The optimizer's, gradients included."""
    reserved_bytes: int | None = None
    """What the caching allocator took from the GPU."""
    step_ms: float | None = None
    expected_ms: float | None = None
    """Of forward and backward, by the roofline: an expectation, not a time."""
    roofline: dict[str, Any] | None = None
    """The rates that it goes by."""
    recompiles: int | None = None
    bound_bytes: int | None = None
    """Measured cells of ours: what the session predicts for the worst choice of open units, as ``total_bytes``."""
    chosen: str | None = None
    """The plan that a budget led to."""

    @property
    def samples_per_s(self) -> float | None:
        """Throughput."""
        return None if self.step_ms is None else 1e3 * self.batch / self.step_ms


def figures_of(rows: Mapping[str, Mapping[str, Any]], cell: Cell) -> Figures | str | None:
    """Return the stored figures of ``cell``, the error that it ended with, or None if it was not done."""
    row = rows.get(cell.key)
    if row is None:
        return None
    return str(row["error"]) if "error" in row else Figures(**row["figures"])


def scaled(cell: Cell, most_tokens: int) -> Cell:
    """Return ``cell`` with the batch cut to ``most_tokens``, for a CPU."""
    return replace(cell, batch=cpu_batch(setting_of(cell.task), most_tokens))


def fill(cell: Cell) -> Figures:
    """Find out the figures of ``cell``, in this process.

    Raises:
        ValueError: it cannot be planned, or nothing fits its budget.
        RuntimeError: what is emulated would be called measured, or the other way round.
    """
    name = _with_share(cell)
    if cell.how != "predicted":
        on_gpu = torch.device(cell.device).type == "cuda"
        if (cell.how == "emulated") != (on_gpu and emulated_gpu.is_active()):
            raise RuntimeError(f"{cell.how} figures were asked for {'on' if emulated_gpu.is_active() else 'without'} "
                               "the emulated GPU (python -m bench.emulated_gpu)")  # fmt: skip
        return _measure(make_trainee(name, cell.case, cell.settings), cell)
    found = predict(name, cell.case, cell.settings)
    return Figures(
        "predicted", cell.case.batch, found.total_bytes, found.parameter_bytes, found.optimizer_bytes,
        found.batch_bytes, found.step_bytes, found.update_bytes, expected_ms=found.expected_ms, roofline=found.roofline,
        chosen=found.chosen,
    )  # fmt: skip


def _with_share(cell: Cell) -> str:
    """The rival's name; a budget of N% as bytes: what is there beside the step, and N% of eager's step, predicted."""
    if not cell.rival.endswith("%"):
        return cell.rival
    kind, _, share = cell.rival.removesuffix("%").rpartition("-")
    on_cpu = replace(cell.case, device="cpu", attention_dropout=0.0, dtype=cell.dtype.replace("tf32", "fp32"))
    found = predict("eager", on_cpu, cell.settings)
    beside = found.parameter_bytes + found.buffer_bytes + found.optimizer_bytes
    return f"{kind}-{beside + int(float(share) / 100 * found.step_bytes)}"


def _measure(trainee: Trainee, cell: Cell) -> Figures:
    ours = trainee.session is not None
    with noted_compiles() as started:
        trainee.step()
        first = len(started)
        for _ in range(first_visits(trainee)):
            trainee.step()
        if torch.device(cell.device).type == "cuda":
            found = _on_gpu(trainee, cell.steps)
        else:
            found = measure_on_cpu(trainee, cell.steps if ours else _PLAIN_STEPS)
        if cell.times and found.step_ms is None:
            found = replace(found, step_ms=_step_ms(trainee, _TIMED_STEPS))
        found = replace(found, recompiles=len(started) - first)
    if not ours:
        return found
    plan = trainee.session.plan
    chosen = next((note for note in plan.notes if "memory_budget" in note), None)
    return replace(found, bound_bytes=_bound(trainee, plan, found), chosen=chosen)


def first_visits(trainee: Trainee) -> int:
    """Return after how many more steps every kernel has run once, on a GPU: a unit's own run when it opens first.

    Inductor times a kernel's variants then, in memory of its own as large as the GPU's cache. Plain rivals do that in
    their first step.
    """
    if trainee.session is None or torch.device(trainee.case.device).type != "cuda":
        return 0
    open_count = max(1, len(trainee.session.gates.open))
    return -(-len(trainee.session.gates.names) // open_count) + 1


def _bound(trainee: Trainee, plan: Any, found: Figures) -> int | None:
    if plan.peak is None:
        return None
    held = found.parameter_bytes + tensor_bytes(trainee.model.buffers()) + found.batch_bytes
    update = max(plan.timeline.update, default=0) if plan.timeline is not None else 0
    trained = tensor_bytes(p for p in trainee.model.parameters() if p.requires_grad)
    libraries = library_bytes(torch.device(trainee.case.device))
    return int(held + 2 * trained + libraries + max(plan.peak.worst_bytes, update))


def measure_on_cpu(trainee: Trainee, steps: int) -> Figures:
    """The worst of ``steps`` steps, by the allocator's events."""
    batch_bytes = tensor_bytes(trainee.batch.values())
    worst: Figures | None = None
    for _ in range(steps):
        trainee.clear()
        held = parameter_bytes(trainee.model) + state_bytes(trainee.optimizer.state)
        step = step_peak(trainee.outputs, backward=lambda outputs: trainee.backward(outputs.loss)).peak_bytes
        update = trainee.grad_bytes() + step_peak(trainee.update).peak_bytes
        total = held + tensor_bytes(trainee.model.buffers()) + batch_bytes + max(step, update)
        found = Figures(
            "measured", trainee.case.batch, total, parameter_bytes(trainee.model),
            state_bytes(trainee.optimizer.state), batch_bytes, step, update,
        )  # fmt: skip
        worst = found if worst is None or total > worst.total_bytes else worst
    assert worst is not None
    return worst


def _on_gpu(trainee: Trainee, steps: int) -> Figures:
    """The peak over ``steps`` steps, by the caching allocator's counters, and the median step time."""
    device = trainee.case.device
    trainee.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step_ms = _step_ms(trainee, steps)
    emulated = emulated_gpu.is_active()
    return Figures(
        "emulated" if emulated else "measured", trainee.case.batch, torch.cuda.max_memory_allocated(device),
        parameter_bytes(trainee.model), state_bytes(trainee.optimizer.state), tensor_bytes(trainee.batch.values()),
        reserved_bytes=torch.cuda.max_memory_reserved(device), step_ms=None if emulated else step_ms,
    )  # fmt: skip


def _step_ms(trainee: Trainee, steps: int) -> float:
    return 1e3 * statistics.median(time_step(trainee)["step_s"] for _ in range(steps))


def main(arguments: Sequence[str] | None = None) -> int:
    """Find out one cell, and write it to ``--out``."""
    parser = argparse.ArgumentParser("python -m bench.cells", description=__doc__.splitlines()[0])
    for name in ("task", "rival", "dtype", "device", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--how", choices=HOW, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=Cell.steps)
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args(arguments)
    cell = Cell(**{name: value for name, value in vars(options).items() if name != "out"})
    began = perf_counter()
    figures = asdict(fill(cell))
    report.write_out(options.out, {"cell": asdict(cell), "figures": figures, "seconds": perf_counter() - began})
    return 0


if __name__ == "__main__":
    sys.exit(main())
