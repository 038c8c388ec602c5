"""slimfit_fx inside other people's training loops. Each name imports its library when it is first asked for."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfit_fx.integrations.checkpoint import ScheduleState
    from slimfit_fx.integrations.hf_trainer import SlimFitCallback
    from slimfit_fx.integrations.lightning import SlimFitLightning

log = logging.getLogger("slimfit_fx.integrations")

__all__ = ["ScheduleState", "SlimFitCallback", "SlimFitLightning"]

_HOMES = {
    "ScheduleState": ("checkpoint", ""),
    "SlimFitCallback": ("hf_trainer", "hf"),
    "SlimFitLightning": ("lightning", "lightning"),
}
"""Public name -> (module, extra that installs what it needs)."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        found = importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'slimfit-fx[{extra}]'") from error
    return getattr(found, name)


def attach_to_loaded() -> None:
    """Let the Hugging Face Trainer, if it is imported, attend to models that are optimized before they come to it."""
    if "transformers.trainer" not in sys.modules:
        return
    try:
        importlib.import_module(f"{__name__}.hf_trainer").attach()
    except (ImportError, AttributeError):  # a transformers of another make: SlimFitCallback says what is wrong with it
        log.debug("Trainer cannot be attended to", exc_info=True)


def __dir__() -> list[str]:
    return sorted(__all__)
