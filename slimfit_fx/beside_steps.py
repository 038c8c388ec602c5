"""What a model holds beside its steps: parameters, buffers, optimizer state, and what the optimizer's step takes."""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import AdamW, Optimizer

from slimfit_fx.config import Config
from slimfit_fx.planning.budget import Budget, FixedBytes, budget_bytes, fixed_bytes
from slimfit_fx.planning.update import UpdateMemory, step_memory
from slimfit_fx.runtime.sampled import sampled_bytes
from slimfit_fx.schedule import Scheduler
from slimfit_fx.units import GateUnit

ADAMW_STATE_PER_BYTE = 2
"""Assumed before the first optimizer step: two moments per trainable element, in the parameter's dtype."""
Optimizers = Callable[[], Sequence[Optimizer]]
"""What tells the optimizers that were seen with the model's parameters."""


def open_count(config: Config, scheduler: Scheduler, units: Sequence[GateUnit]) -> int:
    """How many units the scheduler opens in a step; one that does not go by the freeze rate may open them all."""
    by_rate = config.scheduler in ("ils", "none", "random", "round_robin")
    return scheduler.open_count if by_rate else len(units)


def make_budget(
    model: nn.Module, config: Config, units: Sequence[GateUnit], scheduler: Scheduler, optimizers: Optimizers
) -> Budget | None:
    """What the steps of ``model`` may take, if ``config`` says so."""
    if config.memory_budget is None:
        return None
    limit = budget_bytes(config.memory_budget, next(model.parameters()).device)
    fixed = make_fixed_bytes(model, config, units, scheduler, optimizers)
    return Budget(limit, open_count(config, scheduler, units), fixed, config.gradient_accumulation)


def make_fixed_bytes(
    model: nn.Module, config: Config, units: Sequence[GateUnit], scheduler: Scheduler, optimizers: Optimizers
) -> Callable[[], FixedBytes]:
    """What tells the bytes that are there beside the steps; it does not keep ``model`` alive.

    Asked again it answers from memory, until another optimizer is seen.
    """
    reference, opened = weakref.ref(model), open_count(config, scheduler, units)
    known: dict[tuple[int, ...], FixedBytes] = {}

    def fixed() -> FixedBytes:
        model = reference()
        assert model is not None, "the model is gone"
        key = tuple(map(id, optimizers()))
        if key not in known:
            known.clear()
            known[key] = _fixed_bytes(model, config, units, scheduler, optimizers(), opened)
        return known[key]

    return fixed


def _fixed_bytes(
    model: nn.Module,
    config: Config,
    units: Sequence[GateUnit],
    scheduler: Scheduler,
    optimizers: Sequence[Optimizer],
    opened: int,
) -> FixedBytes:
    largest = heapq.nlargest(opened, units, key=lambda unit: unit.bytes)
    update = update_memory(model, config, units, scheduler, optimizers, [unit.name for unit in largest])
    trainable = sum(bytes_of(p) for p in model.parameters() if p.requires_grad)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    return fixed_bytes(
        model,
        [unit.bytes for unit in units],
        opened,
        optimizer_state=ADAMW_STATE_PER_BYTE * trainable if update is None else update.state_bytes,
        copies=[copied_bytes(by_name[unit.name], config, scheduler) for unit in units],
        temporaries=None if update is None else update.temporary_bytes,
    )


def update_memory(
    model: nn.Module,
    config: Config,
    units: Sequence[GateUnit],
    scheduler: Scheduler,
    optimizers: Sequence[Optimizer],
    open_names: Iterable[str],
) -> UpdateMemory | None:
    """The memory of an optimizer step with these units open; AdamW's until the optimizer has been seen.

    None if the optimizer's step cannot run without values.
    """
    by_name = dict(model.named_parameters(remove_duplicate=False))
    opened = [by_name[name] for name in open_names]
    in_units = {id(by_name[unit.name]) for unit in units}
    trainable = [p for p in model.parameters() if p.requires_grad]
    always = [p for p in trainable if id(p) not in in_units]
    compared = opened if scheduler.needs_distances else []
    return step_memory(
        list(optimizers) or [AdamW(trainable)], [*always, *opened], compared, config.distance, config.distance_sample
    )


def copied_bytes(param: nn.Parameter, config: Config, scheduler: Scheduler) -> int:
    """Bytes of what is remembered of a parameter while an optimizer steps."""
    return sampled_bytes(param, config.distance_sample) if scheduler.needs_distances else 0


def bytes_of(param: nn.Parameter) -> int:
    """Bytes of its elements."""
    return param.numel() * param.element_size()
