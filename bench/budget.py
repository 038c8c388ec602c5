"""Budgets that were accepted against what steps then took: ``python -m bench.budget``.

Random small models, presets, batches and budgets between the smallest that fits and the largest that makes a
difference; the seed makes them the same in every run. Each accepted budget is held against the allocator's events over
some steps under ILS, optimizer's step included. The budgets of a model are taken in falling order, and for one model of
each kind, each with another preset, ten more in even steps: neither the predicted nor the measured peak may rise.
Results go to ``bench/results/budget-cpu.json``, after each model; one that is there is not measured again, but with
``--again``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import slimfit_fx
from bench import report
from bench.measure import step_peak
from bench.models import Case, build_model, make_batch, make_case

TOLERANCE = 1.01
MODELS = ("bert", "gpt2", "llama", "vit")
PRESETS = ("max", "balanced", "paper", "exact")


@dataclass(frozen=True)
class Group:
    """One model, trained under several budgets."""

    case: Case
    preset: str
    freeze_rate: float
    accumulates: bool

    def settings(self, budget: int) -> dict[str, Any]:
        """For ``slimfit_fx.optimize`` and ``plan``."""
        own = {"preset": self.preset, "freeze_rate": self.freeze_rate}
        return {**own, "memory_budget": budget, "gradient_accumulation": self.accumulates}

    @property
    def name(self) -> str:
        """A short one for the table."""
        return f"{self.case.name} {self.preset} freeze {self.freeze_rate}{' accum' if self.accumulates else ''}"


def groups(count: int, seed: int) -> list[Group]:
    """``count`` random groups; four have all models and all presets, and the next four in other pairs."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        model = MODELS[index % len(MODELS)]
        size = {"batch": draw.randint(4, 24), "length": draw.choice((32, 48, 64, 96)), "layers": draw.randint(1, 2)}
        width = draw.choice((64, 128))
        case = make_case(model, **size, width=width, heads=2, vocab=draw.choice((200, 1000)), resolution=64)
        preset = PRESETS[(index + index // len(MODELS)) % len(PRESETS)]
        found.append(Group(case, preset, draw.choice((0.5, 0.8, 0.9)), accumulates=draw.random() < 0.25))
    return found


def smallest_and_largest(group: Group) -> tuple[int, int]:
    """(the smallest budget that fits, one that the least lossy plan fits)."""
    inputs, model = make_batch(group.case), build_model(group.case)
    config = slimfit_fx.Config(**group.settings(1))
    try:
        slimfit_fx.plan(model, config=config, **inputs)
    except slimfit_fx.MemoryBudgetError as error:
        smallest = error.smallest_bytes
    assert smallest is not None
    config = slimfit_fx.Config(**group.settings(1 << 40))
    plan = slimfit_fx.plan(model, config=config, **inputs)
    assert plan.peak is not None
    # parameters and AdamW's state
    return smallest, max(smallest + 1, int(1.05 * (3 * plan.parameter_bytes + plan.peak.worst_bytes)))


def measure(group: Group, budget: int, steps: int) -> dict[str, Any]:
    """Train under one budget, and say what it took."""
    torch._dynamo.reset()
    began = time.perf_counter()
    model, inputs = build_model(group.case), make_batch(group.case)
    slimfit_fx.optimize(model, **group.settings(budget))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    call(model, inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = held(model, optimizer)
    most = 0
    for _ in range(steps):
        for _ in range(2 if group.accumulates else 1):
            earlier = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
            found = step_peak(lambda: call(model, inputs), backward=lambda outputs: outputs.loss.backward())
            most = max(most, earlier + found.peak_bytes)
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        most = max(most, gradients + step_peak(optimizer.step).peak_bytes)
        optimizer.zero_grad()
    plan = slimfit_fx.session(model).plan
    chosen = [note for note in plan.notes if "memory_budget" in note]
    predicted = None if plan.peak is None else plan.peak.worst_bytes
    seconds = time.perf_counter() - began
    return {
        "budget": budget, "measured": before + most, "predicted_step": predicted, "preset": plan.preset,
        "notes": chosen, "seconds": seconds,
    }  # fmt: skip


def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """All that the model returns, kept until backward is done."""
    return model(**inputs)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def work(options: argparse.Namespace) -> None:
    """Measure one group, in this process."""
    group = groups(options.groups, options.seed)[options.worker]
    draw = random.Random(options.seed * 1000 + options.worker)
    low, high = smallest_and_largest(group)
    budgets = sorted((low, *(draw.randint(low, high) for _ in range(options.budgets - 1))), reverse=True)
    rows = [measure(group, budget, options.steps) for budget in budgets]
    steps = falling(low, high, options.falling) if options.worker < len(MODELS) else []
    even = [measure(group, budget, options.steps) for budget in steps]
    report.write_out(options.out, {"smallest": low, "rows": rows, "falling": even})


def falling(low: int, high: int, count: int) -> list[int]:
    """``count`` budgets in even steps from ``high`` down to ``low``."""
    return [high - (high - low) * k // max(1, count - 1) for k in range(count)]


def rises(peaks: Sequence[int | None], tolerance: float = 1.0) -> int:
    """How many of ``peaks`` are larger than the smallest before them."""
    known = [peak for peak in peaks if peak is not None]
    return sum(peak > tolerance * min(known[:index]) for index, peak in enumerate(known) if index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the groups, print the table, store the results; return 1 with ``--check`` if a bound is missed."""
    parser = argparse.ArgumentParser("python -m bench.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--budgets", type=int, default=5, help="of each group")
    parser.add_argument("--falling", type=int, default=10, help="budgets in even steps, of one group for each model")
    parser.add_argument("--steps", type=int, default=4, help="measured steps under each budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure what is stored again")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed or a group failed")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        work(options)
        return 0
    asked = groups(options.groups, options.seed)
    known = {} if options.again else finished(report.stored("budget-cpu"), options)
    numbers = [f"--{name}={getattr(options, name)}" for name in ("groups", "budgets", "falling", "steps", "seed")]
    for index, group in enumerate(asked):
        if group.name in known:
            continue
        print(f"{group.name} ...", file=sys.stderr, flush=True)
        outcome = report.run_worker("bench.budget", [*numbers, "--worker", str(index)], timeout_s=3600)
        known[group.name] = {"name": group.name, **report.stamp("cpu", "bench.budget"), **outcome}
        if not options.no_save:
            document = {"steps": options.steps, "seed": options.seed, "results": _in_order(asked, known)}
            report.save("budget-cpu", document, device="cpu", module="bench.budget")
    return _report(_in_order(asked, known), options)


def _in_order(asked: Sequence[Group], known: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [known[group.name] for group in asked if group.name in known]


def finished(document: Mapping[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The groups of a result file that are done, by name, each with the commit and machine that measured it."""
    asked = [document.get(name) for name in ("steps", "seed")]
    if asked != [options.steps, options.seed]:
        return {}
    return {
        result["name"]: result
        for result in report.rows_in(document)
        if "error" not in result
        and len(result["rows"]) == options.budgets
        and len(result["falling"]) in (0, options.falling)
    }


def _report(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    lines, count, above, rose = [], 0, 0, 0
    for result in results:
        if "error" in result:
            lines.append([result["name"], None, None, result["error"][-60:]])
            continue
        rows, even = result["rows"], result["falling"]
        shares = [row["measured"] / row["budget"] for row in (*rows, *even)]
        mine = sum(rises([row["predicted_step"] for row in group]) for group in (rows, even))
        mine += rises([row["measured"] for row in even], TOLERANCE)
        count, rose, above = count + len(shares), rose + mine, above + sum(share > TOLERANCE for share in shares)
        lines.append([result["name"], max(shares), mine, " ".join(row["preset"] for row in (*rows, *even))])
    print(tabulate(lines, headers=["case", "most of the budget used", "rises", "presets, budget falling"]))
    failed = above > 0 or rose > 0 or any("error" in result for result in results)
    print(f"\n{count} accepted budgets: {above} exceeded by more than 1%, peak rose {rose} times under a falling one")
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
