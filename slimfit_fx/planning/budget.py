"""A budget in bytes: what a step takes in all, and what to say when nothing fits.

The budget bounds everything that the training step holds on the device: parameters, buffers, optimizer state,
gradients, saved activations and temporaries, for the worst choice of open units that the scheduler may make. Each
candidate (candidates.py) is judged by the physical peak of the code that Inductor writes for it (peak.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimfit_fx.config import Config
from slimfit_fx.planning.patterns import Patterns
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.planning.workspaces import library_bytes
from slimfit_fx.presets import FALLBACK

_RATES = 3
"""How many freeze rates are tried before none is proposed."""
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}


class MemoryBudgetError(ValueError):
    """No plan fits the budget. ``smallest_bytes``: the smallest budget that would do, if it is known."""

    def __init__(self, message: str, *, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class FixedBytes:
    """What is there before a step begins and stays; and what the optimizer's step takes."""

    parameters: int
    buffers: int
    optimizer_state: int
    update: int
    """Gradients, copies of what is compared of open weights and the optimizer's temporaries, while it steps."""
    gradients: int = 0
    """Of the units that may be open, at most, and of all that always trains."""
    libraries: int = 0
    """What the device's libraries keep for themselves (workspaces.py)."""
    most_open_bytes: int | None = None
    """Gradients of the units that may be open, at most; None: of any choice of so many."""

    @property
    def total(self) -> int:
        """What is there before and behind each step."""
        return self.parameters + self.buffers + self.optimizer_state + self.libraries


@dataclass(frozen=True)
class Budget:
    """What one model may take: ``limit`` bytes, with ``open_count`` units open in each step."""

    limit: int
    open_count: int
    fixed_with: Callable[[int], FixedBytes]
    """What is there beside steps in which so many units are open."""
    accumulates: bool = False
    """Gradients of earlier micro-batches are alive in forward and backward."""
    num_units: int = 0
    """Of how many units the freeze rate keeps a share closed; 0 if the scheduler does not go by it."""

    def fixed(self) -> FixedBytes:
        """What is there beside the steps."""
        return self.fixed_with(self.open_count)

    def with_open(self, count: int) -> Budget:
        """The same limit where ``count`` units are open in each step."""
        return dataclasses.replace(self, open_count=count)

    def update_fits(self) -> bool:
        """Whether the optimizer's step fits; if not, no plan of forward and backward will do."""
        fixed = self.fixed()
        return fixed.total + fixed.update <= self.limit


@dataclass(frozen=True)
class Judged:
    """One candidate and what a step with it takes."""

    config: Config
    step_peak_bytes: int
    """Upper bound for every choice of open units, above what is there before the step."""
    total_bytes: int


Retry = Callable[[Config, Budget], tuple[Judged, StepTrace]]
"""What a step takes with other settings or other open units: planned anew, and run dry."""


