"""What the scheduler itself costs in a step: ``python -m bench.schedule --layers 12``.

Two measurements, at each freeze rate:

- ``schedule``: nothing is compiled or trained; the session is driven as a step drives it (gates, copies of the open
  units, distances, decision) on a model of the real size, and only its own work is timed.
- ``training``: steps of ``balanced`` as a user takes them, with a clock around each part of the session that a step
  calls. The share is that of one and the same step, so that a machine that slows down slows both; its median must not
  exceed ``LIMIT``.

Results go to ``bench/results/schedule-*.json``; not with ``--no-training``, which leaves out the second.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate

import slimfit_fx
from bench import report
from bench.models import Case, build_model, make_case
from bench.rivals import Settings, Trainee, make_trainee

LIMIT = 0.01
"""Of a step."""
HEADS = ("freeze rate", "units", "alone ms", "in a step ms", "step ms", "share %", f"at most {LIMIT:.0%}")
FORMATS = ("", "", ".1f", ".1f", ".1f", ".2f", "")
_BOUND = report.Bound("balanced", None, LIMIT, at_least=False)
_WARM_UP = 2


def time_steps(case: Case, steps: int, rate: float) -> dict[str, Any]:
    """Milliseconds of scheduling per step: medians, and the quickest, of ``steps`` steps after all first visits."""
    model = build_model(case)
    slimfit_fx.optimize(model, executor="interpreter", freeze_rate=rate)
    session = slimfit_fx.session(model)
    tracker, held = session._tracker, frozenset(id(param) for param in model.parameters())
    visits = first_visits(session)
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


def first_visits(session: Any) -> int:
    """Steps in which ILS visits every unit once."""
    return -(-len(session.gates.names) // session.scheduler.open_count)


def time_training(case: Case, steps: int, settings: Settings) -> dict[str, Any]:
    """Whole steps of ``balanced`` after all first visits, and what the session took in each; medians, in ms."""
    torch._dynamo.reset()
    gc.collect()
    trainee = make_trainee("balanced", case, settings)
    trainee.step()
    session = trainee.session
    assert session is not None
    for _ in range(max(_WARM_UP, first_visits(session)) - 1):
        trainee.step()
    rows = [timed_step(trainee, Clock(session)) for _ in range(steps)]
    shares = [row["scheduling_ms"] / row["step_ms"] for row in rows]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"steps": steps, **medians, "share": statistics.median(shares), "shares": shares}


def timed_step(trainee: Trainee, clock: Clock) -> dict[str, float]:
    """Milliseconds of one training step, and of the session within it, by part."""
    with clock:
        began = perf_counter()
        trainee.step()
        step_s = perf_counter() - began
    parts = {f"{name}_ms": 1000 * seconds for name, seconds in clock.seconds.items()}
    return {"step_ms": 1000 * step_s, "scheduling_ms": sum(parts.values()), **parts}


class Clock:
    """While it is entered, adds up the seconds that each part of the session takes: what a step calls of it."""

    def __init__(self, session: Any) -> None:
        tracker, hooks = session._tracker, session._hooks
        self.seconds: dict[str, float] = {"before_forward": 0.0, "copies": 0.0, "distances": 0.0}
        self._calls = (
            (session, "outgrows_its_plan", "before_forward"),
            (session, "before_forward", "before_forward"),
            (hooks, "_held", "copies"),
            (tracker, "begin_step", "copies"),
            (tracker, "before_step", "copies"),
            (tracker, "after_step", "distances"),
        )

    def __enter__(self) -> Clock:
        for owner, name, part in self._calls:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, _part in self._calls:
            delattr(owner, name)  # the class's own comes to light again

    def _timed(self, call: Any, part: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += perf_counter() - began

        return timed


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bound at each freeze rate, with what was measured and the verdict."""
    return [
        {
            "figure": f"scheduler's share of a step, freeze rate {row['freeze_rate']:g}",
            "must reach": _BOUND.text,
            "measured": row["training"]["share"],
            "verdict": _BOUND.verdict(row["training"]["share"]),
        }
        for row in rows
        if "training" in row
    ]


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """A line for each freeze rate, under ``HEADS``."""
    for row in rows:
        alone, found = row["schedule"], row.get("training", {})
        share = found.get("share")
        yield [row["freeze_rate"], alone["units"], alone["step_ms"], found.get("scheduling_ms"), found.get("step_ms"),
               share and 100 * share, _BOUND.verdict(share)]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; return 1 with ``--check`` if the bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40, help="in which the session is driven alone")
    parser.add_argument("--training-steps", type=int, default=12, help="that are timed, after all first visits")
    parser.add_argument("--no-training", action="store_true", help="compile and train nothing, write no result file")
    parser.add_argument("--freeze-rates", type=float, nargs="+", default=[0.9, 0.5])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bound is missed")
    given = parser.parse_args(argv)
    case = make_case("bert", layers=given.layers)
    rows: list[dict[str, Any]] = []
    for rate in given.freeze_rates:
        print(f"{case.name}: freeze rate {rate:g} ...", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"freeze_rate": rate, "schedule": time_steps(case, given.steps, rate)}
        if not given.no_training:
            row["training"] = time_training(case, given.training_steps, Settings(freeze_rate=rate))
        rows.append(row)
    print(tabulate(list(lines(rows)), headers=HEADS, floatfmt=FORMATS, missingval="-"))
    judged = verdicts(rows)
    if not given.no_training:
        document = {"case": case.to_dict(), "steps": given.steps, "rates": rows, "bounds": judged}
        path = report.save(f"schedule-{case.name}", document, device="cpu", module="bench.schedule")
        print(f"\nwritten: {path.name}")
    return int(given.check and any(line["verdict"] != "PASS" for line in judged))


if __name__ == "__main__":
    sys.exit(main())
