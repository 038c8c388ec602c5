"""Step peak memory of every rival on one model: ``python -m bench.memory --model bert --layers 4``.

Step peak = peak of allocated bytes above what was allocated before forward (parameters, optimizer state, the batch),
during one forward + backward, from allocator events (bench/measure.py); the worst of ``--steps`` steps of the user's
own loop (zero_grad, forward, backward, AdamW step). Every rival runs in a process of its own. The first step, which
compiles, is not counted. Results go to ``bench/results/memory-*.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

from bench import report
from bench.measure import PeakReport, step_peak
from bench.models import Case, make_case, parameter_bytes, state_bytes
from bench.report import Bound
from bench.rivals import PLAIN, PRESETS, Trainee, make_trainee

_WARM_UP_STEPS = 1
_PLAIN_STEPS = 3  # their peak is the same in every step
_BOUNDS: dict[int, tuple[Bound, ...]] = {
    4: (
        Bound("balanced", "eager", 3.5, at_least=True),
        Bound("balanced", "compile", 3.1, at_least=True),
        Bound("max", "eager", 4.5, at_least=True),
        Bound("exact", "compile", 1.35, at_least=True),
    ),
    12: (Bound("balanced", "eager", 4.6, at_least=True), Bound("max", "eager", 6.5, at_least=True)),
}


def bounds_of(case: Case, freeze_rate: float) -> tuple[Bound, ...]:
    """Return what ``case`` must reach; nothing for cases that the note sets no bound for."""
    if case != make_case("bert", layers=case.layers) or freeze_rate != 0.9:
        return ()
    return _BOUNDS.get(case.layers, ())


def measure_rival(trainee: Trainee, *, steps: int, keep_timeline: bool = False) -> dict[str, Any]:
    """Train ``trainee`` for ``steps`` measured steps; return one row per step and the worst of them."""
    for _ in range(_WARM_UP_STEPS):
        trainee.step()
    rows, worst = [], None
    for _ in range(steps):
        trainee.clear()
        row, peak = measure_step(trainee, timeline=keep_timeline)
        rows.append(row)
        if worst is None or peak.peak_bytes > worst.peak_bytes:
            worst = peak
        trainee.update()
    session = trainee.session
    result: dict[str, Any] = {
        "rival": trainee.name,
        "worst": max(rows, key=lambda row: row["peak_bytes"]),
        "steps": rows,
        "parameter_bytes": parameter_bytes(trainee.model),
        "optimizer_bytes": state_bytes(trainee.optimizer.state),
        "recompiles": getattr(session, "recompiles", None),
    }
    if keep_timeline and worst is not None:
        result["timeline_ns_bytes"] = worst.timeline
    return result


def measure_step(trainee: Trainee, *, timeline: bool) -> tuple[dict[str, Any], PeakReport]:
    """Run forward and backward; return the figures of the step, and the report that they were read off."""
    peak = step_peak(trainee.forward, backward=trainee.backward, device=trainee.case.device, timeline=timeline)
    trained = [p for p in trainee.model.parameters() if p.grad is not None]
    row = {
        "peak_bytes": peak.peak_bytes,
        "saved_bytes": peak.saved_bytes,
        "forward_peak_bytes": peak.forward_peak_bytes,
        "backward_peak_bytes": peak.backward_peak_bytes,
        "end_bytes": peak.end_bytes,
        "grad_bytes": trainee.grad_bytes(),
        "phase": peak.peak_phase,
        "parameters_trained": len(trained),
        "foreign_frees": peak.foreign_frees,
    }
    return row, peak


def ratio(results: Mapping[str, Mapping[str, Any]], small: str, large: str | None) -> float | None:
    """Return how many times smaller the peak of ``small`` is than that of ``large``; None if either is missing."""
    peaks = [results.get(name or "", {}).get("worst", {}).get("peak_bytes") for name in (large, small)]
    return peaks[0] / peaks[1] if peaks[0] and peaks[1] else None


def peak_table(results: Mapping[str, Mapping[str, Any]], case: Case) -> str:
    """Format one line per rival: peak, what crosses from forward to backward, gradients, and both ratios."""
    unit = case.unit_bytes
    lines: list[list[Any]] = []
    for name, result in results.items():
        if "error" in result:
            lines.append([name])
            continue
        worst = result["worst"]
        mb = [worst[key] / 1e6 for key in ("peak_bytes", "saved_bytes", "grad_bytes")]
        lines.append([
            name, mb[0], worst["peak_bytes"] / unit, mb[1], worst["saved_bytes"] / unit, mb[2], worst["phase"],
            worst["parameters_trained"], ratio(results, name, "eager"), ratio(results, name, "compile"),
        ])  # fmt: skip
    headers = ["rival", "step peak MB", "units", "saved MB", "units", "gradients MB", "peak in", "trained",
               "eager / it", "compile / it"]  # fmt: skip
    formats = ("", ".1f", ".1f", ".1f", ".1f", ".1f", "", "", ".2f", ".2f")
    return str(tabulate(lines, headers=headers, floatfmt=formats, missingval="-"))


def bound_lines(results: Mapping[str, Mapping[str, Any]], bounds: Sequence[Bound]) -> list[dict[str, Any]]:
    """Return each bound with what was measured and the verdict; bounds of rivals that did not run are left out."""
    lines = []
    for bound in bounds:
        if bound.rival in results and bound.against in results:
            value = ratio(results, bound.rival, bound.against)
            verdict = "FAILED" if value is None else bound.verdict(value)
            lines.append({
                "rival": bound.rival, "against": bound.against, "must reach": bound.text, "measured": value,
                "verdict": verdict,
            })  # fmt: skip
    return lines


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__.splitlines()[0])
    report.add_case_options(parser)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), metavar="PRESET", help="slimfit_fx presets")
    parser.add_argument("--plain", nargs="*", default=list(PLAIN), metavar="RIVAL", help=f"any of {', '.join(PLAIN)}")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each slimfit_fx preset")
    parser.add_argument("--keep-timeline", action="store_true", help="store memory over the worst step as well")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one rival may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    report.check_rivals([*options.plain, *options.presets], parser)
    return options, parser


def work(options: argparse.Namespace) -> None:
    """Measure one rival, in this process, and write what was found."""
    if options.threads:
        torch.set_num_threads(options.threads)
    trainee = make_trainee(options.worker, report.case_of(options), report.settings_of(options))
    steps = min(options.steps, _PLAIN_STEPS) if options.worker in PLAIN else options.steps
    report.write_out(options.out, measure_rival(trainee, steps=steps, keep_timeline=options.keep_timeline))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every rival, print the tables, store the results; return the exit status."""
    options, _ = parse(arguments)
    if options.worker:
        work(options)
        return 0
    case = report.case_of(options)
    passed_on = report.forward_options(options, leave_out=("presets", "plain", "timeout", "no_save", "tag", "check"))
    results = {}
    for name in [*options.plain, *options.presets]:
        print(f"{case.name}: {name} ...", file=sys.stderr, flush=True)
        results[name] = report.run_worker("bench.memory", [*passed_on, "--worker", name], timeout_s=options.timeout)
    verdicts = bound_lines(results, bounds_of(case, options.freeze_rate))
    how = f"freeze rate {options.freeze_rate} under {options.scheduler}, worst of {options.steps} steps"
    print(f"\n{case.name}, {how}, {options.executor}; 1 unit = {case.unit_bytes / 1e6:.2f} MB")
    print(peak_table(results, case))
    report.print_errors(results)
    if verdicts:
        print("\n" + tabulate(verdicts, headers="keys", floatfmt=".2f"))
    if not options.no_save:
        document = {"case": case.to_dict(), "freeze_rate": options.freeze_rate, "scheduler": options.scheduler,
                    "executor": options.executor, "results": results, "bounds": verdicts}  # fmt: skip
        name = "-".join(filter(None, ["memory", case.name, options.tag]))
        print(f"\nwritten: {report.save(name, document, device=case.device, module='bench.memory').name}")
    failed = any("error" in result for result in results.values()) or any(v["verdict"] != "PASS" for v in verdicts)
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
