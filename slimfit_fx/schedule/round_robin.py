"""Neighbouring units take turns: step 0 opens the first ``k``, step 1 the next ``k``, and so on, around the model."""

from __future__ import annotations

from typing import ClassVar

from slimfit_fx.schedule.base import Scheduler


class RoundRobinScheduler(Scheduler):
    """Opens ``open_count`` consecutive units per step, in model order, beginning again after the last."""

    by_rate: ClassVar[bool] = True

    def select(self) -> frozenset[str]:
        """Return this step's block; the last one of a round wraps to the first units."""
        units = self.candidates
        first = self.step * self.open_count
        count = min(self.open_count, len(units))
        return frozenset(units[(first + offset) % len(units)].name for offset in range(count))
