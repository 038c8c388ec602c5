"""What the price of running again changes: ``python -m bench.price``.

The minimum cut of BERT-base (batch 16, length 128) at every level of recompute and at prices from 1/256 to
256 times the planner's own: which different plans there are, what they save and how many operations of products they
run again. Of those at level "cheap" that differ by more than a percent also the predicted peak and the time by the
roofline. It shows whether a sweep over the price would find plans that levels and shares do not. Results go to
``bench/results/price-cpu.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import nn

import slimfit_fx
from bench import report
from slimfit_fx import Config, from_config
from slimfit_fx.api import checked_settings
from slimfit_fx.passes import pipeline
from slimfit_fx.planning.levels import plan_level
from slimfit_fx.planning.roofline import roofline_of
from slimfit_fx.presets import RECOMPUTE
from slimfit_fx.rehearsal import Rehearsal, known_step

PRICES = tuple(2.0**exponent for exponent in range(-8, 9))
SETTINGS: tuple[dict[str, Any], ...] = (
    {"preset": "exact", "freeze_rate": 0.0, "scheduler": "none"},
    {"preset": "balanced", "freeze_rate": 0.9},
)
_SAME = 1.01


def cuts(model: nn.Module, inputs: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """The different cuts at each level: what is saved, what runs again, and the prices that lead there."""
    found: list[dict[str, Any]] = []
    plan = pipeline._plan

    def sweep(work: Any, settings: Any) -> int:
        planner = pipeline.make_planner(work, settings)
        for level in RECOMPUTE:
            at_level, rows = planner.at_level(level), list[dict[str, Any]]()
            for price in PRICES:
                at_level.recompute_price = price
                planned = plan_level(at_level)
                row = {"level": level, "saved_bytes": planned.saved_bytes, "again_flops": planned.again}
                if rows and _alike(rows[-1], row):
                    rows[-1]["prices"].append(price)
                else:
                    rows.append({**row, "prices": [price]})
            found.extend(rows)
        return plan(work, settings)

    with mock.patch.object(pipeline, "_plan", sweep):
        torch._dynamo.reset()
        slimfit_fx.plan(model, config=config, **inputs)
    return found


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two cuts save and run again the same but for a percent."""
    pairs = ((one[key], other[key]) for key in ("saved_bytes", "again_flops"))
    return all(max(pair) <= _SAME * min(pair) for pair in pairs)


def steps(model: nn.Module, inputs: dict[str, Any], settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Note peak and expected time of the cuts at level "cheap"."""
    roofline = roofline_of(torch.device("cpu"))
    for row in (row for row in rows if row["level"] == "cheap"):
        config = Config(**settings, recompute_price=row["prices"][len(row["prices"]) // 2])
        chosen, (units, _), _ = checked_settings(model, config, {}, plan_only=True)
        rehearsal = Rehearsal(model, units, faked=True)
        torch._dynamo.reset()
        trace = known_step(rehearsal.graphs(chosen, (), inputs, peak=True))
        count = round(trace.num_gates * (1 - config.freeze_rate))
        row["peak_bytes"] = trace.worst(count)[0]
        row["expected_ms"] = roofline.expected_ms(trace.work, 1 - config.freeze_rate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print the tables, store the results."""
    parser = argparse.ArgumentParser("python -m bench.price", description=__doc__.splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    options = parser.parse_args(arguments)
    model, inputs = from_config.build("bert-base-uncased", batch=16, length=128)
    results = []
    for settings in SETTINGS:
        rows = cuts(model, inputs, Config(**settings))
        steps(model, inputs, settings, rows)
        results.append({"settings": settings, "cuts": rows})
        print(tabulate(list(lines(rows)), headers=[settings["preset"], *HEADS], floatfmt=FORMATS, missingval="-"), "\n")
    if not options.no_save:
        report.save("price-cpu", {"results": results}, device="cpu", module="bench.price")
    return 0


HEADS = ("price, times", "saved MB", "again GFLOP", "peak MB", "expected ms")
FORMATS = ("", "", ".1f", ".1f", ".1f", ".0f")


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    """A line for each cut."""
    for row in rows:
        prices = row["prices"]
        span = f"{prices[0]:g}" if len(prices) == 1 else f"{prices[0]:g} to {prices[-1]:g}"
        peak = row.get("peak_bytes")
        yield [row["level"], span, row["saved_bytes"] / 1e6, row["again_flops"] / 1e9, peak and peak / 1e6,
               row.get("expected_ms")]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
