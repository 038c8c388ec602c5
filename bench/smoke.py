"""The regression guard: ``python -m bench smoke``.

BERT of width 768, 4 layers, batch 16, length 128, fp32, SDPA, hidden dropout 0.1, freeze rate 0.9 under ILS; the worst
of a few steps. Hard bounds on ratios of step peaks (bench/memory.py) and on recompiles; time is never a bound.

Eager and ``balanced`` train, and the allocator's events are counted; the steps are those in which ILS visits every unit
once, in an order that the seed decides. Compiling takes most of the time, so the others are not compiled: their peaks
are read off the code that Inductor writes for them (a second process writes it meanwhile), with the very gates that
were open in the steps of ``balanced``, whose own peak, read off in the same way, must be what was measured.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate

from bench.memory import bound_lines, bounds_of, measure_rival, peak_table
from bench.models import Case, build_model, make_batch, make_case
from bench.report import Bound
from bench.rivals import Settings, config_of, make_trainee, preset_of, rival_of
from bench.time import noted_compiles
from slimfit_fx.api import checked_settings
from slimfit_fx.capture.captured import step_trace
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.rehearsal import Rehearsal

TRAINED, READ_OFF = ("eager", "balanced"), ("compile", "max", "exact")
CASE = make_case("bert", layers=4)
_PLAIN_STEPS = 1
_EXACT = Bound("balanced", "read off its code", 0.01, at_least=False)


def train(name: str, case: Case, settings: Settings, *, steps: int) -> tuple[dict[str, Any], list[frozenset[str]]]:
    """Train one rival; return what bench/memory.py returns, and the gates that were open in the measured steps.

    With it: compilations after the first step, and how far off its peak is if it is read off the code.
    """
    torch._dynamo.reset()
    gc.collect()
    trainee = make_trainee(name, case, settings)
    trainee.step()
    with noted_compiles() as started:
        result = measure_rival(trainee, steps=_PLAIN_STEPS if preset_of(name) is None else steps)
    result["compiles_later"] = len(started)
    session = trainee.session
    if session is None:
        return result, []
    opened = [frozenset(names) for _, names in session.gates.history][-steps:]
    read = max(session.predict_peak(names).peak_bytes for names in opened)
    result["off_by"] = abs(read / result["worst"]["peak_bytes"] - 1)
    return result, opened


def trace_of(name: str, case: Case, settings: Settings) -> tuple[StepTrace, tuple[str, ...]]:
    """What the code that Inductor writes does to memory, and the units of its gates; nothing is compiled.

    ``name``: a preset of slimfit_fx, or ``compile`` for plain torch.compile, which has no gates.
    """
    torch._dynamo.reset()
    gc.collect()
    rival, model, batch = rival_of(name), build_model(case), make_batch(case)
    chosen, (units, _), _ = checked_settings(model, config_of(rival, settings), {}, plan_only=True)
    rehearsal = Rehearsal(model, units, faked=True)
    traced = (
        (rehearsal.plain_trace((), batch), ())
        if rival.preset is None
        else step_trace(rehearsal.graphs(chosen, (), batch, peak=True))
    )
    if isinstance(traced, str) or traced[0] is None:
        raise RuntimeError(f"the peak of {name} is not known: {traced}")
    trace, names = traced
    return trace, tuple(names)


def worst_of(name: str, trace: StepTrace, names: Sequence[str], opened: Sequence[frozenset[str]]) -> dict[str, Any]:
    """The largest peak of steps with these units open. ``names``: the units of the trace's gates."""
    peaks = [trace.peak([k for k, unit in enumerate(names) if unit in wanted]) for wanted in opened]
    worst = max(peaks, key=lambda peak: peak.peak_bytes)
    figures = {"peak_bytes": worst.peak_bytes, "saved_bytes": worst.saved_bytes, "grad_bytes": worst.end_bytes}
    return {"rival": name, "worst": {**figures, "phase": worst.phase, "parameters_trained": None}}


def verdicts_of(results: Mapping[str, Mapping[str, Any]], bounds: Sequence[Bound]) -> list[dict[str, Any]]:
    """Return every bound, of peaks and of recompiles, with what was measured and the verdict."""
    lines = bound_lines(results, bounds)
    for name, result in results.items():
        if "off_by" in result:
            lines.append({
                "rival": name, "against": _EXACT.against, "must reach": _EXACT.text, "measured": result["off_by"],
                "verdict": _EXACT.verdict(result["off_by"]),
            })  # fmt: skip
            bound = Bound(name, "recompiles", 0, at_least=False)
            count = max(result["compiles_later"], result["recompiles"])
            lines.append({
                "rival": name, "against": "recompiles", "must reach": bound.text, "measured": count,
                "verdict": bound.verdict(count),
            })  # fmt: skip
    return lines


def measure(steps: int) -> dict[str, dict[str, Any]]:
    """Train, and read off meanwhile; return the result of each rival. ``steps``: measured steps of ``balanced``."""
    began, results, opened = perf_counter(), {}, list[frozenset[str]]()

    def done(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        print(f"{name}: done after {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as beside:
        traces = {name: beside.submit(trace_of, name, CASE, Settings()) for name in READ_OFF}
        for name in TRAINED:
            result, opened = train(name, CASE, Settings(), steps=steps)
            done(name, result)
        for name, trace in traces.items():
            done(name, worst_of(name, *trace.result(), opened))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; return 1 if a bound is missed."""
    parser = argparse.ArgumentParser("python -m bench smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9, help="measured steps of preset balanced")
    options = parser.parse_args(arguments)
    results = measure(options.steps)
    verdicts = verdicts_of(results, bounds_of(CASE, Settings().freeze_rate))
    print(f"\n{CASE.name}, freeze rate {Settings().freeze_rate}, worst of {options.steps} steps")
    print(f"trained: {', '.join(TRAINED)}; read off the code: {', '.join(READ_OFF)}")
    print(peak_table(results, CASE))
    print("\n" + tabulate(verdicts, headers="keys", floatfmt=".2f"))
    return int(any(line["verdict"] != "PASS" for line in verdicts))


if __name__ == "__main__":
    sys.exit(main())
