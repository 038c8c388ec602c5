"""The regression guard: ``python -m bench smoke``.

BERT of width 768, 4 layers, batch 16, length 128, fp32, SDPA, hidden dropout 0.1, freeze rate 0.9 under ILS; the worst
of a few steps by the allocator's events. Hard bounds on ratios of step peaks (bench/memory.py) and on recompiles; time
is never a bound. The rivals share one process, which compiles each of them once.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate

from bench.memory import bound_lines, bounds_of, measure_rival, peak_table
from bench.models import Case, make_case
from bench.report import Bound
from bench.rivals import Settings, make_trainee, preset_of
from bench.time import noted_compiles

RIVALS = ("eager", "compile", "balanced", "max", "exact")
CASE = make_case("bert", layers=4)
_PLAIN_STEPS = 2


def measure(name: str, case: Case, settings: Settings, *, steps: int) -> dict[str, Any]:
    """Train one rival; return what bench/memory.py returns, and the compilations after the first step."""
    torch._dynamo.reset()
    gc.collect()
    trainee = make_trainee(name, case, settings)
    trainee.step()
    with noted_compiles() as started:
        result = measure_rival(trainee, steps=_PLAIN_STEPS if preset_of(name) is None else steps)
    return {**result, "compiles_later": len(started)}


def verdicts_of(results: Mapping[str, Mapping[str, Any]], bounds: Sequence[Bound]) -> list[dict[str, Any]]:
    """Return every bound, of peaks and of recompiles, with what was measured and the verdict."""
    lines = bound_lines(results, bounds)
    for name, result in results.items():
        if preset_of(name) is not None:
            bound = Bound(name, "recompiles", 0, at_least=False)
            count = max(result["compiles_later"], result["recompiles"])
            lines.append({
                "rival": name, "against": "recompiles", "must reach": bound.text, "measured": count,
                "verdict": bound.verdict(count),
            })  # fmt: skip
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; return 1 if a bound is missed."""
    parser = argparse.ArgumentParser("python -m bench smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each slimfit_fx preset")
    options = parser.parse_args(arguments)
    began, results = perf_counter(), {}
    for name in RIVALS:
        results[name] = measure(name, CASE, Settings(), steps=options.steps)
        print(f"{name}: done after {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    verdicts = verdicts_of(results, bounds_of(CASE, Settings().freeze_rate))
    print(f"\n{CASE.name}, freeze rate {Settings().freeze_rate}, worst of {options.steps} steps")
    print(peak_table(results, CASE))
    print("\n" + tabulate(verdicts, headers="keys", floatfmt=".2f"))
    return int(any(line["verdict"] != "PASS" for line in verdicts))


if __name__ == "__main__":
    sys.exit(main())
