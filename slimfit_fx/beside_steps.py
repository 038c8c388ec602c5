"""What a model holds beside its steps: parameters, buffers, optimizer state, and what the optimizer's step takes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from slimfit_fx.config import Config
from slimfit_fx.planning.budget import Budget, FixedBytes, budget_bytes, fixed_bytes
from slimfit_fx.planning.update import UpdateMemory, step_memory
from slimfit_fx.runtime.moments import pace_of, paced_groups
from slimfit_fx.runtime.sampled import sampled_bytes
from slimfit_fx.schedule import Scheduler
from slimfit_fx.units import GateUnit

ADAMW_STATE_PER_BYTE = 2
"""Assumed before the first optimizer step: two moments per trainable element, in the parameter's dtype."""
Optimizers = Callable[[], Sequence[Optimizer]]
"""What tells the optimizers that were seen with the model's parameters."""
OptimizerChoice = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
"""What ``optimizer=`` takes: one that holds the model's parameters, or what makes one of them (a class will do)."""
_BY_RATE = ("ils", "ils_paper", "random", "round_robin")


def find_optimizer(model: nn.Module, optimizer: OptimizerChoice | None) -> Optimizer | None:
    """The optimizer that ``model`` is said to be trained with, before a step of it was seen.

    Raises:
        TypeError: neither an optimizer nor what makes one.
        ValueError: it holds none of the model's parameters.
    """
    made: Any = optimizer
    if callable(optimizer) and not isinstance(optimizer, Optimizer):
        made = optimizer([p for p in model.parameters() if p.requires_grad])
    if optimizer is None:
        return None
    if not isinstance(made, Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or make one of a list of parameters, got "
            f"{optimizer!r}{'' if made is optimizer else f', which makes a {type(made).__name__}'}"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"optimizer must hold the model's parameters, got a {type(made).__name__} of others: make it of "
            "model.parameters(), or give a function that does"
        )
    return made


def seen_or_given(seen: Optimizers, given: Optimizer | None) -> Optimizers:
    """What tells the optimizers that were seen, and ``given`` before that. It does not keep ``given`` alive."""
    if given is None:
        return seen
    reference = weakref.ref(given)

    def optimizers() -> Sequence[Optimizer]:
        known = reference()
        return seen() or ([] if known is None else [known])

    return optimizers


def open_count(config: Config, scheduler: Scheduler, units: Sequence[GateUnit]) -> int:
    """How many units the scheduler opens in a step; one that does not go by the freeze rate may open them all."""
    return scheduler.open_count if config.scheduler in (*_BY_RATE, "none") else len(units)


def most_open_bytes(config: Config, scheduler: Scheduler, opened: int) -> int | None:
    """What gradients take at most of ``opened`` units that the scheduler opens in one step; None: of the largest."""
    most = scheduler.most_open_bytes(opened)
    return most if config.scheduler in _BY_RATE and most < Scheduler.most_open_bytes(scheduler, opened) else None


def make_budget(
    model: nn.Module, config: Config, units: Sequence[GateUnit], scheduler: Scheduler, optimizers: Optimizers
) -> Budget | None:
    """What the steps of ``model`` may take, if ``config`` says so."""
    if config.memory_budget is None:
        return None
    limit = budget_bytes(config.memory_budget, next(model.parameters()).device)
    return Budget(
        limit,
        open_count(config, scheduler, units),
        make_fixed_bytes(model, config, units, scheduler, optimizers),
        config.gradient_accumulation,
        len(units) if config.scheduler in _BY_RATE else 0,
    )


def make_fixed_bytes(
    model: nn.Module, config: Config, units: Sequence[GateUnit], scheduler: Scheduler, optimizers: Optimizers
) -> Callable[..., FixedBytes]:
    """What tells the bytes that are there beside the steps, by the number of open units (default: the scheduler's).

    It does not keep ``model`` alive. Asked again it answers from memory, until another optimizer is seen.
    """
    reference, usual = weakref.ref(model), open_count(config, scheduler, units)
    known: dict[int, FixedBytes] = {}
    known_for: list[int] = []

    def fixed(opened: int = usual) -> FixedBytes:
        model = reference()
        assert model is not None, "the model is gone"
        now = optimizers()
        if known_for != list(map(id, now)):
            known.clear()
            known_for[:] = map(id, now)
        if opened not in known:
            known[opened] = _fixed_bytes(model, config, units, scheduler, now, opened)
        return known[opened]

    return fixed


def _fixed_bytes(
    model: nn.Module,
    config: Config,
    units: Sequence[GateUnit],
    scheduler: Scheduler,
    optimizers: Sequence[Optimizer],
    opened: int,
) -> FixedBytes:
    most = most_open_bytes(config, scheduler, opened)
    largest = worst_for_the_update(units, opened, most)
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
        most_open_bytes=most,
    )


def worst_for_the_update(units: Sequence[GateUnit], opened: int, most: int | None) -> list[GateUnit]:
    """``opened`` units whose update takes at least what that of any so many takes whose gradients take ``most`` bytes.

    The largest ones until they take as much, then the smallest: the temporaries of an update go by the largest of the
    tensors or by their sum.
    """
    by_size = sorted(units, key=lambda unit: -unit.bytes)
    if most is None:
        return by_size[:opened]
    sums = itertools.accumulate(unit.bytes for unit in by_size)
    large = min(opened, 1 + sum(1 for total in sums if total < most))
    return by_size[:large] + by_size[large:][len(by_size) - opened :]


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
    pace = pace_of(scheduler, config)
    return step_memory(
        list(optimizers) or [AdamW(trainable)], [*always, *opened], compared, config.distance, config.distance_sample,
        lambda optimizer: paced_groups(optimizer, in_units, pace),
    )  # fmt: skip


def copied_bytes(param: nn.Parameter, config: Config, scheduler: Scheduler) -> int:
    """Bytes of what is remembered of a parameter while an optimizer steps."""
    return sampled_bytes(param, config.distance_sample) if scheduler.needs_distances else 0


def bytes_of(param: nn.Parameter) -> int:
    """Bytes of its elements."""
    return param.numel() * param.element_size()
