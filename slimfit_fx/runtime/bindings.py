"""Which parameter objects are the units now.

A parameter may become another object after ``optimize``: a vocabulary is resized, ``fully_shard`` replaces every
parameter by its shard, and then swaps the gathered one in for each forward. The place (module, attribute) stays, so
the places are looked at before each training forward, and again when a graph is handed a parameter that nobody knows.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.grad_gate import drop_eager_gradients
from slimfit_fx.units import GateUnit


def is_sharded(param: Any) -> bool:
    """Whether this is a shard of a parameter (a DTensor)."""
    tensor = sys.modules.get("torch.distributed.tensor")  # without it nobody can have made one
    return tensor is not None and isinstance(param, tensor.DTensor)


class Bindings:
    """Keeps a ``GateTable`` in step with the parameters that the model has."""

    def __init__(self, model: nn.Module, units: Sequence[GateUnit], gates: GateTable) -> None:
        self._gates = gates
        self._hooks: dict[int, RemovableHandle] = {}
        self._model = weakref.ref(model)
        self._places = {unit.name: tuple(unit.name.split(".")) for unit in units}
        self._links: list[Link] = []
        gates.look_again = weakref.WeakMethod(self.refresh)
        for name in gates.names:
            self._hook(name, *gates.params_of(name))

    def refresh(self) -> bool:
        """Take up parameters that were replaced; True if an optimizer must hold others than before."""
        if self._links and all_as_they_were(self._links):
            return False
        replaced = False
        for name, now in self._current():
            (known,) = self._gates.params_of(name)
            if now is known:
                continue
            if is_sharded(known) and not is_sharded(now):
                self._gates.add_alias(name, now)  # gathered for a forward; the optimizer holds the shard
                self._hook(name, now)
                continue
            self._unhook(known)
            self._gates.rebind(name, [now])
            self._hook(name, now)
            replaced = True
        self._links = self._find_links()
        return replaced

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _hook(self, name: str, *params: nn.Parameter) -> None:
        for param in params:
            if param.requires_grad and id(param) not in self._hooks:
                self._hooks[id(param)] = drop_eager_gradients(self._gates, name, param)

    def _unhook(self, param: nn.Parameter) -> None:
        handle = self._hooks.pop(id(param), None)
        if handle is not None:
            handle.remove()

    def _current(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(unit, the parameter in its place); nothing for a place that is gone. Often called: no ``getattr``."""
        model = self._model()
        for name, (*path, attribute) in self._places.items():
            module: Any = model
            for part in path:
                module = None if module is None else module._modules.get(part)
            now = None if module is None else module._parameters.get(attribute)
            if now is not None:
                yield name, now

    def _find_links(self) -> list[Link]:
        """All that lies on the way from the model to its units, each once."""
        model = self._model()
        found: dict[tuple[int, str], Link] = {}
        for *path, attribute in self._places.values():
            module: Any = model
            for part in path:
                if module is None:
                    break
                found[id(module), part] = _link(module, "_modules", part)
                module = module._modules.get(part)
            if module is not None:
                found[id(module), attribute] = _link(module, "_parameters", attribute)
        return list(found.values())


Link = tuple[weakref.ref[nn.Module], str, str, Callable[[], object]]
"""A module, ``_modules`` or ``_parameters``, a name in it, and what had that name. Weak: a session must not keep its
model, and a module may know its parent.
"""


def _link(module: nn.Module, kind: str, name: str) -> Link:
    value = module.__dict__[kind].get(name)
    return weakref.ref(module), kind, name, (lambda: None) if value is None else weakref.ref(value)


def all_as_they_were(links: Sequence[Link]) -> bool:
    """Whether every module and parameter is where it was: asked in each step, so that it is quick."""
    for place, kind, name, value in links:
        module = place()
        if module is None or module.__dict__[kind].get(name) is not value():
            return False
    return True
