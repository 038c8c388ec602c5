"""The four functions: ``optimize``, ``plan``, ``session``, ``restore``."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from slimfit_fx import integrations
from slimfit_fx.beside_steps import OptimizerChoice, find_optimizer
from slimfit_fx.capture.call_stack import with_room
from slimfit_fx.capture.dynamo import TraceableShards, compile_forward
from slimfit_fx.capture.fit import PlanOutgrown
from slimfit_fx.capture.lower import has_compiler
from slimfit_fx.config import Config
from slimfit_fx.passes.pipeline import pass_names
from slimfit_fx.planning.budget import MemoryBudgetError
from slimfit_fx.planning.rows import MemoryPlan
from slimfit_fx.refusals import Problems, check_disabled_passes, check_model
from slimfit_fx.rehearsal import Rehearsal, caused_by
from slimfit_fx.runtime.shapes import ShapeWatch
from slimfit_fx.session import Session
from slimfit_fx.ungated import UngatedUnits
from slimfit_fx.units import FoundUnits, find_units

log = logging.getLogger("slimfit_fx")
F = TypeVar("F", bound=Callable[..., Any])
_EVAL_BACKENDS = {"inductor": "inductor", "interpreter": "eager"}
"""What ``compile_eval`` compiles with: no compiler is asked for where the interpreter is used."""
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def _names_settings(function: F) -> F:
    """Give ``function`` its true signature, which ``help`` shows: the fields of Config in place of ``**settings``."""
    told = inspect.signature(function)
    own = [p for p in told.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(f), annotation=f.type)
        for f in dataclasses.fields(Config)
    ]
    function.__signature__ = told.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
    return function


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@_names_settings
def optimize(
    model: nn.Module, config: Config | None = None, /, *, optimizer: OptimizerChoice | None = None, **settings: Any
) -> nn.Module:
    """Make ``model`` train in less memory; returns the same object, compiled in place.

    Parameters, ``state_dict`` keys and attributes stay as they are. The next training forward captures and compiles the
    model once; from then on the scheduler decides after each optimizer step which units train, without a recompile.

    Args:
        model: any module with trainable parameters.
        config: all settings in one object; or give them as keywords.
        optimizer: what the model will be trained with, or what makes it of a list of parameters (a class will do), so
            that a ``memory_budget`` counts its memory in the first plan; else AdamW's, until a step of it is seen.
        settings: fields of :class:`Config`, where each is described.

    Raises:
        TypeError: not a module, no optimizer, or a setting of the wrong type.
        ValueError: everything else that is wrong with the settings or the model, in one message.
    """
    chosen, found, given = checked_settings(model, config, settings, plan_only=False, optimizer=optimizer)
    current = Session(model, chosen, found.units, found.always, _executor(model, chosen), optimizer=given)
    _SESSIONS[model] = current
    model._compiled_call_impl = _dispatcher(model, current)
    integrations.attach_to_loaded()
    return model


def session(model: nn.Module) -> Session:
    """The session of an optimized model.

    Raises:
        ValueError: the model was not optimized.
    """
    found = find_session(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} was not optimized: call slimfit_fx.optimize(model) first")
    return found


def find_session(model: nn.Module) -> Session | None:
    """The session of an optimized model; None for any other."""
    return _SESSIONS.get(model) if isinstance(model, nn.Module) else None


def restore(model: nn.Module) -> nn.Module:
    """Undo ``optimize``: the model runs as the user wrote it, with its current weights. Returns the same object.

    Raises:
        ValueError: the model was not optimized.
    """
    session(model).close()
    del _SESSIONS[model]
    model._compiled_call_impl = None
    return model


def plan(
    model: nn.Module,
    *args: Any,
    config: Config | None = None,
    preset: str = "balanced",
    freeze_rate: float = 0.9,
    units: Any = None,
    codecs: Any = None,
    memory_budget: int | float | str | None = None,
    max_gradient_error: float | None = None,
    optimizer: OptimizerChoice | None = None,
    peak: bool = False,
    compare: bool = False,
    **kwargs: Any,
) -> MemoryPlan:
    """The memory plan of one training step on these inputs, without running it.

    The model is captured on fake tensors and partitioned; nothing is compiled, trained or allocated but the inputs
    given. ``args`` and ``kwargs`` are what the model's forward takes. ``preset`` to ``max_gradient_error`` are settings
    as in ``optimize``; any other, such as ``recompute``, needs ``config``, which then holds these too. With ``peak``
    the plan also tells the physical peak of the step and its timeline: Inductor then writes its code, which takes about
    half the time of a compile, but compiles no kernel. With ``compare`` the same is done for plain ``torch.compile``,
    to be shown beside it. With ``memory_budget`` it is the plan that ``optimize`` takes. ``optimizer`` as for
    ``optimize``.

    Raises:
        MemoryBudgetError: nothing fits ``memory_budget``; a ``ValueError``.
        TypeError: a setting of the wrong type, or one that needs ``config`` given as a keyword.
        ValueError: bad settings, nothing freezable, or a model that cannot be captured (the reason is in the message).
    """
    given = {"preset": preset, "freeze_rate": freeze_rate, "units": units, "codecs": codecs}
    given |= {"memory_budget": memory_budget, "max_gradient_error": max_gradient_error}
    settings = {name: value for name, value in given.items() if value != getattr(Config, name, None)}
    astray = _settings_among(kwargs, model)
    chosen, (found, _), trained_with = checked_settings(
        model,
        config,
        {**settings, **astray} if config is None else settings,
        plan_only=True,
        optimizer=optimizer,
        also=lambda: _refuse_astray(model, config, settings, astray, tuple(given)),
    )
    return Rehearsal(model, found, optimizer=trained_with).plan(
        chosen, args, kwargs, peak=peak or compare, compare=compare
    )


def checked_settings(
    model: nn.Module,
    config: Config | None,
    settings: dict[str, Any],
    *,
    plan_only: bool,
    optimizer: OptimizerChoice | None = None,
    also: Callable[[], None] = lambda: None,
) -> tuple[Config, FoundUnits, Optimizer | None]:
    """Settings, units and optimizer, or one error with everything that is wrong with them and the model.

    ``also``: a check of the caller's own.
    """
    problems = Problems()
    problems.run(also)
    chosen = problems.run(lambda: _config(config, settings))
    problems.run(lambda: check_model(model, optimized=tuple(_SESSIONS), plan_only=plan_only))
    disabled = () if chosen is None else chosen.disabled_passes
    problems.run(lambda: check_disabled_passes(disabled, pass_names()))
    units = settings.get("units") if chosen is None else chosen.units
    found = problems.run(lambda: find_units(model, units)) if isinstance(model, nn.Module) else None
    given = problems.run(lambda: find_optimizer(model, optimizer)) if isinstance(model, nn.Module) else None
    problems.raise_all()
    assert chosen is not None and found is not None
    return chosen, found, given


def _settings_among(kwargs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What in ``kwargs`` is called like a setting and is no argument that the model's forward names."""
    named = _named_by(getattr(model, "forward", None))
    return {f.name: kwargs[f.name] for f in dataclasses.fields(Config) if f.name in kwargs and f.name not in named}


