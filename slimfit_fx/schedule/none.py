"""No scheduling: every unit trains in every step (full fine-tuning, or gates chosen by hand)."""

from __future__ import annotations

from slimfit_fx.schedule.base import Scheduler


class OpenScheduler(Scheduler):
    """Opens every unit that is not pinned closed, whatever the freeze rate says."""

    @property
    def frozen_count(self) -> int:
        """Nothing is frozen."""
        return 0

    def select(self) -> frozenset[str]:
        """Return all units but the pinned ones."""
        return frozenset(unit.name for unit in self.candidates)
