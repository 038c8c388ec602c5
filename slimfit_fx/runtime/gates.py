"""Gates at run time: one 0-dim CPU bool per unit, looked up by the identity of its parameters.

A compiled graph does not know which layer it is: at each call the wrapper hands over the parameters and asks this table
for their gates. Flipping makes fresh tensors, so a pending backward keeps the gates of its own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GateTable:
    """The gates of one model. ``names`` in model order; ``open``/``closed`` are the current sets.

    ``history`` lists ``(step, open units)`` for every decision; ``step`` counts optimizer steps.
    """

    def __init__(self, units: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.names = tuple(units)
        self.history: list[tuple[int, frozenset[str]]] = []
        self._unit_of = {id(p): name for name, params in units.items() for p in params}
        self._params = {name: tuple(params) for name, params in units.items()}  # keeps the ids above valid
        self._gates = {name: torch.tensor(True) for name in self.names}
        self._open = frozenset(self.names)
        self._always_open = torch.tensor(True)

    @property
    def open(self) -> frozenset[str]:
        """Units that train in this step."""
        return self._open

    @property
    def closed(self) -> frozenset[str]:
        """Units frozen in this step."""
        return frozenset(self.names) - self._open

    @property
    def frozen_share(self) -> float:
        """Share of the units that are closed, in [0, 1]."""
        return len(self.closed) / max(1, len(self.names))

    def set_open(self, names: Iterable[str], step: int) -> None:
        """Open these units and close all others, from the next forward on."""
        wanted = frozenset(names)
        for name in wanted ^ self._open:
            self._gates[name] = torch.tensor(name in wanted)
        self._open = wanted
        self.history.append((step, wanted))

    def unit_of(self, parameter: Any) -> str | None:
        """The unit that this very parameter belongs to, or None."""
        return self._unit_of.get(id(parameter))

    def params_of(self, name: str) -> tuple[nn.Parameter, ...]:
        """The parameters of a unit."""
        return self._params[name]

    def gate_of(self, parameter: Any) -> Tensor:
        """The gate of this parameter's unit; always open for a parameter of no unit."""
        name = self._unit_of.get(id(parameter))
        return self._always_open if name is None else self._gates[name]

    @property
    def always_open(self) -> Tensor:
        """A gate that no unit can close."""
        return self._always_open

    def __repr__(self) -> str:
        return f"GateTable({len(self._open)} of {len(self.names)} open)"
