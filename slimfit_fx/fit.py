"""``max_batch``: the largest batch that fits a budget, found by dry runs on fake tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from slimfit_fx.api import checked_settings
from slimfit_fx.beside_steps import OptimizerChoice
from slimfit_fx.capture.fit import fits
from slimfit_fx.capture.partitioner import GivesUp, PlanTooLarge
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import (
    Budget,
    Judged,
    MemoryBudgetError,
    describe_step,
    format_bytes,
    held_alone,
    judge,
)
from slimfit_fx.planning.candidates import candidates
from slimfit_fx.planning.rows import MemoryPlan
from slimfit_fx.planning.search import largest_batch
from slimfit_fx.rehearsal import Rehearsal, known_step


@dataclass(frozen=True)
class LargestBatch:
    """The answer of ``max_batch``. Bytes are all that training holds on the device, as in ``memory_budget``."""

    batch: int
    peak_bytes: int
    """With that batch."""
    budget_bytes: int
    next_peak_bytes: int
    """With one example more: the smallest of the plans that were run dry at that size; above the budget."""
    config: Config
    """The settings that ``optimize`` takes for this batch under this budget."""
    plan: MemoryPlan
    """Of a step with that batch."""
    batched: tuple[str, ...]
    """The inputs whose first dimension is the batch."""
    dry_runs: int
    """How many steps were run dry to find out."""
    given_up: int = 0
    """How many more were planned only: their saved values alone were too much."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("config", "plan")}
        chosen = {name: getattr(self.config, name) for name in ("preset", "recompute", "codecs")}
        return {**own, **chosen, "plan": self.plan.to_dict()}

    def __str__(self) -> str:
        return (
            f"largest batch: {self.batch} ({', '.join(self.batched)}: first dimension)\n"
            f"takes {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)} with "
            f"{self.config.label}; a batch of {self.batch + 1} would take {format_bytes(self.next_peak_bytes)}\n"
            f"{self.dry_runs} dry runs; {self.given_up} more plans were given up before any code was written"
        )


def max_batch(
    model: nn.Module,
    example: Any,
    memory_budget: int | float | str,
    *,
    config: Config | None = None,
    optimizer: OptimizerChoice | None = None,
    **settings: Any,
) -> LargestBatch:
    """The largest batch with which a training step of ``model`` fits ``memory_budget``.

    Each size that is tried is planned on fake tensors, as ``plan`` does: nothing is compiled, trained or allocated.
    The answer is confirmed: a dry run at that batch fits, and none at one example more does.

    Args:
        model: as for ``optimize``; may be on the meta device.
        example: what the model's forward takes: a mapping of keyword arguments, a sequence of arguments, or one tensor.
            The batch is the first dimension of every tensor whose first dimension has the size that most of them have.
        memory_budget: bytes, ``"32GiB"``, or a share of the device's memory.
        config: settings of ``optimize`` in one object.
        optimizer: what the model will be trained with, or what makes it of a list of parameters; AdamW is assumed.
        settings: or as keywords.

    Raises:
        MemoryBudgetError: not even one example fits; with the smallest peak that would.
        TypeError: the example is neither a mapping, a sequence nor a tensor; ``optimizer`` is none.
        ValueError: bad settings, no batch in the example, a model that cannot be captured, or the optimizer of another.
    """
    if config is None:
        settings = {**settings, "memory_budget": memory_budget}
    else:
        config = dataclasses.replace(config, memory_budget=memory_budget)
    chosen, (units, _), given = checked_settings(model, config, settings, plan_only=True, optimizer=optimizer)
    sized = SizedExample.of(example)
    probes = _Probes(Rehearsal(model, units, faked=True, optimizer=given), chosen, sized)
    budget = probes.rehearsal.budget(chosen)
    batch, index = largest_batch(
        lambda c, b: probes.takes(c, b).total_bytes,
        lambda c, b: probes.fits(c, b, budget),
        len(probes.configs),
        budget.limit,
        start=sized.size,
        base_bytes=budget.fixed().total,
    )
    if batch == 0:
        probes.refuse(budget)
    taken = probes.takes(index, batch)
    more = probes.smallest_at(batch + 1).total_bytes
    return LargestBatch(
        batch, taken.total_bytes, budget.limit, more, taken.config, probes.plan(index, batch), sized.batched,
        len(probes.known), len(probes.given_up),
    )  # fmt: skip


