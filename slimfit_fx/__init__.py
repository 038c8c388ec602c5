"""Fine-tune in a fraction of the memory: ``slimfit_fx.optimize(model)`` before training."""

from slimfit_fx._version import __version__
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
