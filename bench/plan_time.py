"""How long planning takes beyond capture: ``python -m bench.plan_time``.

One BERT-base of 12 layers, batch 16, length 128, on the meta device, in this process. Two things take turns, and
processor time is counted: capture as torch.compile does it before any code is written (dynamo, AOTAutograd, Inductor's
joint passes, torch's own partitioner), and ``slimfit_fx.plan`` of the same step. What the second takes more is
planning: torch's partition for comparison, our passes in place of it, and the optimizer's step. What else runs on a
machine can only add to either, so the fastest rounds of both are held against each other; the median of the differences
within each round is told beside it.

With no bound: the plan with its physical peak, for which Inductor writes its code, and the plan of preset ``max`` under
a memory budget that ``balanced`` does not meet, so that candidates are searched. The optimizer is then AdamW with
``fused=True``: the lists of ``foreach`` take more than the step, and no plan makes them smaller.

Results go to ``bench/results/plan-time-cpu.json``; rows without a bound that a run leaves out stay there.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn

import slimfit_fx
from bench import report
from slimfit_fx import from_config
from slimfit_fx.capture.call_stack import with_room
from slimfit_fx.capture.off_meta import off_meta
from slimfit_fx.capture.partitioner import PlanReady
from slimfit_fx.rehearsal import capture_only

LIMIT_S = 5.0
MODEL, SIZES = "bert-base-uncased", {"batch": 16, "length": 128}
SHARE = 0.9
"""Of the step peak of ``balanced``: so much the budget leaves room for, above parameters and optimizer state.

The optimizer's own step takes 0.77 of it, the step of ``max`` 0.81.
"""
HEADS, FORMATS = ("processor time", "seconds", "step peak MB", ""), ("", ".1f", ".1f", "")


class TorchOnly(CustomPartitionerFn):
    """Torch's own partitioner; ends the compile behind it."""

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        """Split ``gm``.

        Raises:
            PlanReady: always.
        """
        min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        raise PlanReady

    def uuid(self) -> None:
        """Nothing is cached."""


def capture(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Capture one step as torch.compile does, up to the end of its partitioner."""
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        patches: dict[str, Any] = {"custom_partitioner_fn": TorchOnly(), "fx_graph_cache": False}
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(gm, list(example_inputs), config_patches=patches)

    with off_meta(model, (), inputs, always=True) as (real, args, kwargs):
        capture_only(real, backend, args, kwargs)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one run, from a state in which nothing was compiled.

    With room on Python's stack: without, how deep a run is called decides whether capture takes 7.5 or 9.5 seconds.
    """
    torch._dynamo.reset()
    gc.collect()
    began = time.process_time()
    with_room(run)()
    return time.process_time() - began


def median_beyond(rounds: Sequence[Sequence[float]]) -> float:
    """The median of what planning took more than capture, round by round."""
    return statistics.median(planned - captured for captured, planned in rounds)


def time_more(model: nn.Module, inputs: dict[str, Any], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for ``plan(peak=True)``, then one for ``plan(preset="max", memory_budget=...)``."""
    adamw = functools.partial(torch.optim.AdamW, fused=True)
    row, plan = _timed_plans(model, inputs, rounds, peak=True, optimizer=adamw)
    yield {"name": "plan(peak=True)", **row}
    assert plan.peak is not None, plan.peak_unknown
    budget = int(plan.parameter_bytes + plan.optimizer_bytes + SHARE * plan.peak.worst_bytes)
    row, plan = _timed_plans(model, inputs, rounds, preset="max", memory_budget=budget, optimizer=adamw)
    yield {"name": "plan(preset='max', memory_budget=...)", **row, "budget_bytes": budget, "notes": list(plan.notes)}


def _timed_plans(model: nn.Module, inputs: dict[str, Any], rounds: int, **settings: Any) -> tuple[dict[str, Any], Any]:
    plans: list[Any] = []
    taken = [seconds(lambda: plans.append(slimfit_fx.plan(model, **settings, **inputs))) for _ in range(rounds)]
    peak = plans[-1].peak
    return {"seconds": taken, "step_peak_bytes": None if peak is None else peak.worst_bytes}, plans[-1]


def merged(stored: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``rows``, and those of ``stored`` that were not measured now."""
    return list({row["name"]: row for row in (*stored, *rows)}.values())


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """A line for each row without a bound, under ``HEADS``."""
    for row in rows:
        told, peak = "; ".join(row.get("notes", [])), row["step_peak_bytes"]
        yield [f"`{row['name']}`", statistics.median(row["seconds"]), peak and peak / 1e6, told]


def main(arguments: Sequence[str] | None = None) -> int:
    """Take turns, print the tables, store the results; return 1 with ``--check`` if the bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.plan_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--more-rounds", type=int, default=1, help="of what has no bound; 0 leaves it out")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bound is missed")
    options = parser.parse_args(arguments)
    model, inputs = from_config.build(MODEL, **SIZES)
    rounds = []
    for number in range(options.rounds + 1):
        print(f"round {number} of {options.rounds} ...", file=sys.stderr, flush=True)
        taken = [seconds(lambda: capture(model, inputs)), seconds(lambda: slimfit_fx.plan(model, **inputs))]
        rounds += [taken] if number else []
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    beyond = fastest[1] - fastest[0]
    result = {"model": MODEL, **SIZES, "rounds": rounds, "beyond_capture_s": beyond,
              "median_beyond_capture_s": median_beyond(rounds), "limit_s": LIMIT_S}  # fmt: skip
    stored = report.stored("plan-time-cpu").get("more", [])
    if not options.no_save:
        report.save("plan-time-cpu", {**result, "more": stored}, device="cpu", module="bench.plan_time")
    print(tabulate(rounds, headers=["capture s", "plan s"], floatfmt=".2f"))
    holds = beyond <= LIMIT_S
    verdict = "PASS" if holds else "SHORT"
    print(f"\nplanning beyond capture, fastest rounds: {beyond:.2f} s, must be <= {LIMIT_S:g}: {verdict}")
    print(f"median of the differences within each round: {median_beyond(rounds):.2f} s\n")
    more: list[dict[str, Any]] = []
    for row in time_more(model, inputs, options.more_rounds) if options.more_rounds else ():
        more.append({**row, **report.stamp("cpu", "bench.plan_time")})
        if not options.no_save:
            document = {**result, "more": merged(stored, more)}
            report.save("plan-time-cpu", document, device="cpu", module="bench.plan_time")
    if more:
        print(tabulate(list(lines(more)), headers=HEADS, floatfmt=FORMATS, missingval="-"))
    return int(options.check and not holds)


if __name__ == "__main__":
    sys.exit(main())
