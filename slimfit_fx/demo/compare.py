"""Run the two fine-tunings of a task and show what came out: the plan, one table, two pictures."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
import typer
from tabulate import tabulate

import slimfit_fx
from slimfit_fx.capture.lower import has_compiler
from slimfit_fx.demo.training import Outcome, Task, fine_tune

FREEZE_RATE = 0.9
PRESET = "balanced"
_NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "transformers": "transformers"}


def run(text: bool, out: Path) -> None:
    """Fine-tune twice, print the plan and the comparison, write ``gates.png`` and ``memory.png`` into ``out``.

    Args:
        text: MiniLM on docstrings instead of a vision transformer on digits.
        out: folder for the pictures; made if it does not exist.

    Raises:
        ModuleNotFoundError: something of the extra ``demo`` (or ``text``) is not installed.
        ValueError: ``out`` is a file.
    """
    check_installed("text" if text else "demo")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {str(out)!r}, which is a file")
    from slimfit_fx.demo import tasks

    compare(tasks.docstrings_task() if text else tasks.digits_task(), out, executor=best_executor())


def compare(task: Task, out: Path, *, executor: str) -> tuple[Outcome, Outcome]:
    """Fine-tune ``task`` with torch.compile and with slimfit_fx; print and draw both. Returns the two outcomes.

    Both start from the same weights and see the same batches in the same order. ``executor`` is slimfit_fx's; with
    ``"interpreter"`` torch.compile runs without code generation as well.
    """
    from slimfit_fx.demo import pictures

    typer.echo(f"{task.title}\n{task.recipe}, the same for both\n")
    backend = "inductor" if executor == "inductor" else "aot_eager_decomp_partition"
    model = task.make_model()
    plain = fine_tune("torch.compile", model, torch.compile(model, backend=backend), task)
    model = task.make_model()
    slimfit_fx.optimize(model, preset=PRESET, freeze_rate=FREEZE_RATE, executor=executor, seed=task.recipe.seed)
    session = slimfit_fx.session(model)
    slim = fine_tune("slimfit_fx", model, model, task, gates=session.gates)

    typer.echo(f"\n{session.plan}\n\n{comparison(plain, slim)}\n")
    out.mkdir(parents=True, exist_ok=True)
    pictures.draw_gates(session.gates.names, session.gates.history, out / "gates.png")
    pictures.draw_memory((plain, slim), out / "memory.png")
    typer.echo(f"Which units trained in which step: {out / 'gates.png'}\nMemory over one step: {out / 'memory.png'}")
    return plain, slim


def comparison(plain: Outcome, slim: Outcome) -> str:
    """Return the table of both outcomes: one line per figure, the last column compares."""
    points = 100 * (slim.accuracy - plain.accuracy)
    rows = [
        ("test accuracy", f"{plain.accuracy:.1%}", f"{slim.accuracy:.1%}", f"{points:+.1f} points"),
        (
            "step peak, MB",
            f"{plain.memory.peak_bytes / 1e6:.1f}",
            f"{slim.memory.peak_bytes / 1e6:.1f}",
            f"{plain.memory.peak_bytes / slim.memory.peak_bytes:.1f}x smaller",
        ),
        ("step time, ms", f"{plain.step_ms:.0f}", f"{slim.step_ms:.0f}", f"x {slim.step_ms / plain.step_ms:.2f}"),
        ("first step, s", f"{plain.first_step_s:.0f}", f"{slim.first_step_s:.0f}", "compiles"),
        ("share frozen", f"{plain.frozen_share:.0%}", f"{slim.frozen_share:.0%}", "of the units, in each step"),
        ("recompiles", str(plain.recompiles), str(slim.recompiles), "after the first step"),
    ]
    note = (
        "step peak: most bytes allocated at one time in forward and backward, above parameters and optimizer state; "
        f"worst of {slim.measured_steps} steps.\nstep time: median of the other steps. 1 MB = 10^6 bytes."
    )
    table = tabulate(rows, headers=("", plain.name, slim.name, ""), colalign=("left", "right", "right", "left"))
    return f"{table}\n{note}"


def best_executor() -> str:
    """``"inductor"`` where it can generate code, else ``"interpreter"``, with a warning."""
    missing = has_compiler(torch.device("cpu"))
    if missing is None:
        return "inductor"
    logging.getLogger("slimfit_fx").warning("%s: both trainings run without code generation, slower", missing)
    return "interpreter"


def check_installed(extra: str) -> None:
    """Raise one ModuleNotFoundError that names all that the demo needs and this environment lacks."""
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}: pip install 'slimfit-fx[{extra}]'")
