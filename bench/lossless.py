"""Recompute without loss against torch's own: ``python -m bench lossless --layers 12``.

Preset ``exact`` with every gate open, at every level of recompute, against ``activation_memory_budget`` at its ten
settings: bits are the same, only memory and time differ. And slimfit_fx at its freeze rate against gradient
checkpointing at the peak of the latter. Rivals are measured in groups, each group in a process of its own together with
plain torch.compile: step peaks from allocator events, step times as ratios to torch.compile's within each round. Each
finished group is written at once to ``bench/results/lossless-*.json``; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from bench import report
from bench.cells import first_visits
from bench.memory import measure_step
from bench.rivals import Trainee, make_trainee
from bench.time import interleave, summarise

REFERENCE = "compile"
TORCH = (*(f"activation-budget-{tenths / 10:g}" for tenths in range(1, 10)), REFERENCE)
"""Torch's ten settings; the last, 1.0, is its default."""
LOSSLESS = ("exact-open", "exact-products-open", "exact-blocks-open")
CHECKPOINT = ("checkpoint", "compile-checkpoint")
FROZEN = ("balanced", "balanced-cheap", "max", "max-blocks")
_GROUP = 6
_SMALLEST, _CHECKPOINT_TIME, _MAX_RATIO = 1.5, 0.85, 8.0


def work(options: argparse.Namespace) -> None:
    """Measure one group, in this process."""
    case, settings = report.case_of(options), report.settings_of(options)
    trainees: list[Trainee] = []
    found: dict[str, dict[str, Any]] = {}
    for name in options.group.split(","):
        try:
            trainee = make_trainee(name, case, settings)
            trainee.step()
            found[name] = _peaks(trainee, options.steps)
        except Exception as error:  # one rival that cannot run must not take the others with it
            if name == REFERENCE:
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        trainees.append(trainee)
    for name, row in summarise(interleave(trainees, rounds=options.rounds)).items():
        found[name].update(row)
    report.write_out(options.out, found)


def _peaks(trainee: Trainee, steps: int) -> dict[str, Any]:
    """The largest peak of some steps; where gates move, after every unit had its first visit."""
    visits = first_visits(trainee)
    peaks = []
    for number in range(visits + steps):
        trainee.clear()
        row, _ = measure_step(trainee, timeline=False)
        if number >= visits:
            peaks.append(row["peak_bytes"])
        trainee.update()
    return {"peak_bytes": max(peaks), "recompiles": getattr(trainee.session, "recompiles", None)}


def groups(done: Mapping[str, Any]) -> Iterator[list[str]]:
    """What is still to be measured: the reference and a few others at a time."""
    wanted = [n for n in ("eager", *TORCH[:-1], *LOSSLESS, *CHECKPOINT, *FROZEN) if n not in done]
    for start in range(0, len(wanted), _GROUP - 1):
        yield [REFERENCE, *wanted[start : start + _GROUP - 1]]


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """[what, figure, must reach, verdict] for everything that was measured."""
    rows = {name: row for name, row in found.items() if "error" not in row}
    lines: list[list[Any]] = []
    ours = [n for n in LOSSLESS if n in rows]
    for torch_setting in (n for n in TORCH if n in rows):
        fits = [n for n in ours if _time(rows[n]) <= _time(rows[torch_setting])]
        best = min(fits, key=lambda n: rows[n]["peak_bytes"], default=None)
        ratio = rows[torch_setting]["peak_bytes"] / rows[best]["peak_bytes"] if best else 0.0
        name = f"{torch_setting} / {best or 'none of ours is as fast'}"
        lines.append([name, ratio, "> 1, no slower", "PASS" if ratio > 1 else "SHORT"])
    smallest = min((rows[n]["peak_bytes"] for n in TORCH if n in rows), default=None)
    if ours and smallest:
        ratio = smallest / min(rows[n]["peak_bytes"] for n in ours)
        lines.append(_line("torch's smallest peak / our smallest", ratio, report.Bound("", "", _SMALLEST, True)))
    for rival in (n for n in CHECKPOINT if n in rows):
        fits = [n for n in (*FROZEN, *ours) if n in rows and rows[n]["peak_bytes"] <= rows[rival]["peak_bytes"]]
        best = min(fits, key=lambda n: _time(rows[n]), default=None)
        if best is not None:
            bound = report.Bound("", "", _CHECKPOINT_TIME, at_least=False)
            lines.append(_line(f"step time {best} / {rival}", _time(rows[best]) / _time(rows[rival]), bound))
    most = [n for n in ("max", "max-blocks") if n in rows]
    if most and "eager" in rows:
        best = min(most, key=lambda n: rows[n]["peak_bytes"])
        ratio = rows["eager"]["peak_bytes"] / rows[best]["peak_bytes"]
        lines.append(_line(f"peak eager / {best}", ratio, report.Bound("", "", _MAX_RATIO, at_least=True)))
    return lines


def _line(what: str, value: float, bound: report.Bound) -> list[Any]:
    return [what, value, bound.text, bound.verdict(value)]


def _time(row: Mapping[str, Any]) -> float:
    """Step time as a ratio to torch.compile's within each round: its median."""
    return float(row["step_ratio"][1])


def show(found: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Print what was measured, and the verdicts, which are returned."""
    lines = [
        [name, row["peak_bytes"] / 1e6, _time(row), row["step_ms"]]
        for name, row in sorted(found.items(), key=lambda pair: pair[1].get("peak_bytes", 0))
        if "error" not in row
    ]
    print(
        tabulate(lines, headers=["", "step peak MB", "step / compile", "step ms"], floatfmt=("", ".1f", ".3f", ".0f"))
    )
    report.print_errors(found)
    judged = verdicts(found)
    print()
    print(tabulate(judged, headers=["", "ratio", "must be", ""], floatfmt=("", ".3f", "", "")))
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the table; return 1 with ``--check`` if a bound is missed or a rival failed."""
    parser = argparse.ArgumentParser("python -m bench lossless", description=__doc__.splitlines()[0])
    report.add_case_options(parser)
    parser.add_argument("--steps", type=int, default=3, help="steps whose peaks are measured")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed, of each rival")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.group is not None:
        work(options)
        return 0
    case = report.case_of(options)
    name = f"lossless-{case.name}{options.tag}"
    path = report.RESULTS / f"{name}.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else {}
    passed_on = report.forward_options(options, leave_out=("group", "out", "no_save", "check", "tag"))
    for names in groups(found):
        print(f"{case.name}: {', '.join(names)} ...", file=sys.stderr, flush=True)
        result = report.run_worker("bench.lossless", [*passed_on, "--group", ",".join(names)], timeout_s=7200)
        if "error" in result:
            result = {n: {"error": result["error"]} for n in names if n != REFERENCE}
        found.update({n: row for n, row in result.items() if n != REFERENCE or REFERENCE not in found})
        if not options.no_save:
            kept = {n: row for n, row in found.items() if "error" not in row}
            report.save(name, {"case": vars(case), "results": kept, "verdicts": verdicts(kept)},
                        device=case.device, module="bench.lossless")  # fmt: skip
    judged = show(found)
    failed = any("error" in row for row in found.values()) or any(line[-1] != "PASS" for line in judged)
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
