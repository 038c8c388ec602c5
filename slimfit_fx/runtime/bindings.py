"""Which parameter objects are the units now.

A parameter may become another object after ``optimize``: a vocabulary is resized, ``fully_shard`` replaces every
parameter by its shard, and then swaps the gathered one in for each forward. The place (module, attribute) stays, so
the places are looked at before each training forward, and again when a graph is handed a parameter that nobody knows.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.units import GateUnit


def is_sharded(param: Any) -> bool:
    """Whether this is a shard of a parameter (a DTensor)."""
    tensor = sys.modules.get("torch.distributed.tensor")  # without it nobody can have made one
    return tensor is not None and isinstance(param, tensor.DTensor)


class Bindings:
    """Keeps a ``GateTable`` in step with the parameters that the model has."""

    def __init__(self, model: nn.Module, units: Sequence[GateUnit], gates: GateTable) -> None:
        self._gates = gates
        self._places = {unit.name: _place(model, unit.name) for unit in units}
        gates.look_again = weakref.WeakMethod(self.refresh)

    def refresh(self) -> bool:
        """Take up parameters that were replaced; True if an optimizer must hold others than before."""
        replaced = False
        for name, now in self._current():
            (known,) = self._gates.params_of(name)
            if now is known:
                continue
            if is_sharded(known) and not is_sharded(now):
                self._gates.add_alias(name, now)  # gathered for a forward; the optimizer holds the shard
                continue
            self._gates.rebind(name, [now])
            replaced = True
        return replaced

    def _current(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, (module, attribute) in self._places.items():
            owner = module()
            now = None if owner is None else owner._parameters.get(attribute)
            if now is not None:
                yield name, now


def _place(model: nn.Module, name: str) -> tuple[weakref.ref[nn.Module], str]:
    path, _, attribute = name.rpartition(".")
    return weakref.ref(model.get_submodule(path)), attribute
