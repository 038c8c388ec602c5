"""All settings, in one frozen object that validates itself before anything is traced."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slimfit_fx._suggest import unknown
from slimfit_fx.config_checks import WrongType, problems_of
from slimfit_fx.presets import (
    CATCH_UP,
    CATCH_UP_OF,
    DISTANCE_SAMPLE,
    DISTANCE_SAMPLES,
    FALLBACK,
    MOMENTS,
    MOMENTS_OF,
    PARTS,
    PRESETS,
    RECOMPUTE,
    RECOMPUTE_OF,
    SCHEDULER,
    SCHEDULER_OF,
    TILES_OF,
    WHOLE_OF,
    CodecTable,
    find_changes,
    resolve,
)
from slimfit_fx.schedule import Scheduler

if TYPE_CHECKING:
    from slimfit_fx.codecs import Codec
    from slimfit_fx.units import UnitChoice

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
    scheduler: str | Scheduler | type[Scheduler] = _OF_THE_PRESET
    """A registered name, a :class:`Scheduler` or a subclass of it. Default: ``"ils"``, and ``"ils_paper"`` if preset is
    ``"paper"``."""
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
    moments: str = _OF_THE_PRESET
    """What Adam's averages of a unit's gradients go by: ``"steps"`` (they reach back as many optimizer steps as those
    of parameters that always train, which is what the user's betas mean) or ``"updates"`` (steps in which the unit was
    closed count for nothing). Default: ``"steps"``, and ``"updates"`` if preset is ``"paper"``."""
    catch_up: float = _OF_THE_PRESET
    """How far units make up for the steps in which they were closed, in [0, 1]: while an Adam steps their learning rate
    is multiplied by ``(units / open units) ** catch_up``. Default: 0.5, so that a usual learning rate of full
    fine-tuning serves; 0 if preset is ``"paper"``."""
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
    recompute: str = _OF_THE_PRESET
    """What may be computed again for backward: ``"cheap"`` (pointwise work, norms, attention scores), ``"products"``
    (matrix products too where that saves more than it costs), ``"blocks"`` (whole blocks from what enters them, like
    gradient checkpointing), or ``"auto"``: of these, what the closed units' spared products pay for; presets
    balanced and max say that, the others "cheap". Less is saved and a step takes longer; without codecs that lose
    something the results are the same bits, with them what runs again starts from decoded values."""
    recompute_share: float = 1.0
    """Share of the repeated blocks, from the first on, for which ``recompute`` says so, in (0, 1]; in the others only
    cheap work runs again. Backward reaches the first blocks last, when little else is left in memory."""
    tiles: bool = _OF_THE_PRESET
    """Whether repeated blocks run on a tile of the batch after the other where the batch is large enough: what a block
    holds on its own is then a fraction. Gradients of weights are sums over tiles, the same but for rounding; a GPU's
    attention with dropout draws for each tile. Presets balanced and max say True, the others False. Only with executor
    ``"inductor"`` and sizes that are plain numbers."""
    outputs: str = "all"
    """What a training forward gives: ``"all"`` that the model returns, or ``"loss"``: single numbers with a gradient,
    and of other outputs with one (logits) the shape alone, a tensor on the device ``"meta"``, which raises where its
    elements are read. A step then never holds the logits of a language model as a whole. Evaluation gives all."""
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
        problems = problems_of(self)
        if problems:
            error = TypeError if all(isinstance(problem, WrongType) for problem in problems) else ValueError
            raise error("\n".join(problems))

    def _normalise(self) -> None:
        """Copy what is mutable, make tuples of lists where the type allows, and take what the preset says."""
        preset = self.preset if isinstance(self.preset, str) else ""
        of_the_preset = {
            "scheduler": SCHEDULER_OF.get(preset, SCHEDULER),
            "distance_sample": DISTANCE_SAMPLES.get(preset, DISTANCE_SAMPLE),
            "recompute": RECOMPUTE_OF.get(preset, RECOMPUTE[0]),
            "tiles": TILES_OF.get(preset, False),
            "moments": MOMENTS_OF.get(preset, MOMENTS[0]),
            "catch_up": CATCH_UP_OF.get(preset, CATCH_UP),
        }
        for name, settled in of_the_preset.items():
            if getattr(self, name) is _OF_THE_PRESET:
                object.__setattr__(self, name, settled)
        if isinstance(self.codecs, Mapping):
            object.__setattr__(self, "codecs", dict(self.codecs))
        for name in ("units", "disabled_passes"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def codec_table(self) -> dict[str, str | None]:
        """The preset's table with ``codecs`` laid over it, before ``max_gradient_error``.

        A line for a kind is for all of it: what the preset says of the parts of that kind no longer holds.
        """
        mine = self.codecs or {}
        replaced = {part for kind in mine for part in PARTS.get(kind, ())}
        return {**{kind: codec for kind, codec in PRESETS[self.preset].items() if kind not in replaced}, **mine}

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
        if self.recompute in ("cheap", "auto"):  # a budget tries no "auto", but all that it may choose
            return []
        where = "" if self.recompute_share == 1 else f" in the first {self.recompute_share:.0%}"
        return [f"recompute {self.recompute}{where}"]

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
        parts = {part for kind in held.keys() - changed.keys() for part in PARTS.get(kind, ())}
        held |= {part: asked[part] for part in parts if asked[part] != held.get(part, held[WHOLE_OF[part]])}
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
            "recompute_share": self.recompute_share,
            "tiles": self.tiles,
            "outputs": self.outputs,
            "milder": {kind: why for kind in FALLBACK if (why := self.why_milder(kind)) is not None},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=256)
def _bounded(table: tuple[tuple[str, str | None], ...], bound: float) -> dict[str, str | None]:
    return _sensitivity().make_milder(resolve(dict(table)), bound)


def _sensitivity() -> Any:
    from slimfit_fx.planning import sensitivity  # not at the top: it reads a file

    return sensitivity


def _codecs() -> Any:
    from slimfit_fx import codecs  # not at the top: codecs pull in torch operators that a plain import does not need

    return codecs
