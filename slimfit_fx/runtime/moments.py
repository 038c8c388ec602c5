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

Groups = list[dict[str, Any]]
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


def paced_groups(optimizer: Optimizer, units: Collection[int], pace: Pace) -> Groups | None:
    """The groups of ``optimizer`` with units in groups of their own, which keep ``pace``.

    ``units``: the ids of their parameters. None if nothing is to change: units train in every step, or the optimizer is
    no Adam.
    """
    if pace == Pace() or not isinstance(optimizer, _ADAMS):
        return None
    groups: Groups = []
    apart: Groups = []
    for group in optimizer.param_groups:
        mine = [param for param in group["params"] if id(param) in units]
        others = [param for param in group["params"] if id(param) not in units]
        betas = tuple(beta**pace.exponent for beta in group["betas"])
        paced = {"params": mine, "betas": betas, "lr": group["lr"] * pace.factor}
        if not mine:
            groups.append(group)
        elif not others:
            groups.append(Part(group, paced))
        else:
            groups.append(Part(group, {"params": others}))
            apart.append(Part(group, paced))
    return groups + apart


class Part(dict[str, Any]):
    """Some parameters of a group of an optimizer, with settings of their own; what is written to it reaches the group.

    It keeps what it read: an optimizer that counts steps in its groups counts once, in how many parts they may be.
    """

    def __init__(self, group: dict[str, Any], own: Mapping[str, Any]) -> None:
        super().__init__({**group, **own})
        self._group = group

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._group[key] = value


class Regrouped:
    """Optimizers that have other groups for the length of a step, and their own ones.

    Two models may share an optimizer: the first that regroups it remembers what it was. A step that raises leaves it
    regrouped, in parts that write to the user's groups; the next one begins with the groups as they were.
    """

    def __init__(self) -> None:
        self._whole: weakref.WeakKeyDictionary[Optimizer, tuple[object, Groups]] = weakref.WeakKeyDictionary()

    def enter(self, owner: object, optimizer: Optimizer, groups: Groups) -> None:
        """Give ``optimizer`` these groups until ``leave``."""
        self._whole.setdefault(optimizer, (owner, optimizer.param_groups))
        optimizer.param_groups = groups

    def leave(self, optimizer: Optimizer) -> None:
        """Give it its own back."""
        found = self._whole.pop(optimizer, None)
        if found is not None:
            optimizer.param_groups = found[1]

    def mend(self, owner: object, optimizer: Optimizer) -> None:
        """When ``owner`` sees a step begin: undo what a step that raised has left."""
        found = self._whole.get(optimizer)
        if found is not None and found[0] is owner:
            self.leave(optimizer)
