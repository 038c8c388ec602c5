"""What an Adam does to units that train in few steps: averages that reach back as far, and larger steps.

Adam averages the gradients of a parameter's last updates: about 10 of them with ``beta1 = 0.9``, their squares over
1000 with ``beta2 = 0.999``. A unit that is open in one step of ten gets an update where others get ten. Its averages
would reach back ten times as far: most of its direction would be of gradients a hundred steps old, of a model that has
moved on since. With ``beta ** (units / open units)`` they span as many optimizer steps as the user's betas ask for. And
it would stay behind: each update of an Adam is about as long as the learning rate, and it has a tenth of them. Its
learning rate is multiplied by ``(units / open units) ** catch_up``::

    betas (0.9, 0.999), rate 1e-4, one of ten units open  ->  units: betas (0.35, 0.99), rate 3.2e-4; others: unchanged

The optimizer is the user's, and so are its groups: a learning rate schedule, a checkpoint or a log never sees other
ones. Only while it steps are they replaced by groups in which units are apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from slimfit_fx.schedule import Scheduler

if TYPE_CHECKING:
    from slimfit_fx.config import Config

Group = dict[str, Any]
"""Of an optimizer: "params" and settings."""
_ADAMS = (Adam, AdamW, NAdam, RAdam, Adamax)


@dataclass(frozen=True)
class Pace:
    """How units differ from parameters that always train."""

    exponent: float = 1.0
    """Of their betas."""
    factor: float = 1.0
    """Of their learning rate."""


def pace_of(scheduler: Scheduler, config: Config) -> Pace:
    """The pace of units under these settings; that of all others if the scheduler does not go by the freeze rate."""
    candidates = len(scheduler.candidates)
    if not scheduler.by_rate or not candidates:
        return Pace()
    rarity = candidates / min(scheduler.open_count, candidates)
    return Pace(rarity if config.moments == "steps" else 1.0, rarity**config.catch_up)


def paced_groups(optimizer: Optimizer, units: Collection[int], pace: Pace) -> list[Part] | None:
    """The groups of ``optimizer`` in parts: units in parts of their own, which keep ``pace``, behind all others.

    ``units``: the ids of their parameters. None if nothing is to change: units train in every step, or the optimizer is
    no Adam.
    """
    if pace == Pace() or not isinstance(optimizer, _ADAMS):
        return None
    parts: list[Part] = []
    apart: list[Part] = []
    for group in optimizer.param_groups:
        mine = [param for param in group["params"] if id(param) in units]
        others = [param for param in group["params"] if id(param) not in units]
        betas = tuple(beta**pace.exponent for beta in group["betas"])
        if others or not mine:
            parts.append(Part(group, {"params": others}))
        if mine:
            paced = {"params": mine, "betas": betas, "lr": group["lr"] * pace.factor}
            (apart if others else parts).append(Part(group, paced))
    return parts + apart


class Part:
    """Some parameters of a group of an optimizer, with settings of their own.

    What the optimizer sees is a plain dictionary (``torch.compile`` takes no other). What is written to it in the
    meantime goes to the group in ``write_back``: an optimizer that counts steps in its groups counts once.
    """

    def __init__(self, group: Group, own: Mapping[str, Any]) -> None:
        self._group = group
        self._given = {**group, **own}
        self.shown = dict(self._given)

    def write_back(self) -> None:
        """Write to the group what was written to ``shown``."""
        given = self._given
        self._group.update({k: v for k, v in self.shown.items() if k not in given or given[k] is not v})


class Regrouped:
    """Optimizers that have parts of their groups instead of these for the length of a step.

    Several models may share an optimizer: what one made parts of, the next makes parts of again. A step that raises
    leaves the parts; the next one begins with the groups as they were, and with what was written to the parts.
    """

    def __init__(self) -> None:
        self._whole: weakref.WeakKeyDictionary[Optimizer, list[_Made]] = weakref.WeakKeyDictionary()

    def enter(self, owner: object, optimizer: Optimizer, parts: list[Part]) -> None:
        """Give ``optimizer`` these parts until ``leave``."""
        self._whole.setdefault(optimizer, []).append(_Made(owner, optimizer.param_groups, parts))
        optimizer.param_groups = [part.shown for part in parts]

    def leave(self, optimizer: Optimizer) -> None:
        """Give it its own groups back."""
        for made in reversed(self._whole.pop(optimizer, [])):
            for part in made.parts:
                part.write_back()
            optimizer.param_groups = made.groups

    def mend(self, owner: object, optimizer: Optimizer) -> None:
        """When ``owner`` sees a step begin: undo what a step that raised has left."""
        found = self._whole.get(optimizer)
        if found and any(made.owner is owner for made in found):
            self.leave(optimizer)


@dataclass(frozen=True)
class _Made:
    """Parts that ``owner`` made of ``groups``."""

    owner: object
    groups: list[Group]
    parts: list[Part]
