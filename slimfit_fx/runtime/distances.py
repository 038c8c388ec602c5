"""How update distances reach the host without stalling the device.

On CPU they are read at once. On a GPU each step's distances are copied to pinned memory behind an event, and read one
step later, when that copy is long done: the decision for step t+1 then rests on what is known up to step t-1, always,
so that it does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Pending:
    names: tuple[str, ...]
    values: Tensor
    """float32 on the host; valid once ``event`` has passed (at once if None)."""
    event: Any = None
    late: bool = False
    """Read one step later than it was put."""

    def read(self) -> dict[str, float]:
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class DistanceQueue:
    """First in, first out; on a GPU the newest entry stays behind until the next ``take``."""

    def __init__(self) -> None:
        self._entries: list[_Pending] = []

    def put(self, names: tuple[str, ...], values: Tensor, agree: Callable[[Tensor], Tensor] | None = None) -> None:
        """Queue the distances of units, float32 of shape (units,), without waiting for them.

        ``agree`` makes them those of all ranks of a distributed job.
        """
        if not names:
            return
        stacked = values
        if agree is not None:
            stacked = agree(stacked)
        if stacked.device.type != "cuda":
            self._entries.append(_Pending(names, stacked.cpu()))
            return
        host = torch.empty(stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True)
        host.copy_(stacked, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._entries.append(_Pending(names, host, event, late=True))

    def take(self) -> dict[str, float]:
        """Distances that are ready by rule; a later entry of the same unit wins."""
        lag = 1 if self._entries and self._entries[-1].late else 0
        ready, self._entries = self._entries[: len(self._entries) - lag], self._entries[len(self._entries) - lag :]
        found: dict[str, float] = {}
        for entry in ready:
            found.update(entry.read())
        return found

    def state(self) -> list[dict[str, Any]]:
        """What waits, as plain numbers (waits for the device)."""
        return [{"late": entry.late, "distances": entry.read()} for entry in self._entries]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue with what ``state`` returned."""
        self._entries = [_pending_from(s["distances"], late=bool(s["late"])) for s in state]


def _pending_from(distances: Mapping[str, float], *, late: bool) -> _Pending:
    return _Pending(
        tuple(distances), torch.tensor(list(distances.values()), dtype=torch.float32, device="cpu"), late=late
    )