@dataclass
class _Probes:
    """Planned steps by candidate and batch; each is planned once."""

    rehearsal: Rehearsal
    config: Config
    example: SizedExample
    known: dict[tuple[int, int], Judged] = field(default_factory=dict)
    given_up: set[tuple[int, int]] = field(default_factory=set)
    configs: list[Config] = field(init=False)

    def __post_init__(self) -> None:
        self.configs = candidates(self.config)

    def takes(self, candidate: int, batch: int, gives_up: GivesUp | None = None) -> Judged:
        key = (candidate, batch)
        if key not in self.known:
            config = self.configs[candidate]
            graphs = self.rehearsal.graphs(config, *self.example.at(batch), peak=True, gives_up=gives_up)
            self.known[key] = judge(config, known_step(graphs), self.rehearsal.budget(config))
        return self.known[key]

    def fits(self, candidate: int, batch: int, budget: Budget) -> bool:
        """Whether ``budget`` holds; no code is written if the saved values alone tell."""
        try:
            judged = self.takes(candidate, batch, lambda _, plan: held_alone(plan, budget) > budget.limit)
        except PlanTooLarge:
            self.given_up.add((candidate, batch))
            return False
        return fits(judged, budget)

    def plan(self, candidate: int, batch: int) -> MemoryPlan:
        config = dataclasses.replace(self.configs[candidate], memory_budget=None)
        return self.rehearsal.plan(config, *self.example.at(batch), peak=True)

    def smallest_at(self, batch: int) -> Judged:
        """The smallest of the steps that were run dry at this size, the last candidate's among them."""
        self.takes(len(self.configs) - 1, batch)
        return min((j for (_, size), j in self.known.items() if size == batch), key=lambda judged: judged.total_bytes)

    def refuse(self, budget: Budget) -> None:
        best = min((self.takes(c, 1) for c in range(len(self.configs))), key=lambda judged: judged.total_bytes)
        helps = "shorter inputs, a higher freeze_rate" if budget.update_fits() else "an optimizer that takes less"
        raise MemoryBudgetError(
            f"memory_budget: not even a batch of 1 fits into {format_bytes(budget.limit)}: the smallest step takes "
            f"{describe_step(budget, best)}; a budget of that size would do. A smaller model or {helps} brings it down",
            smallest_bytes=best.total_bytes,
        )


@dataclass(frozen=True)
class SizedExample:
    """Arguments of a forward, and which of their tensors have the batch as their first dimension."""

    leaves: tuple[Any, ...]
    structure: Any
    batched: tuple[str, ...]
    where: frozenset[int]
    size: int
    """The batch that the example has."""

    @classmethod
    def of(cls, example: Any) -> SizedExample:
        """Find the batch in ``example``.

        Raises:
            TypeError: neither a mapping, a sequence nor a tensor.
            ValueError: no tensor has a first dimension, or several sizes are equally common.
        """
        args, kwargs = arguments_of_forward(example)
        found, structure = tree_flatten_with_path((args, kwargs))
        names = [_name_of(keystr(path)) for path, _ in found]
        leaves = tuple(leaf for _, leaf in found)
        sizes = {i: int(x.shape[0]) for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() > 0}
        size = _common_size({names[i]: n for i, n in sizes.items()})
        where = frozenset(i for i, n in sizes.items() if n == size)
        return cls(leaves, structure, tuple(names[i] for i in sorted(where)), where, size)

    def at(self, batch: int) -> tuple[Any, Any]:
        """(args, kwargs) with this batch; the batched tensors are fake."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        leaves = [_resized(x, batch, mode) if i in self.where else x for i, x in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs


def arguments_of_forward(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a forward that takes ``example``.

    Raises:
        TypeError: neither a mapping, a sequence nor a tensor.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise TypeError(
        f"example must be what the model's forward takes, a mapping of keyword arguments, a sequence of arguments or "
        f"one tensor, got {type(example).__name__}"
    )


def _name_of(path: str) -> str:
    """``[1]['input_ids']`` as ``input_ids``, ``[0][0]`` as ``argument 0``."""
    text = path[3:].strip("[]").strip("'")
    return f"argument {text}" if path.startswith("[0]") else text


def _common_size(sizes: Mapping[str, int]) -> int:
    counted = Counter(sizes.values()).most_common(2)
    if not counted:
        raise ValueError("no batch in the example: none of its tensors has a first dimension")
    if len(counted) > 1 and counted[0][1] == counted[1][1]:
        raise ValueError(
            "which size is the batch? No first dimension is the most common one, got "
            f"{', '.join(f'{name}: {size}' for name, size in sizes.items())}; give an example with another batch, or "
            "bind the inputs that do not depend on it"
        )
    return counted[0][0]


def _resized(x: Tensor, batch: int, mode: FakeTensorMode) -> Tensor:
    if x.is_meta:
        return torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device="meta")
    with mode:
        return torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device)
