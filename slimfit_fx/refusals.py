"""What cannot be optimized, said before anything is traced: all problems in one message, each with its fix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import nn

from slimfit_fx._suggest import unknown
from slimfit_fx.runtime.bindings import is_sharded

T = TypeVar("T")
OLDEST, TOO_NEW = (2, 11), (2, 14)
DEEPSPEED = (
    "which keeps gradients and optimizer state in flat buffers of its own, where closed units would move: use "
    "DistributedDataParallel or fully_shard (FSDP2)"
)
FLATTENED = "which flattens parameters, so that no unit is left: use fully_shard (FSDP2) instead"


class Problems:
    """Runs checks that raise, goes on after a failure, and raises what all of them found as one error."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """The result of ``check``, or None if it raised ``TypeError`` or ``ValueError``."""
        try:
            return check()
        except (TypeError, ValueError) as error:
            self._errors.append(error)
            return None

    def raise_all(self) -> None:
        """Raise if any check failed: a ``TypeError`` if all of them said so, else a ``ValueError``."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            kind = TypeError if all(isinstance(error, TypeError) for error in self._errors) else ValueError
            raise kind("\n".join(dict.fromkeys(map(str, self._errors))))


def check_model(model: object, *, optimized: Collection[nn.Module] = (), plan_only: bool = False) -> None:
    """Raise if ``model`` cannot be optimized, given the modules that are ``optimized`` already.

    With ``plan_only`` it is to be captured only: it may be optimized or compiled in place already.

    Raises:
        TypeError: not an ``nn.Module``.
        ValueError: all that is wrong with the model or the torch version, one per line.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state = () if plan_only else _state(model, optimized)
    problems = [*_torch_version(torch.__version__), *state, *_wrappers(model)]
    if problems:
        raise ValueError("\n".join(problems))


def check_disabled_passes(disabled: Collection[str], known: Collection[str]) -> None:
    """Raise if a pass that is to be switched off does not exist or is needed.

    Raises:
        ValueError: all unknown names, with what exists.
    """
    problems = [unknown("disabled_passes: a name", name, known) for name in disabled if name not in known]
    if problems:
        raise ValueError("\n".join(problems))


def _torch_version(version: str) -> Iterator[str]:
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not OLDEST <= release < TOO_NEW:
        yield f"torch must be >= 2.11 and < 2.14, got {version}: install a supported version"


def _state(model: nn.Module, optimized: Collection[nn.Module]) -> Iterator[str]:
    name = type(model).__name__
    inside, around = set(model.modules()), (other for other in optimized if any(m is model for m in other.modules()))
    if model in optimized:
        yield f"this {name} is already optimized: call slimfit_fx.restore(model) first to change its settings"
    elif part := next((other for other in optimized if other in inside), None):
        what = type(part).__name__
        yield f"a part of this {name}, a {what}, is already optimized: call slimfit_fx.restore on that part"
    elif whole := next(around, None):
        yield f"this {name} is a part of a {type(whole).__name__} that is already optimized: optimize one of them only"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        yield (
            "model.compile() was called on this model: optimize() compiles it itself, so create the model without "
            "model.compile()"
        )


def _wrappers(model: nn.Module) -> Iterator[str]:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        yield "model is the result of torch.compile(): pass the module itself, optimize() compiles it"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        yield f"model is wrapped in {type(model).__name__}: optimize the inner module first, then wrap it"
    if isinstance(model, torch.jit.ScriptModule):
        yield "model is a TorchScript module, which cannot be captured: pass the eager module"
    if type(model).__module__.partition(".")[0] == "deepspeed":
        yield f"model is a {type(model).__name__} of DeepSpeed, {DEEPSPEED}"
    if is_flattened(model):
        yield f"model is sharded by FullyShardedDataParallel, {FLATTENED}"


def is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) is around the model or a part of it, not ``fully_shard`` (FSDP2)."""
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    return managed and not any(is_sharded(param) for param in model.parameters())
