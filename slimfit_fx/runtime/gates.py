"""Gates at run time: one 0-dim CPU bool per unit, looked up by the identity of its parameters.

A compiled graph does not know which layer it is: at each call the wrapper hands over the parameters and asks this table
for their gates. Flipping makes fresh tensors, so a pending backward keeps the gates of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        self._gates = {name: torch.tensor(True, device="cpu") for name in self.names}
        self._open = frozenset(self.names)
        self._always_open = torch.tensor(True, device="cpu")
        self._decided: set[str] = set()
        self._aliases: dict[int, nn.Parameter] = {}
        self.look_again: Callable[[], Callable[[], object] | None] = lambda: None
        """What this gives is called when somebody asks for a parameter that is not known; it may ``rebind``."""

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
            self._gates[name] = torch.tensor(name in wanted, device="cpu")
        self._open = wanted
        self._decided.clear()
        self.history.append((step, wanted))

    def is_open(self, name: str) -> bool:
        """Whether this unit trains in this step."""
        return name in self._open

    def unit_of(self, parameter: Any) -> str | None:
        """The unit that this very parameter belongs to, or None."""
        found = self._unit_of.get(id(parameter))
        if found is None and isinstance(parameter, nn.Parameter) and (look := self.look_again()) is not None:
            look()
            found = self._unit_of.get(id(parameter))
        return found

    def params_of(self, name: str) -> tuple[nn.Parameter, ...]:
        """The parameters of a unit."""
        return self._params[name]

    def gate_of(self, parameter: Any) -> Tensor:
        """The gate of this parameter's unit; always open for a parameter of no unit."""
        name = self.unit_of(parameter)
        return self._always_open if name is None else self._gates[name]

    def rebind(self, name: str, params: Sequence[nn.Parameter]) -> None:
        """The unit's parameters are other objects now (an embedding was resized, a model was sharded)."""
        for old in self._params[name]:
            self._unit_of.pop(id(old), None)
        self._params[name] = tuple(params)
        self._unit_of.update({id(p): name for p in params})

    def add_alias(self, name: str, param: nn.Parameter) -> None:
        """``param`` stands for the unit in forward, besides its own parameters (FSDP2 gathers a shard into one)."""
        self._unit_of[id(param)] = name
        self._aliases[id(param)] = param  # keeps the id valid

    def states_of(self, parameters: Sequence[Any]) -> tuple[list[Tensor], list[bool]]:
        """The gate of each parameter, and whether it is open, now."""
        names = [self.unit_of(parameter) for parameter in parameters]
        gates = [self._always_open if name is None else self._gates[name] for name in names]
        return gates, [name is None or name in self._open for name in names]

    def note_decided(self, parameters: Iterable[Any]) -> None:
        """Gradients of these parameters were let through or dropped by the gates of their own forward."""
        unit_of, now_open = self._unit_of, self._open
        for parameter in parameters:
            name = unit_of.get(id(parameter))
            if name is not None and name not in now_open:
                self._decided.add(name)

    def take_decided(self, name: str) -> bool:
        """Whether ``note_decided`` was called for this unit since it was asked last."""
        found = name in self._decided
        self._decided.discard(name)
        return found

    @property
    def always_open(self) -> Tensor:
        """A gate that no unit can close."""
        return self._always_open

    def __repr__(self) -> str:
        return f"GateTable({len(self._open)} of {len(self.names)} open)"
