"""Who competes: the ways to train one and the same model that the benchmarks compare.

``eager``, ``compile`` (torch.compile as it is), ``checkpoint`` (eager, gradient checkpointing), and slimfit_fx under
each preset; a preset with ``-open`` appended keeps every gate open (scheduler "none").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import Case, autocast, build_model, make_batch

PLAIN = ("eager", "compile", "checkpoint")
PRESETS = ("exact", "paper", "balanced", "max")
_OPEN = "-open"


@dataclass(frozen=True)
class Settings:
    """What slimfit_fx is asked for, the same for every preset of one run."""

    freeze_rate: float = 0.9
    scheduler: str = "ils"
    executor: str = "inductor"
    seed: int = 0


@dataclass
class Trainee:
    """A model with everything that the user's own loop needs; the parts of a step, one method each."""

    name: str
    case: Case
    model: nn.Module
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]

    def clear(self) -> None:
        """Drop the gradients, as a user's loop does before forward."""
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        """Return the loss of the batch (0-dim)."""
        with autocast(self.case):
            loss: Tensor = self.call(**self.batch).loss
        return loss

    def backward(self, loss: Tensor) -> None:
        """Fill in the gradients."""
        torch.autograd.backward(loss)

    def update(self) -> None:
        """Take the optimizer step; this is where slimfit_fx chooses the gates of the next step."""
        self.optimizer.step()

    def step(self) -> None:
        """Run one whole training step."""
        self.clear()
        self.backward(self.forward())
        self.update()

    def grad_bytes(self) -> int:
        """Bytes of the gradients that exist now."""
        return sum(p.grad.numel() * p.grad.element_size() for p in self.model.parameters() if p.grad is not None)

    @property
    def session(self) -> Any | None:
        """The slimfit_fx session, or None for the plain rivals."""
        if self.name in PLAIN:
            return None
        import slimfit_fx

        return slimfit_fx.session(self.model)


def preset_of(name: str) -> str | None:
    """Return the preset of a slimfit_fx rival, None for a plain one; ValueError for a name that nobody bears."""
    preset = name.removesuffix(_OPEN)
    if preset in PRESETS:
        return preset
    if name in PLAIN:
        return None
    legal = [*PLAIN, *PRESETS, *(preset + _OPEN for preset in PRESETS)]
    raise ValueError(f"unknown rival: got {name!r}; legal: {', '.join(legal)}")


def make_trainee(name: str, case: Case, settings: Settings) -> Trainee:
    """Build the model of ``case`` (same weights and data for every rival) and set it up as ``name`` says."""
    model = build_model(case, seed=settings.seed)
    call = _set_up(name, model, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    batch = make_batch(case, seed=settings.seed)
    torch.manual_seed(settings.seed)
    return Trainee(name, case, model, call, optimizer, batch)


def _set_up(name: str, model: Any, settings: Settings) -> Callable[..., Any]:
    preset = preset_of(name)
    if preset is not None:
        return _optimize(model, preset, settings, scheduler="none" if name.endswith(_OPEN) else settings.scheduler)
    if name == "compile":
        return torch.compile(model)
    if name == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    call: Callable[..., Any] = model
    return call


def _optimize(model: nn.Module, preset: str, settings: Settings, *, scheduler: str) -> Callable[..., Any]:
    import slimfit_fx

    optimized: Callable[..., Any] = slimfit_fx.optimize(
        model,
        preset=preset,
        freeze_rate=settings.freeze_rate,
        scheduler=scheduler,
        executor=settings.executor,
        seed=settings.seed,
        strict=True,
    )
    return optimized
