"""What the scheduler itself costs in a step: ``python -m bench.schedule --layers 12``.

Nothing is compiled or trained: the session is driven as a step drives it (gates, copies of the open units, distances,
decision) on a model of the real size, and only its own work is timed. Compare with the step times of ``bench.time``.
Results go to ``bench/results/schedule-*.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

import slimfit_fx
from bench import report
from bench.models import Case, build_model, make_case


def time_steps(case: Case, steps: int, rate: float) -> dict[str, Any]:
    """Milliseconds of scheduling per step: medians, and the quickest, of ``steps`` steps after all first visits."""
    model = build_model(case)
    slimfit_fx.optimize(model, executor="interpreter", freeze_rate=rate)
    session = slimfit_fx.session(model)
    tracker, held = session._tracker, frozenset(id(param) for param in model.parameters())
    visits = -(-len(session.gates.names) // session.scheduler.open_count)
    found, parts = [], []
    for number in range(visits + steps):
        marks = [perf_counter()]
        session.before_forward()
        marks.append(perf_counter())
        tracker.begin_step()
        tracker.before_step(held)
        marks.append(perf_counter())
        with torch.no_grad():
            for name in session.gates.open:
                session.gates.params_of(name)[0].mul_(1.0001 + 0.0001 * (number % 7))
        resumed = perf_counter()
        tracker.after_step()
        marks.append(marks[-1] + perf_counter() - resumed)
        if number >= visits:
            parts.append([after - before for before, after in zip(marks, marks[1:], strict=False)])
            found.append(marks[-1] - marks[0])
    names = ("before_forward_ms", "copies_ms", "distances_ms")
    medians = {n: 1000 * statistics.median(p) for n, p in zip(names, zip(*parts, strict=True), strict=True)}
    return {
        "units": len(session.gates.names),
        "step_ms": 1000 * statistics.median(found),
        "quickest_ms": 1000 * min(found),
        **medians,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--freeze-rate", type=float, default=0.9)
    given = parser.parse_args(argv)
    case = make_case("bert", layers=given.layers)
    found = time_steps(case, given.steps, given.freeze_rate)
    document = {"case": case.to_dict(), "freeze_rate": given.freeze_rate, "steps": given.steps, "schedule": found}
    path = report.save(f"schedule-{case.name}", document, device="cpu", module="bench.schedule")
    sys.stdout.write(f"{found}\n{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