def _named_by(forward: Any) -> set[str]:
    """The keyword arguments of ``forward``; those that ``**kwargs`` would take are not known."""
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, parameter in parameters.items() if parameter.kind in named}


def _refuse_astray(
    model: nn.Module, config: Config | None, settings: dict[str, Any], astray: dict[str, Any], legal: Collection[str]
) -> None:
    """Raise if settings are ``astray``, that is keywords of ``plan`` although only those ``legal`` can be."""
    if astray:
        everything = f"all settings in config=Config({_written({**settings, **astray})})"
        raise TypeError(
            f"plan takes {', '.join(legal)} as keywords, got {_written(astray)}, which {type(model).__name__}.forward "
            f"does not name either: give {everything if config is None else 'them in your config'}"
        )


def _written(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _config(config: Config | None, settings: dict[str, Any]) -> Config:
    if config is None:
        return Config(**settings)
    if not isinstance(config, Config):
        raise TypeError(f"config must be a slimfit_fx.Config, got {type(config).__name__}: pass settings as keywords")
    if settings:
        raise ValueError(f"give settings in config or as keywords, not both: got config and {sorted(settings)}")
    return config


def _executor(model: nn.Module, config: Config) -> str:
    if config.executor != "inductor":
        return config.executor
    missing = has_compiler(next(model.parameters()).device)
    if missing is None:
        return "inductor"
    if config.memory_budget is not None:
        raise ValueError(f"memory_budget needs executor 'inductor', whose code tells the peak, but here is {missing}")
    warnings.warn(
        f"slimfit_fx: {missing}; the interpreter is used: same memory plan, slower steps", RuntimeWarning, stacklevel=3
    )
    return "interpreter"


def _warn_if_nothing_captured(model: nn.Module, current: Session) -> None:
    """Dynamo may skip a whole forward without a word; training is then right, but neither gated nor compressed."""
    if not current.compiles and not current.warned:
        current.warned = True
        warnings.warn(
            f"slimfit_fx: torch.compile captured no graph of {_place_of(model)}: it trains uncompressed. "
            "TORCH_LOGS=dynamo tells why",
            RuntimeWarning,
            stacklevel=5,
        )


def _place_of(model: nn.Module) -> str:
    """The forward of ``model`` and where it is written."""
    name, code = f"{type(model).__name__}.forward", getattr(inspect.unwrap(model.forward), "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _dispatcher(model: nn.Module, current: Session) -> Callable[..., Any]:
    """What ``model(...)`` calls: compiled and gated in training, as the user wrote it otherwise."""

    def compile_model() -> Callable[..., Any]:
        return compile_forward(model, current.backend, dynamic=current.config.dynamic)

    evaluated: Callable[..., Any] = model._call_impl
    if current.config.compile_eval:
        evaluated = compile_forward(model, _EVAL_BACKENDS[current.executor])
    training, captured, shapes, ungated = compile_model(), True, ShapeWatch(), UngatedUnits()
    shards = TraceableShards(model)

    @with_room
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal training
        if captured and current.outgrows_its_plan():
            training = compile_model()
        with current.one_graph(), shards.traceable():
            try:
                return training(*args, **kwargs)
            except PlanOutgrown:  # nothing has run yet
                training = compile_model()
                return training(*args, **kwargs)

    def train(*args: Any, **kwargs: Any) -> Any:
        nonlocal training, captured
        current.before_forward()
        ungated.look(current)
        if current.config.dynamic is None:
            shapes.look(args, kwargs)
        try:
            result = run(*args, **kwargs)
            _warn_if_nothing_captured(model, current)
            return result
        except torch._dynamo.exc.TorchDynamoException as error:
            over = caused_by(error, MemoryBudgetError)
            if over is not None:
                raise over from None
            if current.config.strict or not captured:
                raise
            reason = f"slimfit_fx: {_place_of(model)} cannot be captured and trains uncompressed: {error}"
        result = model._call_impl(*args, **kwargs)  # an error of the user's own is raised here, and settles nothing
        warnings.warn(reason, RuntimeWarning, stacklevel=4)
        training, captured, current.warned = model._call_impl, False, True
        return result

    by_itself = torch.compiler.disable(train, reason="slimfit_fx compiles this model itself")

    def call(*args: Any, **kwargs: Any) -> Any:
        trains = model.training and torch.is_grad_enabled()
        if torch.compiler.is_compiling():  # somebody compiles a function around the model: break the graph here
            return by_itself(*args, **kwargs) if trains else model._call_impl(*args, **kwargs)
        return train(*args, **kwargs) if trains else evaluated(*args, **kwargs)

    return call
