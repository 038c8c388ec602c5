"""Levels of recompute by the peak that ``recompute="auto"`` expects of them, and by that of Inductor's code.

``python -m bench levels``: of the worst of the steps in which ILS opens every unit once (three orders), with all units
closed, and the bound for any choice of units; nothing is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from tabulate import tabulate

import slimfit_fx
from bench.models import Case, build_model, make_batch, make_case
from slimfit_fx.config import Config
from slimfit_fx.passes import pipeline
from slimfit_fx.planning import levels
from slimfit_fx.planning.expected_peak import visits
from slimfit_fx.planning.levels import Level
from slimfit_fx.planning.peak import PeakForecast, StepTrace
from slimfit_fx.planning.planner import Planner

CASES: dict[str, dict[str, Any]] = {
    "bert 32x128, dropout on attention scores": {
        "model": "bert", "layers": 12, "batch": 32, "length": 128, "attention_dropout": 0.1,
    },
    "bert 32x128": {"model": "bert", "layers": 12, "batch": 32, "length": 128},
    "bert 128x384": {"model": "bert", "layers": 12, "batch": 128, "length": 384},
    "vit 32": {"model": "vit", "layers": 12, "batch": 32},
}  # fmt: skip


def weighed(case: Case, preset: str) -> list[Level]:
    """The levels that ``recompute="auto"`` plans for ``case``, in its order; the one it takes is among them."""
    found: list[Level] = []
    usual = levels.plan_level

    def plan_level(planner: Planner) -> Level:
        found.append(usual(planner))
        return found[-1]

    with mock.patch.object(levels, "plan_level", plan_level):
        slimfit_fx.plan(build_model(case), config=Config(preset=preset, recompute="auto"), **make_batch(case))
    return found


@contextlib.contextmanager
def watched_traces() -> Iterator[list[StepTrace]]:
    """The memory events of each step that is planned with its peak in here."""
    session = importlib.import_module("slimfit_fx.session")  # the package has a function of that name
    usual, traces = session.forecast, list[StepTrace]()

    def forecast(trace: StepTrace, *given: Any) -> PeakForecast:
        traces.append(trace)
        return usual(trace, *given)

    with mock.patch.object(session, "forecast", forecast):
        yield traces


def peak_of_visits(trace: StepTrace, freeze_rate: float) -> int:
    """Bytes at the peak of the worst of the steps that an expected peak is of."""
    return max(trace.peak(gates).peak_bytes for gates in visits(trace.gate_bytes, freeze_rate))


def row_of(case: Case, preset: str, level: Level) -> dict[str, Any]:
    """One level, expected and as Inductor's code has it; megabytes."""
    config = Config(preset=preset, recompute=level.name, recompute_share=level.share)  # type: ignore[arg-type]
    usual = pipeline.make_planner

    def make_planner(*given: Any) -> Planner:
        planner = usual(*given)
        planner.product_price = level.product_price
        return planner

    with mock.patch.object(pipeline, "make_planner", make_planner), watched_traces() as traces:
        peak = slimfit_fx.plan(build_model(case), config=config, peak=True, **make_batch(case)).peak
    assert peak is not None
    worst = peak_of_visits(traces[-1], config.freeze_rate)
    return {
        "recompute": level.name,
        "price of products": level.product_price,
        "blocks": f"{level.share:.0%}",
        "saved": level.saved_bytes / 1e6,
        "expected peak": level.peak_bytes / 1e6,
        "peak": worst / 1e6,
        "expected / peak": level.peak_bytes / worst,
        "closed": peak.closed_bytes / 1e6,
        "bound": peak.worst_bytes / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table for each case; return 0."""
    parser = argparse.ArgumentParser("python -m bench levels", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--preset", default="balanced", choices=["balanced", "max"])
    parser.add_argument("--layers", type=int, help="instead of twelve")
    options = parser.parse_args(arguments)
    for name in options.cases:
        settings = CASES[name] if options.layers is None else {**CASES[name], "layers": options.layers}
        case = make_case(**settings)
        rows = [row_of(case, options.preset, level) for level in weighed(case, options.preset)]
        print(f"\n{name}, {options.preset}; MB")
        print(
            tabulate(rows, headers="keys", floatfmt=("", "g", "", ".0f", ".0f", ".0f", ".2f", ".0f", ".0f")), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
