"""All settings, in one frozen object that validates itself before anything is traced."""

from __future__ import annotations

import functools
import hashlib
import json
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slimfit_fx._suggest import unknown
from slimfit_fx.presets import (
    DISTANCE_SAMPLE,
    DISTANCE_SAMPLES,
    FALLBACK,
    LOSSLESS_PRESETS,
    PRESETS,
    CodecTable,
    find_changes,
    resolve,
)
from slimfit_fx.schedule import DISTANCES, Scheduler, scheduler_names

if TYPE_CHECKING:
    from slimfit_fx.codecs import Codec
    from slimfit_fx.units import UnitChoice

EXECUTORS = ("inductor", "interpreter")
RECOMPUTE = ("cheap", "products", "blocks")
"""Levels, each of which may compute again what the one before it may, and more."""
_OF_THE_PRESET: Any = "of the preset"


@dataclass(frozen=True)
class Config:
    """Settings of one optimized model.

    Raises:
        TypeError: a setting has the wrong type (and no other problem was found).
        ValueError: a setting has an illegal value. One error lists all problems, one per line.
    """

    preset: str = "balanced"
    """``"exact"`` (nothing lossy), ``"paper"`` (the authors' formats), ``"balanced"`` (int8) or ``"max"`` (int4)."""
    freeze_rate: float = 0.9
    """Share of the units frozen in each step, in [0, 1)."""
    scheduler: str | Scheduler | type[Scheduler] = "ils"
    """A registered name, a :class:`Scheduler` or a subclass of it."""
    codecs: CodecTable | None = field(default=None, hash=False)
    """Changes to the preset: kind of value -> codec name, or None to keep that kind as it is."""
    units: UnitChoice | None = None
    """Freezable parameters: None for the default rule, a predicate ``(name, parameter) -> bool`` or name patterns."""
    executor: str = "inductor"
    """``"inductor"``, or ``"interpreter"``, which needs no C++ compiler."""
    seed: int = 0
    """Seed of the scheduler."""
    dynamic: bool | None = None
    """As in ``torch.compile``."""
    compile_eval: bool = False
    """Compile evaluation as well (plainly; where the interpreter is used, without Inductor); else it runs eagerly."""
    distance: str = "relative_mean"
    """How far a unit moved: ``"relative_mean"`` or ``"relative_norm"``."""
    distance_sample: int | None = _OF_THE_PRESET
    """Elements of each tensor, at most, that this is measured on, evenly spaced; None: all of them. Default: 65536, and
    None if preset is ``"paper"``. It is settled when the object is made: ``replace(config, preset=...)`` keeps it."""
    debug: bool = field(default_factory=lambda: os.environ.get("SLIMFIT_FX_DEBUG", "0") not in ("", "0"))
    """NaN-filled tensors for ghosts, and graphs logged after each pass, at level INFO of the logger
    ``slimfit_fx.passes.graphs``. Default: on if the environment variable ``SLIMFIT_FX_DEBUG`` is set, and not to 0."""
    strict: bool = False
    """An internal failure raises instead of leaving that graph uncompressed with a warning."""
    disabled_passes: tuple[str, ...] = ()
    """Names of passes to skip."""
    min_bytes: int = 4096
    """Saved values smaller than this are kept as they are."""
    memory_budget: int | float | str | None = None
    """Upper bound on all that a training step holds on the device: bytes, ``"6GiB"``, or a share of the device's memory
    in (0, 1]. The least lossy plan that fits is taken, up to ``preset``; if none fits, the first step raises."""
    recompute: str = "cheap"
    """What may be computed again for backward: ``"cheap"`` (pointwise work, norms, attention scores), ``"products"``
    (matrix products too where that saves more than it costs), ``"blocks"`` (whole blocks from what enters them, like
    gradient checkpointing), or ``"auto"``: of these, what the closed units' spared products pay for. The results are
    the same; less is saved and a step takes longer."""
    gradient_accumulation: bool = False
    """Several backward passes make one optimizer step: ``memory_budget`` then leaves room for the gradients of earlier
    ones. Without it the first such step plans again if they do not fit, with a warning."""
    max_gradient_error: float | None = None
    """Upper bound on the relative gradient error to expect of the codecs (planning/sensitivity.py). Where they exceed
    it, milder ones are taken instead, first where the error costs most per byte."""
    recompute_price: float = 1.0
    """How dear it is to compute a value again, against the bytes of saving it; a lower price saves less."""

    def __post_init__(self) -> None:
        """Normalise the fields, then check every one of them."""
        self._normalise()
        problems = [problem for check in _CHECKS for problem in check(self)]
        if problems:
            error = TypeError if all(isinstance(problem, _WrongType) for problem in problems) else ValueError
            raise error("\n".join(problems))

    def _normalise(self) -> None:
        """Copy what is mutable, make tuples of lists where the type allows, and take what the preset says."""
        if self.distance_sample is _OF_THE_PRESET:
            known = DISTANCE_SAMPLES if isinstance(self.preset, str) else {}
            object.__setattr__(self, "distance_sample", known.get(self.preset, DISTANCE_SAMPLE))
        if isinstance(self.codecs, Mapping):
            object.__setattr__(self, "codecs", dict(self.codecs))
        for name in ("units", "disabled_passes"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def codec_table(self) -> dict[str, str | None]:
        """The preset's table with ``codecs`` laid over it, before ``max_gradient_error``."""
        return {**PRESETS[self.preset], **(self.codecs or {})}

    @property
    def codec_map(self) -> dict[str, str | None]:
        """What every kind is stored by: the table, made milder until ``max_gradient_error`` holds."""
        if self.max_gradient_error is None:
            return resolve(self.codec_table)
        return resolve({**self.codec_table, **_bounded(tuple(self.codec_table.items()), self.max_gradient_error)})

    @property
    def expected_gradient_error(self) -> float | None:
        """The relative gradient error to expect if values of every kind are stored; None if it was never measured."""
        return _sensitivity().expected_error(self.codec_map)

    @property
    def recompute_levels(self) -> tuple[str, ...]:
        """Those among which the planner may choose; where every unit trains, nothing is spared to pay for more."""
        if self.recompute != "auto":
            return (self.recompute,)
        return RECOMPUTE[:1] if self.scheduler == "none" else RECOMPUTE

    @property
    def label(self) -> str:
        """What names these settings among those that a budget tries."""
        changed = find_changes(resolve(PRESETS[self.preset]), self.codec_map)
        changes = [f"{kind} {codec or 'kept'}" for kind, codec in changed.items()]
        return ", ".join([f"preset {self.preset}", *changes, *self._recomputes()])

    def _recomputes(self) -> list[str]:
        return [] if self.recompute == "cheap" else [f"recompute {self.recompute}"]

    def codec_for(self, kind: str) -> Codec | None:
        """Return the codec that stores values of this kind, or None if they are kept as they are.

        Args:
            kind: a key of ``FALLBACK``, or ``"exact"`` for values that must not change (always None).

        Raises:
            ValueError: unknown kind.
        """
        if kind == "exact":
            return None
        if kind not in FALLBACK:
            raise ValueError(unknown("kind", kind, FALLBACK))
        name = self.codec_map[kind]
        return None if name is None else _codecs().get_codec(name)

    def why_milder(self, kind: str) -> str | None:
        """Why values of this kind are not stored as the table says; None if they are."""
        asked = None if kind == "exact" else resolve(self.codec_table)[kind]
        used = None if kind == "exact" else self.codec_map[kind]
        if asked == used:
            return None
        return f"{used or 'kept'} instead of {asked}: max_gradient_error {self.max_gradient_error:g}"

    def with_codecs(self, wanted: Mapping[str, str | None]) -> Config:
        """These settings with the codecs of ``wanted`` for its kinds, and what the table says for all others."""
        asked = resolve(self.codec_table)
        changed = {kind: name for kind, name in wanted.items() if name != asked[kind]}
        without = resolve({**self.codec_table, **changed})  # a general kind that changed takes others with it
        held = {kind: name for kind, name in wanted.items() if name != without[kind]}
        return replace(self, codecs={**(self.codecs or {}), **changed, **held} or None)

    def fingerprint(self) -> str:
        """Return a hash of what changes a compiled graph: equal in every process for equal settings.

        Seed, scheduler and executor are not part of it; which parameters are units is the graph's own matter.
        """
        parts = {
            "preset": self.preset,
            "codecs": {kind: repr(self.codec_for(kind)) for kind in FALLBACK},
            "min_bytes": self.min_bytes,
            "debug": self.debug,
            "disabled_passes": sorted(set(self.disabled_passes)),
            "freeze_rate": round(self.freeze_rate, 4),
            "recompute_price": self.recompute_price,
            "recompute": self.recompute_levels,
            "milder": {kind: why for kind in FALLBACK if (why := self.why_milder(kind)) is not None},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class _WrongType(str):
    """A problem message about a type rather than a value."""


@functools.lru_cache(maxsize=256)
def _bounded(table: tuple[tuple[str, str | None], ...], bound: float) -> dict[str, str | None]:
    return _sensitivity().make_milder(resolve(dict(table)), bound)


def _sensitivity() -> Any:
    from slimfit_fx.planning import sensitivity  # not at the top: it reads a file

    return sensitivity


def _codecs() -> Any:
    from slimfit_fx import codecs  # not at the top: codecs pull in torch operators that a plain import does not need

    return codecs


def _check_preset(config: Config) -> Iterable[str]:
    if not isinstance(config.preset, str):
        yield _WrongType(f"preset must be a string, one of {sorted(PRESETS)}, got {config.preset!r}")
    elif config.preset not in PRESETS:
        yield unknown("preset", config.preset, PRESETS)


def _check_freeze_rate(config: Config) -> Iterable[str]:
    rate = config.freeze_rate
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        yield _WrongType(f"freeze_rate must be a number in [0, 1), got {rate!r}")
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
        yield _WrongType(f"scheduler must be a name, a Scheduler or a subclass of it, got {scheduler!r}")


def _check_codecs(config: Config) -> Iterable[str]:
    if config.codecs is None:
        return
    if not isinstance(config.codecs, Mapping):
        yield _WrongType(f"codecs must be None or a mapping from kind to codec name, got {config.codecs!r}")
        return
    known = _codecs().codec_names()
    for kind, name in config.codecs.items():
        if kind not in FALLBACK:
            yield unknown("codecs: the kind", kind, FALLBACK)
        if name is None:
            continue
        if not isinstance(name, str):
            yield _WrongType(f"codecs[{kind!r}] must be None or a codec name, got {name!r}")
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
        yield _WrongType(f"units must be None, a predicate (name, parameter) -> bool or name patterns, got {units!r}")
    elif not units:
        yield f"units must name at least one parameter, got {units!r}: use None for the default rule"


def _check_choices(config: Config) -> Iterable[str]:
    for name, legal in (("executor", EXECUTORS), ("distance", DISTANCES), ("recompute", (*RECOMPUTE, "auto"))):
        value = getattr(config, name)
        if not isinstance(value, str):
            yield _WrongType(f"{name} must be a string, one of {sorted(legal)}, got {value!r}")
        elif value not in legal:
            yield unknown(name, value, legal)


def _check_flags(config: Config) -> Iterable[str]:
    for name in ("compile_eval", "debug", "gradient_accumulation", "strict"):
        if not isinstance(value := getattr(config, name), bool):
            yield _WrongType(f"{name} must be True or False, got {value!r}")
    if config.dynamic is not None and not isinstance(config.dynamic, bool):
        yield _WrongType(f"dynamic must be None, True or False, got {config.dynamic!r}")


def _check_integers(config: Config) -> Iterable[str]:
    for name in ("seed", "min_bytes"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            yield _WrongType(f"{name} must be an integer >= 0, got {value!r}")
        elif value < 0:
            yield f"{name} must be >= 0, got {value!r}"


def _check_distance_sample(config: Config) -> Iterable[str]:
    most = config.distance_sample
    if most is None:
        return
    if isinstance(most, bool) or not isinstance(most, int):
        yield _WrongType(f"distance_sample must be None or an integer >= 1, got {most!r}")
    elif most < 1:
        yield f"distance_sample must be >= 1, got {most!r}: use None to measure distances on all elements"


def _check_disabled_passes(config: Config) -> Iterable[str]:
    names = config.disabled_passes
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        yield _WrongType(f"disabled_passes must be a tuple of pass names, got {names!r}")


def _check_budget(config: Config) -> Iterable[str]:
    budget = config.memory_budget
    if budget is None:
        return
    legal = "bytes, a size such as '6GiB' or a share of the device's memory in (0, 1]"
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        yield _WrongType(f"memory_budget must be {legal}, got {budget!r}")
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
        yield _WrongType(f"max_gradient_error must be None or a number >= 0, got {bound!r}")
    elif not 0 <= bound < float("inf"):
        yield f"max_gradient_error must be a finite number >= 0 (0.05 allows five percent), got {bound!r}"
    elif not any(problem for check in (_check_preset, _check_codecs) for problem in check(config)):
        object.__setattr__(config, "max_gradient_error", float(bound))
        for problem in _sensitivity().describe_unmeasured(resolve(config.codec_table)):
            yield f"max_gradient_error {bound:g} cannot be promised: {problem}"


def _check_price(config: Config) -> Iterable[str]:
    price = config.recompute_price
    if isinstance(price, bool) or not isinstance(price, numbers.Real):
        yield _WrongType(f"recompute_price must be a number > 0, got {price!r}")
    elif not 0 < price < float("inf"):
        yield f"recompute_price must be a finite number > 0, got {price!r}"


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
    _check_disabled_passes,
    _check_budget,
    _check_max_gradient_error,
    _check_price,
)
