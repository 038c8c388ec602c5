"""Step time, compile time and recompiles: ``python -m bench.time --model bert --layers 4``.

- ``steps``: all rivals live in one process and take turns, one step each, in an order that rotates; what is compared is
  the median of the ratios within each round, so that a machine that slows down slows everybody. A step is zero_grad,
  forward, backward and AdamW (for slimfit_fx: its scheduler and its update distances too).
- ``compile``: first forward + backward less a later one, plus the call that wraps the model; each rival in a process of
  its own. Cold: an empty TORCHINDUCTOR_CACHE_DIR. Warm: a second process on the same directory.
- ``recompiles``: graphs that dynamo captures after the first step, over 200 steps of a tiny model and over ``--rounds``
  steps of the case itself; counted by dynamo, not by us.

Results go to ``bench/results/time-*.json``. What a run does not measure of a case stays in its file; ``stamps`` says of
each part with what command, commit, machine and settings it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate

from bench import report
from bench.models import Case, make_case
from bench.report import Bound
from bench.rivals import Settings, Trainee, make_trainee, preset_of

_WHAT = ("steps", "compile", "recompiles")
_RIVALS = ("compile", "eager", "balanced", "exact-open")
_REFERENCE = "compile"
_STEP_BOUNDS = (
    Bound("balanced", _REFERENCE, 1.0, at_least=False),
    Bound("exact-open", _REFERENCE, 1.1, at_least=False),
)
_COLD_LIMIT = 1.25  # 12 layers
_TINY_STEPS = 200
_STEADY_STEPS = 3
_SETTINGS = ("freeze_rate", "scheduler", "executor")
_STAMP = ("command", "date", "commit", "machine")


# --- step time ----------------------------------------------------------------------------------------------------
def time_step(trainee: Trainee, clock: Callable[[], float] | None = None) -> dict[str, float]:
    """Run one step; return the seconds of its parts and of the whole. ``clock``: default: ``waiting_clock``."""
    clock = clock or waiting_clock(trainee.case.device)
    marks = [clock()]
    trainee.clear()
    loss = trainee.forward()
    marks.append(clock())
    trainee.backward(loss)
    marks.append(clock())
    trainee.update()
    marks.append(clock())
    forward_s, backward_s, update_s = (after - before for before, after in zip(marks, marks[1:], strict=False))
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "update_s": update_s,
        "model_s": forward_s + backward_s,
        "step_s": marks[-1] - marks[0],
    }


def waiting_clock(device: str) -> Callable[[], float]:
    """Return a clock that first waits for the device."""
    if torch.device(device).type != "cuda":
        return perf_counter

    def wait() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return wait


def interleave(trainees: Sequence[Trainee], *, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Time ``rounds`` steps of each trainee, taking turns; who begins changes from round to round."""
    times: dict[str, list[dict[str, float]]] = {trainee.name: [] for trainee in trainees}
    for k in range(rounds):
        first = k % len(trainees)
        for trainee in [*trainees[first:], *trainees[:first]]:
            times[trainee.name].append(time_step(trainee))
    return times


