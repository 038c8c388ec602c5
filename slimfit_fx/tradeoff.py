"""Memory against time: what presets and levels of recomputation come to for one model, and what else there is.

Everything is predicted: peaks are read off the code that Inductor writes, exact as in ``plan(..., peak=True)``; times
are the device's roofline (planning/roofline.py), an expectation to compare plans by. Nothing is compiled or trained.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from slimfit_fx.api import checked_settings
from slimfit_fx.beside_steps import most_open_bytes, open_count
from slimfit_fx.config import Config
from slimfit_fx.fit import arguments_of_forward
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.roofline import Roofline, roofline_of
from slimfit_fx.rehearsal import Rehearsal, known_step

PRESETS = ("exact", "balanced", "max")
_STEPS = (("cheap", 1.0), ("products", 0.5), ("products", 1.0), ("blocks", 0.5), ("blocks", 1.0))
"""Levels of recompute, and of how many of the blocks."""
VARIED = ("preset", "codecs", "memory_budget", "recompute", "recompute_share")
"""Settings that each of our points has of its own."""
SHARES = (0.8, 0.5, 0.2, 0.1, 0.05)
"""Settings of torch's ``activation_memory_budget`` that are drawn in."""


@dataclass(frozen=True)
class FrontPoint:
    """One way to train, predicted. ``ours``: by this package."""

    name: str
    ours: bool
    peak_bytes: int
    """Of a step, above parameters and optimizer state; for the worst choice of open units."""
    step_ms: float
    """Forward and backward by the roofline; with the chance of each gate to be open."""
    on_front: bool = False
    """Nothing else takes less memory and less time."""


@dataclass(frozen=True)
class Front:
    """All points, smallest peak first."""

    points: tuple[FrontPoint, ...]
    freeze_rate: float
    failed: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what could not be planned."""

    def __str__(self) -> str:
        rows = [
            [p.name, p.peak_bytes / 1e6, p.step_ms, "*" if p.on_front else "", "" if p.ours else "rival"]
            for p in self.points
        ]
        table = tabulate(rows, headers=["", "step peak MB", "expected ms", "front", ""], floatfmt=("", ".1f", ".1f"))
        failed = "".join(f"\n{name}: {reason}" for name, reason in self.failed)
        return f"predicted, freeze rate {self.freeze_rate:g}; *: nothing takes less of both\n{table}{failed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return dataclasses.asdict(self)

    def save_picture(self, path: str | Path) -> None:
        """Draw the points as a PNG.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from slimfit_fx.planning.front_picture import draw_front

        draw_front([(p.name, p.ours, p.peak_bytes, p.step_ms, p.on_front) for p in self.points], Path(path))


def front(
    model: nn.Module,
    example: Any,
    *,
    config: Config | None = None,
    presets: Sequence[str] = PRESETS,
    shares: Sequence[float] = SHARES,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Front:
    """Predicted memory against predicted step time of ``model``, over presets and levels of recomputation.

    Drawn in beside them: plain torch.compile, torch.compile with gradient checkpointing (for models that offer
    ``gradient_checkpointing_enable``) and with torch's ``activation_memory_budget``.

    Args:
        model: as for ``optimize``; may be on the meta device.
        example: what the model's forward takes: a mapping of keyword arguments, a sequence of arguments, or one tensor.
        config: settings of ``optimize`` in one object; what it says of those that vary (``VARIED``) is not read.
        presets: which presets are tried.
        shares: settings of ``activation_memory_budget`` that are tried.
        say: called with the name of each point before it is planned.
        settings: settings of ``optimize`` as keywords, but for those that vary.

    Raises:
        ValueError: bad settings, or a model that cannot be captured.
    """
    chosen, (units, _), _ = checked_settings(
        model, config, settings, plan_only=True, also=lambda: _refuse_varied(settings)
    )
    args, kwargs = arguments_of_forward(example)
    rehearsal = Rehearsal(model, units, faked=True)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    roofline = roofline_of(device)
    points, failed = [], []
    everything: list[Callable[[], Iterator[tuple[str, Callable[[], FrontPoint]]]]] = [
        lambda: _ours(rehearsal, chosen, presets, args, kwargs, roofline),
        lambda: _rivals(rehearsal, shares, args, kwargs, roofline),
    ]
    for name, make in (pair for kind in everything for pair in kind()):
        say(name)
        try:
            points.append(make())
        except ValueError as error:
            failed.append((name, str(error)))
    if not points:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failed))
    return Front(mark_front(points), chosen.freeze_rate, tuple(failed))


