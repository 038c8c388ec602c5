"""How dynamo is asked for the graph of a training forward: as one graph, compiled apart from every other model."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Set
from types import CodeType
from typing import Any

import torch
from torch import nn

CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether models of one class can have compile caches of their own; if not, each needs a frame of its own for that."""
_SAID_ONCE = ("warning_once", "info_once")
"""What transformers adds to every logger, for messages about how a model is used."""


def compile_forward(
    model: nn.Module, backend: str | Callable[..., Any], *, dynamic: bool | None = None
) -> Callable[..., Any]:
    """``torch.compile`` of ``model(...)``, with a compile cache and a limit of recompiles of its own."""
    own: dict[str, Any] = {"isolate_recompiles": True} if CAN_ISOLATE else {}
    compiled: Callable[..., Any] = torch.compile(_traceable(model), backend=backend, dynamic=dynamic, **own)
    return compiled


def _traceable(model: nn.Module) -> Callable[..., Any]:
    """What torch.compile is given: dynamo skips frames of torch's own files, so ``nn.Sequential`` needs one around it.

    As torch.compile does for modules (torch/_dynamo/eval_frame.py, ``OptimizedModule._initialize``). Where caches
    cannot be isolated every model gets one: dynamo counts compiles by code, and gives up on the ninth model of a class.
    """
    if CAN_ISOLATE and not torch._dynamo.trace_rules.check(model.forward):
        return model._call_impl
    self = model  # the name that dynamo's records of modules begin with, as in a method

    def frame(*args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    frame.__code__ = frame.__code__.replace()  # code of its own, hence a compile cache and limit of its own
    return frame


class TraceableShards:
    """Lets dynamo capture the sharded parts (FSDP2) of ``model`` that are of torch's own classes.

    FSDP2's hooks break the graph around each part, whose ``forward`` dynamo meets as a frame of its own. It skips those
    of torch's files (``nn.TransformerEncoderLayer``, ``nn.Sequential``), so that these parts have one of ours while a
    training forward is called; copies, pickles and ``restore`` know nothing of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._codes: dict[str, CodeType] = {}
        """By structure: parts that are alike share what is compiled, and no others use up their limit of recompiles."""
        self._code_of: weakref.WeakKeyDictionary[nn.Module, CodeType] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def traceable(self) -> Iterator[None]:
        """Hold this around each call of a training forward."""
        parts = list(self._untraceable())
        for part in parts:
            part.__dict__["forward"] = self._frame_around(part)
        try:
            yield
        finally:
            for part in parts:
                del part.__dict__["forward"]

    def _untraceable(self) -> Iterator[nn.Module]:
        fsdp, model = sys.modules.get("torch.distributed.fsdp"), self._model()
        if fsdp is None or model is None or not torch.distributed.is_initialized():  # nobody can have sharded anything
            return
        for module in model.modules():
            is_part = isinstance(module, fsdp.FSDPModule) and module is not model
            if is_part and "forward" not in module.__dict__ and torch._dynamo.trace_rules.check(module.forward):
                yield module

    def _frame_around(self, part: nn.Module) -> Callable[..., Any]:
        forward = part.forward

        def frame(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        if part not in self._code_of:
            self._code_of[part] = self._codes.setdefault(repr(part), frame.__code__.replace())
        frame.__code__ = self._code_of[part]
        return frame


class _Unlisted(dict[Any, Any]):
    """A set of functions that is an empty dictionary to json.

    Before 2.13 torch sorts and writes this setting when it logs a compile, which functions do not allow, and says so
    with a traceback.
    """

    def __init__(self, functions: Set[Any]) -> None:
        super().__init__()
        self.functions = functions

    def __iter__(self) -> Iterator[Any]:
        return iter(self.functions)

    def __contains__(self, value: object) -> bool:
        return value in self.functions


def one_graph(*, under_ddp: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Hold this around each call of a training forward, which dynamo may trace: what need not break its graph does not.

    A message that transformers says once (``loss_type=None was set in the config``, for one) is not said while
    tracing. ``under_ddp``: torch's DDPOptimizer would hand the backend parts whose parameters it no longer recognises;
    gates would not work. Settings of dynamo that change nothing else, and are the user's again afterwards.
    """
    import torch._dynamo.config as dynamo  # takes long, and no model is compiled by an import

    changes: dict[str, Any] = {"optimize_ddp": False} if under_ddp else {}
    silent = {getattr(logging.Logger, name) for name in _SAID_ONCE if hasattr(logging.Logger, name)}
    if silent:
        ignored = dynamo.ignore_logging_functions
        changes["ignore_logging_functions"] = {*ignored, *silent} if CAN_ISOLATE else _Unlisted({*ignored, *silent})
    return dynamo.patch(changes) if changes else contextlib.nullcontext()