def summarise(times: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return medians (ms) and, against torch.compile, the median and quartiles of the ratios within each round."""
    found: dict[str, dict[str, Any]] = {}
    for name, steps in times.items():
        row: dict[str, Any] = {
            key.removesuffix("_s") + "_ms": 1e3 * statistics.median(step[key] for step in steps) for key in steps[0]
        }
        if _REFERENCE in times:
            for key in ("step", "model"):
                pairs = zip(steps, times[_REFERENCE], strict=True)
                row[f"{key}_ratio"] = _quartiles([mine[f"{key}_s"] / other[f"{key}_s"] for mine, other in pairs])
        found[name] = row
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    """Return [lower quartile, median, upper quartile]."""
    if len(values) < 2:
        return [values[0]] * 3
    return [float(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def bench_steps(options: argparse.Namespace, case: Case, settings: Settings) -> dict[str, Any]:
    """Compare the step times of all rivals in this process; print the table."""
    trainees, results = [], {}
    for name in options.rivals:
        _say(f"{case.name}: {name}: compile and warm up ...")
        try:
            trainee = make_trainee(name, case, settings)
            for _ in range(options.warm_up):
                trainee.step()
        except Exception as error:  # one rival that cannot run must not take the others with it
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        trainees.append(trainee)
    _say(f"{case.name}: {options.rounds} rounds ...")
    times = interleave(trainees, rounds=options.rounds)
    results.update(summarise(times))
    lines = [
        [name, *(row.get(key) for key in ("step_ms", "forward_ms", "backward_ms", "update_ms")), *_ratio_cells(row)]
        for name, row in results.items()
    ]
    headers = ["rival", "step ms", "forward", "backward", "update", "step / compile", "quartiles", "fw+bw / compile"]
    print(f"\nstep time, {case.name}, median of {options.rounds} rounds, freeze rate {settings.freeze_rate}")
    print(tabulate(lines, headers=headers, floatfmt=("", ".1f", ".1f", ".1f", ".1f", ".3f", "", ".3f"), missingval="-"))
    report.print_errors(results)
    return {"results": results, "times": times}


def _ratio_cells(row: Mapping[str, Any]) -> list[Any]:
    if "step_ratio" not in row:
        return [None, None, None]
    low, middle, high = row["step_ratio"]
    return [middle, f"{low:.3f}-{high:.3f}", row["model_ratio"][1]]


# --- compile time -------------------------------------------------------------------------------------------------
def time_compile(name: str, case: Case, settings: Settings) -> dict[str, float]:
    """Return the seconds that compiling costs in this process, and a steady forward + backward."""
    began = perf_counter()
    trainee = make_trainee(name, case, settings)
    built_s = perf_counter() - began
    first_s, *later = (_time_forward_backward(trainee) for _ in range(1 + _STEADY_STEPS))
    steady_s = statistics.median(later)
    return {"build_s": built_s, "first_s": first_s, "steady_s": steady_s, "compile_s": first_s - steady_s}


def _time_forward_backward(trainee: Trainee) -> float:
    times = time_step(trainee)
    return times["forward_s"] + times["backward_s"]


def bench_compile(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Compare cold and warm compile times, every measurement in a process of its own; print the table."""
    passed_on = report.forward_options(options, leave_out=_OWN_OPTIONS)
    results: dict[str, dict[str, Any]] = {}
    for name in (name for name in options.rivals if name != "eager"):
        with tempfile.TemporaryDirectory() as cache:
            row: dict[str, Any] = {}
            for state in ("cold", "warm"):
                _say(f"{case.name}: {name}: compile, {state} ...")
                found = report.run_worker(
                    "bench.time",
                    [*passed_on, "--worker", f"compile:{name}"],
                    environment={"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"},
                    timeout_s=options.timeout,
                )
                row.update({f"{state}_{key}" if key != "error" else key: value for key, value in found.items()})
        results[name] = row
    base = results.get(_REFERENCE, {})
    lines = [
        [name, row.get("cold_compile_s"), row.get("warm_compile_s"), *_over(row, base, "cold", "warm")]
        for name, row in results.items()
    ]
    headers = ["rival", "cold s", "warm s", "cold / compile", "warm / compile"]
    print(f"\ncompile time, {case.name}")
    print(tabulate(lines, headers=headers, floatfmt=("", ".1f", ".1f", ".2f", ".2f"), missingval="-"))
    report.print_errors(results)
    return results


def _over(row: Mapping[str, Any], base: Mapping[str, Any], *states: str) -> list[float | None]:
    keys = [f"{state}_compile_s" for state in states]
    return [row[key] / base[key] if key in row and key in base else None for key in keys]


# --- recompiles ---------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def noted_compiles() -> Iterator[list[str]]:
    """Yield a list that gets an entry for every compilation that dynamo starts."""
    from torch._dynamo.callback import CallbackArgs, callback_handler

    started: list[str] = []

    def note(args: CallbackArgs) -> None:
        started.append(args.callback_trigger.name)

    callback_handler.register_start_callback(note)
    try:
        yield started
    finally:
        callback_handler.remove_start_callback(note)


def count_recompiles(trainee: Trainee, *, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps; count the compilations that dynamo starts in the first and after it."""
    with noted_compiles() as started:
        trainee.step()
        first = len(started)
        for _ in range(steps - 1):
            trainee.step()
    session = trainee.session
    return {
        "steps": steps,
        "compiles_first_step": first,
        "compiles_later": len(started) - first,
        "session_compiles": getattr(session, "compiles", None),
        "session_recompiles": getattr(session, "recompiles", None),
    }


def tiny(case: Case) -> Case:
    """Return a model of the same kind, small enough for 200 steps in seconds."""
    small = make_case(case.model, layers=2, width=64, heads=2, batch=2, length=16, resolution=32, vocab=200)
    return replace(small, dtype=case.dtype, device=case.device, dropout=case.dropout)


def bench_recompiles(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Count recompiles of each slimfit_fx rival and of torch.compile; print the table."""
    passed_on = report.forward_options(options, leave_out=_OWN_OPTIONS)
    results: dict[str, dict[str, Any]] = {}
    lines = []
    for name in (name for name in options.rivals if name != "eager"):
        for size, steps in (("tiny", _TINY_STEPS), ("case", options.rounds)):
            _say(f"{case.name}: {name}: recompiles, {size} ...")
            worker = ["--worker", f"recompiles:{name}:{size}:{steps}"]
            found = report.run_worker("bench.time", [*passed_on, *worker], timeout_s=options.timeout)
            results[f"{name}, {size}"] = found
            keys = ("steps", "compiles_first_step", "compiles_later", "session_recompiles")
            lines.append([name, size, *(found.get(key) for key in keys)])
    headers = ["rival", "model", "steps", "compiles in step 1", "compiles later", "session.recompiles"]
    print(f"\nrecompiles, {case.name}")
    print(tabulate(lines, headers=headers, missingval="-"))
    report.print_errors(results)
    return results


# --- the command --------------------------------------------------------------------------------------------------
_OWN_OPTIONS = ("what", "rivals", "rounds", "warm_up", "timeout", "no_save", "tag", "check", "worker", "out")


def verdicts_of(found: Mapping[str, Any], case: Case) -> list[dict[str, Any]]:
    """Return every bound that this run can speak of, with the figure and the verdict."""
    lines = []
    steps = found.get("steps", {}).get("results", {})
    for bound in _STEP_BOUNDS:
        if "step_ratio" in steps.get(bound.rival, {}):
            lines.append(_verdict("step time", bound, steps[bound.rival]["step_ratio"][1]))
    compiled = found.get("compile", {})
    for name, row in compiled.items():
        (value,) = _over(row, compiled.get(_REFERENCE, {}), "cold")
        if case.layers == 12 and preset_of(name) is not None and value is not None:
            lines.append(_verdict("compile time, cold", Bound(name, _REFERENCE, _COLD_LIMIT, at_least=False), value))
    for name, row in found.get("recompiles", {}).items():
        if preset_of(name.split(",")[0]) is not None and "compiles_later" in row:
            bound = Bound(name, None, 0, at_least=False)
            lines.append(_verdict(f"recompiles, {row['steps']} steps", bound, row["compiles_later"]))
    return lines


def _verdict(figure: str, bound: Bound, value: float) -> dict[str, Any]:
    return {
        "figure": figure,
        "rival": bound.rival,
        "against": bound.against,
        "must reach": bound.text,
        "measured": value,
        "verdict": bound.verdict(value),
    }


def merged(stored: Mapping[str, Any], found: Mapping[str, Any], case: Case, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of ``found``, those of the same case in ``stored`` that it lacks, and the stamp of each.

    A part is taken whole: its times compare within one run only.
    """
    own = case.to_dict()
    same = {**own, **stored.get("case", {})} == own
    kept = {part: stored[part] for part in _WHAT if same and part in stored and part not in found}
    of_all = {key: stored[key] for key in (*_STAMP, *_SETTINGS) if key in stored}
    stamps = {part: stored.get("stamps", {}).get(part, of_all) for part in kept}
    return {**kept, **found, "stamps": {**stamps, **{part: dict(stamp) for part in found}}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.time", description=__doc__.splitlines()[0])
    report.add_case_options(parser)
    parser.add_argument("--what", nargs="+", choices=_WHAT, default=list(_WHAT))
    parser.add_argument("--rivals", nargs="+", default=list(_RIVALS), metavar="RIVAL", help="see bench/rivals.py")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each rival")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps of each rival before")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one worker may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    report.check_rivals(options.rivals, parser)
    return options


def work(options: argparse.Namespace, case: Case, settings: Settings) -> None:
    """Do one measurement that wants a process of its own, and write what was found."""
    kind, name, *rest = options.worker.split(":")
    if kind == "compile":
        report.write_out(options.out, time_compile(name, case, settings))
        return
    size, steps = rest
    trainee = make_trainee(name, tiny(case) if size == "tiny" else case, settings)
    report.write_out(options.out, count_recompiles(trainee, steps=int(steps)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, print the tables, store the results; return the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    case, settings = report.case_of(options), report.settings_of(options)
    if options.worker:
        work(options, case, settings)
        return 0
    found: dict[str, Any] = {}
    if "compile" in options.what:
        found["compile"] = bench_compile(options, case)
    if "recompiles" in options.what:
        found["recompiles"] = bench_recompiles(options, case)
    if "steps" in options.what:
        found["steps"] = bench_steps(options, case, settings)
    verdicts = verdicts_of(found, case)
    if verdicts:
        print("\n" + tabulate(verdicts, headers="keys", floatfmt=".3f", missingval="-"))
    if not options.no_save:
        name = "-".join(filter(None, ["time", case.name, options.tag]))
        chosen = {key: getattr(settings, key) for key in _SETTINGS}
        stamp = {**report.stamp(case.device, "bench.time"), **chosen}
        parts = merged(report.stored(name), found, case, stamp)
        document = {"case": case.to_dict(), **chosen, **parts, "bounds": verdicts_of(parts, case)}
        print(f"\nwritten: {report.save(name, document, device=case.device, module='bench.time').name}")
    return int(options.check and any(line["verdict"] != "PASS" for line in verdicts))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