def _refuse_varied(settings: Mapping[str, Any]) -> None:
    given = [f"{name}={settings[name]!r}" for name in VARIED if name in settings]
    if given:
        raise ValueError(
            f"front tries presets and levels of recompute itself, without a budget, got {', '.join(given)}: choose "
            f"presets with presets=, e.g. presets={PRESETS!r}, and leave out {', '.join(VARIED[1:])}"
        )


def mark_front(points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points by peak, smallest first; those that no other beats in both are marked."""

    def beaten(p: FrontPoint) -> bool:
        return any(
            q.peak_bytes <= p.peak_bytes
            and q.step_ms <= p.step_ms
            and (q.peak_bytes, q.step_ms) != (p.peak_bytes, p.step_ms)
            for q in points
        )

    marked = [dataclasses.replace(p, on_front=not beaten(p)) for p in points]
    return tuple(sorted(marked, key=lambda p: (p.peak_bytes, p.step_ms)))


def _ours(
    rehearsal: Rehearsal, config: Config, presets: Sequence[str], args: Any, kwargs: Any, roofline: Roofline
) -> Iterator[tuple[str, Callable[[], FrontPoint]]]:
    def point(name: str, settings: Config) -> FrontPoint:
        trace = known_step(rehearsal.graphs(settings, args, kwargs, peak=True))
        scheduler = rehearsal.scheduler(settings)
        opened = open_count(settings, scheduler, rehearsal.units)
        most = most_open_bytes(settings, scheduler, opened)
        opened = min(opened, trace.num_gates)
        share = opened / max(1, len(rehearsal.units))
        return FrontPoint(name, True, trace.worst(opened, most)[0], roofline.expected_ms(trace.work, share))

    config = dataclasses.replace(config, memory_budget=None)
    for level, share in _STEPS:
        stepped = dataclasses.replace(config, recompute=level, recompute_share=share)
        for preset in presets:
            settings = dataclasses.replace(stepped, preset=preset, codecs=None)
            yield settings.label, lambda s=settings: point(s.label, s)  # type: ignore[misc]
        settings = dataclasses.replace(stepped, preset="exact", freeze_rate=0.0)
        name = f"{settings.label}, nothing frozen"
        yield name, lambda s=settings, n=name: point(n, s)  # type: ignore[misc]


def _rivals(
    rehearsal: Rehearsal, shares: Sequence[float], args: Any, kwargs: Any, roofline: Roofline
) -> Iterator[tuple[str, Callable[[], FrontPoint]]]:
    def point(name: str, trace: StepTrace | None) -> FrontPoint:
        if trace is None:
            raise ValueError("no graph that trains was captured")
        return FrontPoint(name, False, trace.peak(()).peak_bytes, roofline.step_ms(trace.work, ()))

    def with_share(share: float) -> FrontPoint:
        with torch._functorch.config.patch(activation_memory_budget=share):
            return point(f"activation_memory_budget {share:g}", rehearsal.plain_trace(args, kwargs))

    yield "torch.compile", lambda: point("torch.compile", rehearsal.plain_trace(args, kwargs))
    for share in shares:
        yield f"activation_memory_budget {share:g}", lambda s=share: with_share(s)  # type: ignore[misc]
    if hasattr(rehearsal.model, "gradient_checkpointing_enable"):
        name = "torch.compile, checkpointing"

        def checkpointed() -> FrontPoint:
            with _checkpointing(rehearsal) as other:
                return point(name, other.plain_trace(args, kwargs))

        yield name, checkpointed


@contextlib.contextmanager
def _checkpointing(rehearsal: Rehearsal) -> Iterator[Rehearsal]:
    """The same model with gradient checkpointing, as a copy that shares its parameters."""
    model = rehearsal.model
    shared: Mapping[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, dict(shared))
    other.gradient_checkpointing_enable()  # type: ignore[operator]
    yield Rehearsal(other, rehearsal.units, faked=True)
