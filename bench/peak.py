"""Predicted against measured peaks of training steps: ``python -m bench.peak``.

Each case (model, depth, batch, length, dtype, preset) trains in a process of its own: some steps as its scheduler
likes (ILS; ``-open``: every gate open), then one with all gates closed and one with a single open one. In every
measured step the prediction (``session.predict_peak()``, made from the generated code and the gates) is held against
the allocator's events; so is the bound for the worst choice of gates, which no step may exceed. Results go to
``bench/results/peak-*``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

from bench import report
from bench.cells import first_visits
from bench.emulated_gpu import kind_of
from bench.measure import step_peak
from bench.models import autocast, make_case
from bench.rivals import Settings, Trainee, make_trainee

_SMALL = {"width": 256, "heads": 4, "vocab": 2000, "resolution": 128}
_NARROW = {**_SMALL, "width": 128}
_REAL = {"width": 768, "heads": 12, "vocab": 8000, "resolution": 224}
_MORE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bert", "paper", {**_SMALL, "layers": 4, "batch": 8, "length": 64, "dtype": "bf16"}),
    ("bert", "balanced", {**_NARROW, "layers": 12, "batch": 4, "length": 64, "dtype": "fp32"}),
    ("bert", "max-open", {**_REAL, "layers": 2, "batch": 4, "length": 128, "dtype": "fp32"}),
    ("vit", "paper", {**_SMALL, "layers": 4, "batch": 2, "dtype": "fp32"}),
    ("vit", "balanced", {**_REAL, "layers": 2, "batch": 2, "dtype": "bf16"}),
    ("gpt2", "paper-open", {**_SMALL, "layers": 3, "batch": 4, "length": 64, "dtype": "fp32"}),
    ("gpt2", "exact", {**_NARROW, "layers": 6, "batch": 8, "length": 64, "dtype": "bf16"}),
    ("llama", "paper", {**_SMALL, "layers": 3, "batch": 4, "length": 96, "dtype": "bf16"}),
    ("llama", "max", {**_NARROW, "layers": 8, "batch": 2, "length": 256, "dtype": "fp32"}),
)


def cases(device: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, preset, settings): every model and preset, both dtypes, 2 to 12 layers, several batches and lengths.

    On a GPU with the widths of real models and eight times the batch: its allocator may hand out up to 1 MiB more than
    a large block asks for (c10/cuda/CUDACachingAllocator.cpp), of which small steps would be full.
    """
    if device.startswith("cuda"):
        return [(m, p, _enlarged(settings)) for m, p, settings in _cases(device)]
    return _cases(device)


def _enlarged(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **_REAL, "batch": 8 * settings["batch"]}


def _cases(device: str) -> list[tuple[str, str, dict[str, Any]]]:
    found = []
    for (model, preset), (number, dtype) in zip(
        itertools.product(("bert", "vit", "gpt2", "llama"), ("exact", "balanced", "max", "balanced-open")),
        itertools.cycle(enumerate(("fp32", "fp32", "bf16"))),
        strict=False,
    ):
        size = {"batch": (4, 8, 6)[number], "length": (128, 64, 96)[number], "layers": (2, 3, 2)[number]}
        found.append((model, preset, {**_SMALL, **size, "dtype": dtype, "device": device}))
    return [*found, *((model, preset, {**settings, "device": device}) for model, preset, settings in _MORE)]


def work(options: argparse.Namespace) -> None:
    """Measure one case, in this process."""
    model, preset, settings = cases(options.device)[options.worker]
    case = make_case(model, **settings)
    trainee = make_trainee(preset, case, Settings())
    trainee.step()
    for _ in range(first_visits(trainee)):
        trainee.step()
    session: Any = trainee.session
    patterns = ["scheduled"] * options.steps + ["all closed", "one open"]
    rows = [_row(trainee, session, pattern) for pattern in patterns]
    worst = session.plan.peak.worst_bytes
    report.write_out(options.out, {"case": case.name, "preset": preset, "worst_bound": worst, "steps": rows})


def _row(trainee: Trainee, session: Any, pattern: str) -> dict[str, Any]:
    """One training step with these gates, predicted and measured."""
    names = session.gates.names
    if pattern != "scheduled":
        session.unfreeze()
        session.freeze(names if pattern == "all closed" else [n for n in names if n != names[len(names) // 2]])
    trainee.clear()
    peak = step_peak(
        lambda: _outputs(trainee),
        backward=lambda outputs: outputs.loss.backward(),
        device=trainee.case.device,
        timeline=False,
    )
    predicted = session.predict_peak().peak_bytes
    trainee.update()
    return {
        "gates": pattern,
        "open": len(session.gates.open),
        "measured": peak.peak_bytes,
        "predicted": predicted,
    }


def _outputs(trainee: Trainee) -> Any:
    """All that the model returns, kept until backward is done, as the prediction takes it."""
    with autocast(trainee.case):
        return trainee.call(**trainee.batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, store the results; return 1 with ``--check`` if a bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.peak", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each case")
    parser.add_argument("--only", default="", help="only cases whose name and preset contain this text")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed or a case failed")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        work(options)
        return 0
    results = []
    for number, (model, preset, settings) in enumerate(cases(options.device)):
        name = f"{make_case(model, **settings).name} {preset}"
        if options.only in name:
            print(f"{name} ...", file=sys.stderr, flush=True)
            passed_on = ["--device", options.device, "--steps", str(options.steps), "--worker", str(number)]
            results.append({"name": name, **report.run_worker("bench.peak", passed_on, timeout_s=1800)})
    return _report(results, options)


def _report(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    lines, errors, above = [], [], 0
    for result in results:
        if "error" in result:
            lines.append([result["name"], None, None, None, result["error"][:80]])
            continue
        off = [step["predicted"] / step["measured"] - 1 for step in result["steps"]]
        errors += off
        most = max(step["measured"] for step in result["steps"])
        above += most > 1.01 * result["worst_bound"]
        lines.append([result["name"], most / 1e6, 100 * max(off, key=abs), result["worst_bound"] / 1e6, ""])
    headers = ["case", "largest peak MB", "largest error %", "bound of the worst choice MB", ""]
    print(tabulate(lines, headers=headers, floatfmt=("", ".2f", "+.3f", ".2f", ""), missingval="-"))
    median, worst = (statistics.median(map(abs, errors)), max(map(abs, errors))) if errors else (1.0, 1.0)
    print(f"\n{len(results)} cases, {len(errors)} steps: median error {median:.3%}, largest {worst:.3%}")
    print(f"cases with a step above the bound of the worst choice: {above}")
    limits = (0.01, 0.03) if torch.device(options.device).type == "cuda" else (0.02, 0.06)
    passed = len(errors) > 0 and median <= limits[0] and worst <= limits[1] and above == 0
    print(f"median <= {limits[0]:.0%}, largest <= {limits[1]:.0%}, none above: {'PASS' if passed else 'SHORT'}")
    if not options.no_save:
        document = {"results": results, "median_error": median, "largest_error": worst, "above_bound": above}
        path = report.save(f"peak-{kind_of(options.device)}", document, device=options.device, module="bench.peak")
        print(f"written: {path.name}")
    failed = not passed or any("error" in result for result in results)
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
