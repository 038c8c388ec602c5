"""Patterns of gates that may be open together, and the most that those of one pattern own at a moment."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Patterns:
    """All patterns of ``count`` gates at most, whose gradients take ``most_bytes`` at most, if that is a number.

    ``gate_bytes[k]``: of the gradients of what gate ``k`` freezes; without them ``most_bytes`` says nothing.
    """

    count: int
    most_bytes: int | None = None
    gate_bytes: Sequence[int] = ()

    @property
    def _level(self) -> int | None:
        return self.most_bytes if self.gate_bytes else None

    def excludes(self, gates: Collection[int]) -> bool:
        """Whether the gradients of these gates take too much."""
        return self._level is not None and sum(self.gate_bytes[gate] for gate in gates) > self._level

    def most_owned(self, owned: Mapping[int, float]) -> int:
        """Upper bound on what the gates of a pattern own together; ``owned``: bytes by gate. The lesser of two.

        What the ``count`` gates own that own most. And: all that they own up to the size of their gradients, which is
        ``most_bytes`` at most, and what else the ``count`` gates own that own most of that.
        """
        any_gates = math.ceil(sum(heapq.nlargest(self.count, owned.values())))
        if self._level is None:
            return any_gates
        beside = (max(0, size - self.gate_bytes[gate]) for gate, size in owned.items())
        return min(any_gates, self._level + math.ceil(sum(heapq.nlargest(self.count, beside))))

    def most_owned_once(self, owned: Mapping[int, int], shared: Mapping[frozenset[int], int]) -> int:
        """The same where blocks are shared: ``shared``, bytes by owners, count in ``owned`` for each of these.

        The lesser of two. Everything that is owned, once. And: each gate answers for its part of a shared block only,
        the rest of the block is there anyway; whichever owners are open, the block is then counted in full at least.
        """
        once = sum(owned.values()) - sum((len(owners) - 1) * size for owners, size in shared.items())
        part: dict[int, float] = dict(owned)
        rest = 0.0
        for owners, size in shared.items():
            rest += size * (1 - 1 / len(owners))
            for gate in owners:
                part[gate] -= size * (1 - 1 / len(owners))
        return min(once, math.ceil(rest) + self.most_owned(part))

    def largest(self, owned: Mapping[int, float], first: Sequence[int] = ()) -> list[int]:
        """A pattern whose gates own much: ``first``, then by what they own, if room is left for their gradients."""
        others = sorted(set(owned) - set(first), key=lambda gate: (-owned[gate], gate))
        chosen: list[int] = []
        for gate in [*first, *others]:
            if len(chosen) < self.count and not self.excludes([*chosen, gate]):
                chosen.append(gate)
        return chosen
