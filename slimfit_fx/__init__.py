"""Fine-tune in a fraction of the memory: ``slimfit_fx.optimize(model)`` before training.

Names are imported when they are first used: torch's compiler, which most of them need, takes seconds to import.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from slimfit_fx._version import __version__

if TYPE_CHECKING:
    from slimfit_fx.api import optimize, plan, restore, session
    from slimfit_fx.codecs import Codec, register_codec
    from slimfit_fx.config import Config
    from slimfit_fx.fit import LargestBatch, max_batch
    from slimfit_fx.planning.budget import MemoryBudgetError
    from slimfit_fx.planning.rows import MemoryPlan
    from slimfit_fx.schedule import Scheduler, register_scheduler
    from slimfit_fx.session import Session
    from slimfit_fx.tradeoff import Front, front

__all__ = [
    "Codec",
    "Config",
    "Front",
    "LargestBatch",
    "MemoryBudgetError",
    "MemoryPlan",
    "Scheduler",
    "Session",
    "__version__",
    "front",
    "max_batch",
    "optimize",
    "plan",
    "register_codec",
    "register_scheduler",
    "restore",
    "session",
]

_HOMES = {
    "Codec": "codecs",
    "Config": "config",
    "Front": "tradeoff",
    "LargestBatch": "fit",
    "MemoryBudgetError": "planning.budget",
    "MemoryPlan": "planning.rows",
    "Scheduler": "schedule",
    "Session": "session",
    "front": "tradeoff",
    "max_batch": "fit",
    "optimize": "api",
    "plan": "api",
    "register_codec": "codecs",
    "register_scheduler": "schedule",
    "restore": "api",
    "session": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, found)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Python sets an attribute for every submodule it imports; ``session`` stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "session" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
