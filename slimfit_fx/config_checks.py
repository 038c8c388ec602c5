"""What is wrong with the settings of a :class:`Config`: every problem, with what is legal and what was given."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimfit_fx._suggest import unknown
from slimfit_fx.presets import EXECUTORS, FALLBACK, LOSSLESS_PRESETS, MOMENTS, OUTPUTS, PRESETS, RECOMPUTE, resolve
from slimfit_fx.schedule import DISTANCES, Scheduler, scheduler_names

if TYPE_CHECKING:
    from slimfit_fx.config import Config


class WrongType(str):
    """A problem message about a type rather than a value."""


def problems_of(config: Config) -> list[str]:
    """One message for each illegal setting; those about a type are of class :class:`WrongType`.

    Numbers that are legal are made floats on the way.
    """
    return [problem for check in _CHECKS for problem in check(config)]


def _codecs() -> Any:
    from slimfit_fx import codecs  # not at the top: codecs pull in torch operators that a plain import does not need

    return codecs


def _check_preset(config: Config) -> Iterable[str]:
    if not isinstance(config.preset, str):
        yield WrongType(f"preset must be a string, one of {sorted(PRESETS)}, got {config.preset!r}")
    elif config.preset not in PRESETS:
        yield unknown("preset", config.preset, PRESETS)


def _check_freeze_rate(config: Config) -> Iterable[str]:
    rate = config.freeze_rate
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        yield WrongType(f"freeze_rate must be a number in [0, 1), got {rate!r}")
    elif not 0.0 <= rate < 1.0:
        percent = f" (a share, not a percentage: did you mean {float(rate) / 100:g}?)" if 1 < rate < 100 else ""
        yield f"freeze_rate must be in [0, 1), got {rate!r}{percent}"
    else:
        object.__setattr__(config, "freeze_rate", float(rate))


def _check_scheduler(config: Config) -> Iterable[str]:
    scheduler = config.scheduler
    if isinstance(scheduler, str):
        if scheduler not in scheduler_names():
            yield unknown("scheduler", scheduler, scheduler_names())
    elif not isinstance(scheduler, Scheduler) and not (
        isinstance(scheduler, type) and issubclass(scheduler, Scheduler)
    ):
        yield WrongType(f"scheduler must be a name, a Scheduler or a subclass of it, got {scheduler!r}")


def _check_codecs(config: Config) -> Iterable[str]:
    if config.codecs is None:
        return
    if not isinstance(config.codecs, Mapping):
        yield WrongType(f"codecs must be None or a mapping from kind to codec name, got {config.codecs!r}")
        return
    known = _codecs().codec_names()
    for kind, name in config.codecs.items():
        if kind not in FALLBACK:
            yield unknown("codecs: the kind", kind, FALLBACK)
        if name is None:
            continue
        if not isinstance(name, str):
            yield WrongType(f"codecs[{kind!r}] must be None or a codec name, got {name!r}")
        elif name not in known:
            yield unknown(f"codecs[{kind!r}]", name, known) + ", or None to keep the value as it is"
        elif config.preset in LOSSLESS_PRESETS and not _codecs().get_codec(name).lossless:
            yield (
                f"codecs[{kind!r}] must be lossless under preset {config.preset!r}, got {name!r}: "
                "choose another preset for lossy codecs"
            )


def _check_units(config: Config) -> Iterable[str]:
    units = config.units
    if units is None or callable(units) or isinstance(units, str):
        return
    if not isinstance(units, Sequence) or not all(isinstance(pattern, str) for pattern in units):
        yield WrongType(f"units must be None, a predicate (name, parameter) -> bool or name patterns, got {units!r}")
    elif not units:
        yield f"units must name at least one parameter, got {units!r}: use None for the default rule"


def _check_choices(config: Config) -> Iterable[str]:
    choices = {
        "executor": EXECUTORS,
        "distance": DISTANCES,
        "moments": MOMENTS,
        "outputs": OUTPUTS,
        "recompute": (*RECOMPUTE, "auto"),
    }
    for name, legal in choices.items():
        value = getattr(config, name)
        if not isinstance(value, str):
            yield WrongType(f"{name} must be a string, one of {sorted(legal)}, got {value!r}")
        elif value not in legal:
            yield unknown(name, value, legal)


def _check_flags(config: Config) -> Iterable[str]:
    for name in ("compile_eval", "debug", "gradient_accumulation", "strict", "tiles"):
        if not isinstance(value := getattr(config, name), bool):
            yield WrongType(f"{name} must be True or False, got {value!r}")
    if config.dynamic is not None and not isinstance(config.dynamic, bool):
        yield WrongType(f"dynamic must be None, True or False, got {config.dynamic!r}")


def _check_integers(config: Config) -> Iterable[str]:
    for name in ("seed", "min_bytes"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            yield WrongType(f"{name} must be an integer >= 0, got {value!r}")
        elif value < 0:
            yield f"{name} must be >= 0, got {value!r}"


def _check_distance_sample(config: Config) -> Iterable[str]:
    most = config.distance_sample
    if most is None:
        return
    if isinstance(most, bool) or not isinstance(most, int):
        yield WrongType(f"distance_sample must be None or an integer >= 1, got {most!r}")
    elif most < 1:
        yield f"distance_sample must be >= 1, got {most!r}: use None to measure distances on all elements"


def _check_catch_up(config: Config) -> Iterable[str]:
    power = config.catch_up
    if isinstance(power, bool) or not isinstance(power, numbers.Real):
        yield WrongType(f"catch_up must be a number in [0, 1], got {power!r}")
    elif not 0 <= power <= 1:
        yield f"catch_up must be in [0, 1] (0: learning rates as they are), got {power!r}"
    else:
        object.__setattr__(config, "catch_up", float(power))


def _check_disabled_passes(config: Config) -> Iterable[str]:
    names = config.disabled_passes
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        yield WrongType(f"disabled_passes must be a tuple of pass names, got {names!r}")


def _check_budget(config: Config) -> Iterable[str]:
    budget = config.memory_budget
    if budget is None:
        return
    legal = "bytes, a size such as '6GiB' or a share of the device's memory in (0, 1]"
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        yield WrongType(f"memory_budget must be {legal}, got {budget!r}")
    elif isinstance(budget, str):
        from slimfit_fx.planning.budget import parse_bytes

        try:
            parse_bytes(budget)
        except ValueError as error:
            yield f"memory_budget must be {legal}: {error}"
    elif not budget > 0 or (isinstance(budget, float) and budget > 1 and not budget.is_integer()):
        yield f"memory_budget must be {legal}, got {budget!r}"
    if config.executor == "interpreter":
        yield "memory_budget needs executor 'inductor', got 'interpreter': its peak is read off the compiled code"


def _check_max_gradient_error(config: Config) -> Iterable[str]:
    bound = config.max_gradient_error
    if bound is None:
        return
    if isinstance(bound, bool) or not isinstance(bound, numbers.Real):
        yield WrongType(f"max_gradient_error must be None or a number >= 0, got {bound!r}")
    elif not 0 <= bound < float("inf"):
        yield f"max_gradient_error must be a finite number >= 0 (0.05 allows five percent), got {bound!r}"
    elif not any(problem for check in (_check_preset, _check_codecs) for problem in check(config)):
        from slimfit_fx.planning import sensitivity  # not at the top: it reads a file

        object.__setattr__(config, "max_gradient_error", float(bound))
        for problem in sensitivity.describe_unmeasured(resolve(config.codec_table)):
            yield f"max_gradient_error {bound:g} cannot be promised: {problem}"


def _check_price(config: Config) -> Iterable[str]:
    price = config.recompute_price
    if isinstance(price, bool) or not isinstance(price, numbers.Real):
        yield WrongType(f"recompute_price must be a number > 0, got {price!r}")
    elif not 0 < price < float("inf"):
        yield f"recompute_price must be a finite number > 0, got {price!r}"
    else:
        object.__setattr__(config, "recompute_price", float(price))


def _check_share(config: Config) -> Iterable[str]:
    share = config.recompute_share
    if isinstance(share, bool) or not isinstance(share, numbers.Real):
        yield WrongType(f"recompute_share must be a number in (0, 1], got {share!r}")
    elif not 0 < share <= 1:
        yield f"recompute_share must be in (0, 1], got {share!r}"
    elif share < 1 and config.recompute in ("cheap", "auto"):
        yield (
            f"recompute_share {share!r} needs recompute 'products' or 'blocks', got {config.recompute!r}: it says for "
            "which share of the blocks that holds"
        )
    else:
        object.__setattr__(config, "recompute_share", float(share))


_CHECKS: tuple[Callable[[Config], Iterable[str]], ...] = (
    _check_preset,
    _check_freeze_rate,
    _check_scheduler,
    _check_codecs,
    _check_units,
    _check_choices,
    _check_flags,
    _check_integers,
    _check_distance_sample,
    _check_catch_up,
    _check_disabled_passes,
    _check_budget,
    _check_max_gradient_error,
    _check_price,
    _check_share,
)
