"""What a scheduler is: after each optimizer step it decides which units train in the next one.

The engine drives it like this::

    scheduler.start(units, freeze_rate=0.9, seed=0)
    while training:
        open_units = scheduler.select()          # may be asked again: the answer holds until observe()
        ...                                      # forward, backward, optimizer step with those gates open
        scheduler.observe({name: distance, ...}) # exactly once per step; {} unless needs_distances

A scheduler of one's own needs ``select`` only::

    class TopBlocks(Scheduler):
        def select(self):
            return frozenset(unit.name for unit in self.candidates[-self.open_count:])

    register_scheduler("top_blocks", TopBlocks)
    slimfit_fx.optimize(model, scheduler="top_blocks")

All decisions follow from the seed, the step count and what was observed, never from global random state: ranks of a
distributed job that observe the same distances decide alike, and a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import abc
import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slimfit_fx._suggest import did_you_mean, unknown


@dataclass(frozen=True)
class UnitInfo:
    """One freezable unit, as a scheduler sees it."""

    name: str
    """Name of the unit (the first of its parameters' names)."""
    numel: int
    """Elements in the unit's parameters."""
    grad_bytes: int
    """Bytes that its gradients take while it is open."""


class Scheduler(abc.ABC):
    """Decides which units are open (train) in the next step.

    Subclasses implement :meth:`select`; one with a state beyond the step count extends :meth:`start`, :meth:`observe`,
    :meth:`state_dict` and :meth:`load_state_dict` as well.
    """

    needs_distances: ClassVar[bool] = False
    """Whether :meth:`observe` must be given update distances. If False, none are computed."""
    per_learning_rate: ClassVar[bool] = False
    """Whether these distances are divided by the learning rate of the step that they were measured in (the largest of
    all groups of the optimizers), as far as it is known: how fast a unit moves, whatever the schedule of the rate."""
    by_rate: ClassVar[bool] = False
    """Whether :attr:`open_count` units are open in each step and all have their turn, so that a unit trains in about
    ``1 - freeze_rate`` of the steps. Adam's averages of units are paced by it (``Config.moments``)."""

    units: tuple[UnitInfo, ...] = ()
    freeze_rate: float = 0.0
    seed: int = 0
    step: int = 0
    """Optimizer steps observed so far."""

    _pinned: frozenset[str] = frozenset()

    def start(self, units: Sequence[UnitInfo], *, freeze_rate: float, seed: int) -> None:
        """Begin a run: forget everything and take these units, in model order.

        Raises:
            ValueError: two units share a name, or ``freeze_rate`` is outside [0, 1).
        """
        names = [unit.name for unit in units]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"unit names must be unique, got {twice} more than once")
        if not 0.0 <= freeze_rate < 1.0:
            raise ValueError(f"freeze_rate must be in [0, 1), got {freeze_rate!r}")
        self.units, self.freeze_rate, self.seed, self.step = tuple(units), float(freeze_rate), int(seed), 0
        self._pinned = frozenset()

    @property
    def frozen_count(self) -> int:
        """Units frozen in each step: ``int(freeze_rate * n)``, as the paper's code has it; always less than n."""
        return int(self.freeze_rate * len(self.units))

    @property
    def open_count(self) -> int:
        """Units open in each step."""
        return len(self.units) - self.frozen_count

    @property
    def candidates(self) -> tuple[UnitInfo, ...]:
        """The units that may be opened: all but those pinned closed, in model order."""
        return tuple(unit for unit in self.units if unit.name not in self._pinned)

    def pin(self, closed: frozenset[str]) -> None:
        """Keep these units closed from now on (replaces the earlier set), so that they take no open place.

        The engine keeps pinned units closed in any case; this only saves the scheduler from spending places on them.
        """
        self._check_names(closed, "pin")
        self._pinned = frozenset(closed)

    def most_open_bytes(self, count: int) -> int:
        """Return the bytes of gradients that no step with ``count`` open units exceeds: those of the largest ones."""
        return sum(heapq.nlargest(count, (unit.grad_bytes for unit in self.units)))

    @abc.abstractmethod
    def select(self) -> frozenset[str]:
        """Return the names of the units open in the next step. The same answer until :meth:`observe` is called."""

    def observe(self, distances: Mapping[str, float]) -> None:
        """Take note that an optimizer step was done.

        Args:
            distances: for each unit that was open in that step, how far it moved (``update_distance``); 0.0 for one
                that got no gradient. Units left out keep what is known of them. Ignored unless ``needs_distances``.

        Raises:
            ValueError: a name that is no unit.
        """
        self._check_names(distances, "observe")
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python values that survive JSON exactly."""
        return {"scheduler": type(self).__name__, "step": self.step, "seed": self.seed, "units": self._names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; call it after :meth:`start` with the same units.

        Seed and step come from the state; the freeze rate stays the one given to :meth:`start`.

        Raises:
            ValueError: the state is of another scheduler or of other units (nothing is changed then).
        """
        self._check_state(state)
        self.step, self.seed = int(state["step"]), int(state["seed"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("scheduler") != type(self).__name__:
            raise ValueError(f"state is of scheduler {state.get('scheduler')!r}, this one is {type(self).__name__!r}")
        theirs, ours = list(state.get("units", ())), self._names()
        if theirs != ours:
            missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
            detail = f"missing {missing[:5]}, unexpected {extra[:5]}" if missing or extra else "same names, other order"
            raise ValueError(f"state is of other units ({len(theirs)} there, {len(ours)} here): {detail}")

    def _names(self) -> list[str]:
        return [unit.name for unit in self.units]

    def _check_names(self, names: Mapping[str, float] | frozenset[str], caller: str) -> None:
        known = set(self._names())
        bad = [name for name in names if name not in known]
        if bad:
            raise ValueError(f"{caller}: no unit is called {bad[0]!r}{did_you_mean(bad[0], known)}")


def hash_fraction(*key: object) -> float:
    """Return a number in [0, 1) that depends on ``key`` only: the same on every machine, process and Python version."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


_REGISTRY: dict[str, type[Scheduler]] = {}


def register_scheduler(name: str, cls: type[Scheduler]) -> None:
    """Make ``cls`` available as ``scheduler=name``.

    Registering the same class again, or a new definition of it (a notebook cell run twice), replaces it.

    Raises:
        TypeError: ``cls`` is no concrete subclass of :class:`Scheduler`, or ``name`` is no string.
        ValueError: the name is empty or taken by another class.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not (isinstance(cls, type) and issubclass(cls, Scheduler)):
        raise TypeError(f"cls must be a subclass of slimfit_fx.Scheduler, got {cls!r}")
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise TypeError(f"{cls.__name__} must implement {missing} before it can be registered")
    if not name:
        raise ValueError("name must not be empty, got ''")
    old = _REGISTRY.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"scheduler {name!r} is registered already, as {old.__module__}.{old.__qualname__}")
    _REGISTRY[name] = cls


def scheduler_names() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_REGISTRY))


def make_scheduler(scheduler: str | Scheduler | type[Scheduler]) -> Scheduler:
    """Return a scheduler for a registered name, a class (called with no arguments) or an instance (as it is).

    Raises:
        ValueError: unknown name.
        TypeError: none of the three.
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    if isinstance(scheduler, type) and issubclass(scheduler, Scheduler):
        return scheduler()
    if not isinstance(scheduler, str):
        raise TypeError(f"scheduler must be a name, a Scheduler or a subclass of it, got {scheduler!r}")
    if scheduler not in _REGISTRY:
        raise ValueError(unknown("scheduler", scheduler, scheduler_names()))
    return _REGISTRY[scheduler]()
