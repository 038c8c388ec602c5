"""How long planning takes beyond capture: ``python -m bench.plan_time``.

One BERT-base of 12 layers, batch 16, length 128, on the meta device, in this process. Two things take turns, and
processor time is counted: capture as torch.compile does it before any code is written (dynamo, AOTAutograd, Inductor's
joint passes, torch's own partitioner), and ``slimfit_fx.plan`` of the same step. What the second takes more is
planning: torch's partition for comparison, our passes in place of it, and the optimizer's step. What else runs on a
machine can only add to either, so the fastest rounds of both are held against each other. Results go to
``bench/results/plan-time-cpu.json``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn

import slimfit_fx
from bench import report
from slimfit_fx import from_config
from slimfit_fx.capture.off_meta import off_meta
from slimfit_fx.capture.partitioner import PlanReady
from slimfit_fx.rehearsal import capture_only

LIMIT_S = 5.0
MODEL, SIZES = "bert-base-uncased", {"batch": 16, "length": 128}


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
    """Processor time of one run, from a state in which nothing was compiled."""
    torch._dynamo.reset()
    gc.collect()
    began = time.process_time()
    run()
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Take turns, print the table, store the results; return 1 with ``--check`` if the bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.plan_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
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
    if not options.no_save:
        result = {"model": MODEL, **SIZES, "rounds": rounds, "beyond_capture_s": beyond, "limit_s": LIMIT_S}
        report.save("plan-time-cpu", result, device="cpu", module="bench.plan_time")
    print(tabulate(rounds, headers=["capture s", "plan s"], floatfmt=".2f"))
    holds = beyond <= LIMIT_S
    verdict = "PASS" if holds else "SHORT"
    print(f"\nplanning beyond capture, fastest rounds: {beyond:.2f} s, must be <= {LIMIT_S:g}: {verdict}")
    return int(options.check and not holds)


if __name__ == "__main__":
    sys.exit(main())