def parse_bytes(text: str) -> int:
    """Bytes of ``"6GiB"``, ``"500 MB"``, ``"1.5g"``.

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None:
        raise ValueError(f"not a size in bytes: got {text!r}; write it as '6GiB', '500MB' or a whole number")
    return int(float(found.group(1)) * _UNITS[found.group(2) or ""])


def budget_bytes(budget: int | float | str, device: torch.device) -> int:
    """The budget in bytes; a share of the device's memory if it is a number in (0, 1]."""
    if isinstance(budget, str):
        return parse_bytes(budget)
    return int(budget * _device_bytes(device)) if isinstance(budget, float) and budget <= 1 else int(budget)


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fixed_bytes(
    model: nn.Module,
    unit_bytes: Sequence[int],
    open_count: int,
    *,
    optimizer_state: int,
    copies: Sequence[int] = (),
    temporaries: int | None = None,
    most_open_bytes: int | None = None,
) -> FixedBytes:
    """What a model holds beside its steps.

    ``unit_bytes``: gradients of each unit; ``copies``: what is remembered of each while the optimizer steps, if it is;
    ``temporaries``: what the optimizer takes for itself (update.py); a rough bound if it is not known.
    ``most_open_bytes``: what gradients of open units take at most, if the scheduler sees to that.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in parameters]
    with_copies = [sum(both) for both in zip(unit_bytes, copies or [0] * len(unit_bytes), strict=True)]
    always = sum(sizes) - sum(unit_bytes)
    opened, copied = sum(heapq.nlargest(open_count, unit_bytes)), sum(heapq.nlargest(open_count, with_copies))
    if most_open_bytes is not None:
        opened = min(opened, most_open_bytes)
        copied = min(copied, opened + sum(heapq.nlargest(open_count, copies)))
    trained = always + opened
    if temporaries is None:
        temporaries = 3 * trained
    return FixedBytes(
        parameters=sum(p.numel() * p.element_size() for p in model.parameters()),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        optimizer_state=optimizer_state,
        update=always + copied + temporaries,
        gradients=trained,
        libraries=max((library_bytes(device) for device in {p.device for p in parameters}), default=0),
        most_open_bytes=most_open_bytes,
    )


def judge(config: Config, trace: StepTrace, budget: Budget) -> Judged:
    """What a step takes, with all that ``budget`` must cover, by the plan that ``trace`` was compiled from."""
    fixed = budget.fixed()
    worst, _ = trace.worst(min(budget.open_count, trace.num_gates), fixed.most_open_bytes)
    earlier = fixed.gradients if budget.accumulates else 0
    return Judged(config, worst, fixed.total + max(earlier + worst, fixed.update))


def held_alone(plan: GraphPlan, budget: Budget) -> int:
    """Bytes that a step with ``plan`` takes at least, before any code is written: what is held to its backward.

    The saved values of a graph never share memory, and all of them are alive at once; a tenth is left for what Inductor
    may still merge.
    """
    by_gate: dict[int, int] = {}
    for row in plan.rows:
        if row.gates:
            gate = int(row.gates[0])
            by_gate[gate] = by_gate.get(gate, 0) + row.bytes_open - row.bytes_closed
    fixed = budget.fixed()
    pattern = Patterns(budget.open_count, fixed.most_open_bytes, plan.gate_bytes).largest(by_gate)
    held = sum(row.bytes_closed if row.gates else row.bytes_open for row in plan.rows)
    held += sum(by_gate[gate] for gate in pattern)
    return fixed.total + (fixed.gradients if budget.accumulates else 0) + int(0.9 * held)


def explain(budget: Budget, best: Judged, trace: StepTrace, batch: int | None, retry: Retry) -> str:
    """Why nothing fits, the smallest peak that would (``best``, of ``trace``), and what would bring it down.

    What is said to fit, or to take less, was tried with ``retry``; only the batch is guessed along a straight line.
    """
    fixed = budget.fixed()
    said = f"{_refusal(budget)} The smallest step takes {describe_step(budget, best)}"
    if budget.limit <= fixed.total:
        return said + ": parameters and optimizer state alone do not fit; use a smaller model or optimizer"
    advice = [_higher_rate(budget, best, trace, retry)]
    if budget.update_fits():
        advice += [_smaller_batch(budget, best, batch), _preset_max(budget, best, retry), _more_error(best.config)]
    else:
        advice.append("no smaller batch and no preset helps: it is the optimizer's step that takes more than is left")
    return "; ".join([said, *(text for text in advice if text)])


def explain_part(budget: Budget, so_far: Judged) -> str:
    """Why nothing fits, where only some of the graphs of a forward are known: no promises."""
    return (
        f"{_refusal(budget)} The forward breaks into several graphs; up to this one a step takes "
        f"{describe_step(budget, so_far)}; what is behind it is not known. A higher freeze rate, a smaller batch or, "
        "if it is not the preset already, 'max' brings it down"
    )


def _higher_rate(budget: Budget, best: Judged, trace: StepTrace, retry: Retry) -> str:
    """A freeze rate at which the smallest candidate fits, or nothing.

    The plan for another rate is another plan: what the trace of this one promises is tried.
    """
    tried = budget
    for _ in range(_RATES):
        count = _most_open(tried, best.config, trace) if budget.num_units else 0
        if not count:
            break
        rate, tried = rate_that_leaves(count, budget.num_units), tried.with_open(count)
        judged, trace = retry(dataclasses.replace(best.config, freeze_rate=rate), tried)
        if judged.total_bytes <= budget.limit:
            return f"a freeze rate of {rate} would fit ({count} open units instead of {budget.open_count})"
    return ""


def _most_open(budget: Budget, config: Config, trace: StepTrace) -> int:
    """The most units, fewer than now, with which the step of ``trace`` fits; 0 if there are none."""
    counts = range(1, budget.open_count)
    return bisect.bisect_right(
        counts, budget.limit, key=lambda count: judge(config, trace, budget.with_open(count)).total_bytes
    )


def rate_that_leaves(count: int, num_units: int) -> float:
    """The freeze rate of fewest digits that leaves just ``count`` (at least 1) of ``num_units`` units open.

    Schedulers freeze ``int(rate * num_units)`` units: 3 of 101 are open at 0.98, and 4 at 0.970.
    """
    frozen = num_units - count
    for digits in itertools.count(1):
        first = -(-frozen * 10**digits // num_units)
        for numerator in (first, first + 1):  # the float nearest to a quotient may lie below it
            if int(numerator / 10**digits * num_units) == frozen:
                return numerator / 10**digits
    raise AssertionError("some number of digits does")


def _smaller_batch(budget: Budget, best: Judged, batch: int | None) -> str:
    """About how many examples fit if all but the gradients grows with the batch; nothing if that is not even one."""
    if batch is None or batch <= 1:
        return ""
    fixed = budget.fixed()
    room = budget.limit - fixed.total - (fixed.gradients if budget.accumulates else 0)
    per_example = max(1.0, (best.step_peak_bytes - fixed.gradients) / batch)
    smaller = min(int((room - fixed.gradients) / per_example), batch - 1)
    if smaller < 1:
        return ""
    return f"a batch of about {smaller} instead of {batch} would fit (slimfit_fx.max_batch finds the largest)"


def _preset_max(budget: Budget, best: Judged, retry: Retry) -> str:
    """What preset max would take, if that is less."""
    if best.config.preset == "max":
        return ""
    judged, _ = retry(dataclasses.replace(best.config, preset="max"), budget)
    if judged.total_bytes >= best.total_bytes:
        return ""
    less = f"{format_bytes(judged.total_bytes)}, {format_bytes(best.total_bytes - judged.total_bytes)} less"
    fits = "would fit: it" if judged.total_bytes <= budget.limit else "alone does not do, but"
    return f"preset 'max' (activations in four bits) {fits} takes {less}"


def _more_error(config: Config) -> str:
    if not any(config.why_milder(kind) for kind in FALLBACK):
        return ""
    return f"a max_gradient_error above {config.max_gradient_error:g} allows codecs of fewer bits"


def describe_excess(budget: Budget, best: Judged, batch: int | None) -> str:
    """What is said when a model that is trained already meets what no plan fits: a batch, or an optimizer."""
    which = "" if batch is None else f" with a batch of {batch}"
    return (
        f"slimfit_fx: memory_budget: nothing fits into {format_bytes(budget.limit)}{which}: training "
        f"goes on with the smallest plan there is. The smallest step takes {describe_step(budget, best)}"
    )


def describe_step(budget: Budget, best: Judged) -> str:
    """The bytes of a step and what they are made of."""
    fixed = budget.fixed()
    earlier = fixed.gradients if budget.accumulates else 0
    text = (
        f"{format_bytes(best.total_bytes)} ({best.total_bytes} bytes): "
        f"{format_bytes(fixed.parameters + fixed.buffers)} parameters and buffers, "
        f"{format_bytes(fixed.optimizer_state)} optimizer state"
    )
    if fixed.libraries:
        text += f", {format_bytes(fixed.libraries)} that the device's libraries keep"
    if fixed.update > earlier + best.step_peak_bytes:
        return f"{text}, {format_bytes(fixed.update)} in the optimizer's step ({best.config.label})"
    accumulated = f", {format_bytes(earlier)} accumulated gradients" if earlier else ""
    return f"{text}{accumulated}, {format_bytes(best.step_peak_bytes)} in the step itself ({best.config.label})"


def _refusal(budget: Budget) -> str:
    return f"memory_budget: nothing fits into {format_bytes(budget.limit)}."


def format_bytes(size: int) -> str:
    """``"5.25 GiB"`` or ``"5.3 MiB"``."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
