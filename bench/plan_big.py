"""How long it takes to plan big models, and in how much host memory: ``python -m bench.plan_big``.

Each case is planned with its physical peak in a process of its own, on the meta device, from a config alone. The time
is told by phase, as torch's own timers have it; the memory is the process's largest resident set. Results go to
``bench/results/plan-big.json``, each with its commit and machine; those of cases that do not run stay there.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from bench import report

LIMIT_S, LIMIT_BYTES = 60.0, 2 * 2**30
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert-large": ("bert-large-uncased", {"batch": 128, "length": 512}, "48GiB"),
    "vit-large-384": ("google/vit-large-patch16-384", {"batch": 128}, "48GiB"),
    "llama-1b": ("meta-llama/Llama-3.2-1B", {"batch": 4, "length": 2048}, "48GiB"),
}
"""Name -> (config, sizes, the budget of the second run)."""
_PHASES = {
    "GraphLowering.run": "lowering",
    "Scheduler.__init__": "scheduling",
    "Scheduler.codegen": "code",
    "create_aot_dispatcher_function": "AOTAutograd and all below",
    "OutputGraph.call_user_compiler": "backend in all",
    "_compile.compile_inner": "torch.compile in all",
}


def work(options: argparse.Namespace) -> None:
    """Plan one case, in this process."""
    import slimfit_fx
    from slimfit_fx import from_config

    name, sizes, budget = CASES[options.worker]
    began = time.perf_counter()
    model, inputs = from_config.build(name, **sizes)
    built = time.perf_counter()
    settings: dict[str, Any] = {"memory_budget": budget} if options.budget else {}
    plan = slimfit_fx.plan(model, peak=True, **settings, **inputs)
    done = time.perf_counter()
    result = {
        "seconds": done - began,
        "cpu_seconds": time.process_time(),
        "phases": {"build": built - began, **_phase_seconds()},
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes": None if plan.peak is None else plan.peak.worst_bytes,
        "peak_unknown": plan.peak_unknown,
        "gated": sum(unit.gated for unit in plan.units),
        "notes": list(plan.notes),
    }
    report.write_out(options.out, result)


def _phase_seconds() -> dict[str, float]:
    from torch._dynamo.utils import compilation_time_metrics

    return {ours: sum(compilation_time_metrics.get(theirs, [])) for theirs, ours in _PHASES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, store the results; return 1 with ``--check`` if a bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.plan_big", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--budget", action="store_true", help="with the case's memory budget")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one case")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed or a case failed")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        work(options)
        return 0
    results = []
    for name in (name for name in CASES if options.only in name):
        print(f"{name} ...", file=sys.stderr, flush=True)
        passed_on = ["--worker", name, *(["--budget"] if options.budget else [])]
        outcome = report.run_worker("bench.plan_big", passed_on, timeout_s=options.timeout)
        budget = CASES[name][2] if options.budget else None
        results.append({"name": name, "budget": budget, **report.stamp("cpu", "bench.plan_big"), **outcome})
        if not options.no_save:
            _save(results, options)
    return _report(results, options)


def _save(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    name = "plan-big-budget" if options.budget else "plan-big"
    stored = report.stored(name) or {"results": []}
    report.save(name, {"results": merged(stored, results)}, device="cpu", module="bench.plan_big")


def merged(stored: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``results``, and those of the other cases in the document ``stored``; in the order of the cases."""
    rows = {row["name"]: row for row in (*report.rows_in(stored), *results)}
    return [rows[name] for name in CASES if name in rows]


def _report(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    lines, missed = [], False
    for result in results:
        if "error" in result:
            lines.append([result["name"], None, None, None, result["error"][-80:]])
            missed = True
            continue
        holds = result["seconds"] <= LIMIT_S and result["host_bytes"] <= LIMIT_BYTES
        missed |= not holds
        sizes = [result["host_bytes"] / 2**30, (result["peak_bytes"] or 0) / 2**30]
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["phases"].items())
        lines.append([result["name"], result["seconds"], *sizes, f"{'PASS' if holds else 'SHORT'}; {phases}"])
    headers = ["case", "seconds", "host GiB", "step peak GiB", f"<= {LIMIT_S:.0f} s and 2 GiB; seconds by phase"]
    print(tabulate(lines, headers=headers, floatfmt=("", ".1f", ".2f", ".2f", ""), missingval="-"))
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
