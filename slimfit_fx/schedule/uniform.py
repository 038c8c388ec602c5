"""The baseline of freezing papers: in each step a fresh uniform choice of units is open."""

from __future__ import annotations

from typing import ClassVar

from slimfit_fx.schedule.base import Scheduler, hash_fraction


class RandomScheduler(Scheduler):
    """Opens ``open_count`` units, drawn anew and uniformly in each step.

    The draw is a hash of (seed, step, name): no generator state to save, and the same on every machine.
    """

    by_rate: ClassVar[bool] = True

    def select(self) -> frozenset[str]:
        """Return this step's draw."""
        ranked = sorted(self.candidates, key=lambda unit: (hash_fraction(self.seed, self.step, unit.name), unit.name))
        return frozenset(unit.name for unit in ranked[: self.open_count])
