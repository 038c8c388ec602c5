"""Who competes: the ways to train one and the same model that the benchmarks compare.

======================= ==============================================================================
``eager-attention``     eager, attention as plain products (the paper's baseline), with BERT's attention dropout
``eager``               eager, SDPA
``compile``             torch.compile as it is
``checkpoint``          eager, gradient checkpointing; ``compile-checkpoint``: compiled
``activation-budget-X`` torch.compile with torch's ``activation_memory_budget`` of X, in (0, 1]
``lora``                eager, LoRA of rank 8 (peft); ``lora-checkpoint``: with gradient checkpointing
a preset's name         slimfit_fx; with ``-cheap``, ``-products``, ``-blocks`` or ``-auto``: that recompute; with
                        ``-loss``: outputs="loss"; with ``-open``: every gate open (scheduler "none"); with ``lora-``
                        before it: of a model with LoRA
``budget-X``            slimfit_fx's planner with a memory budget of X, up to preset "max": ``8GiB``; in the tables also
                        ``50%``: parameters and optimizer state, and half of what eager's step takes above them
======================= ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import Case, autocast, build_model, make_batch
from slimfit_fx.presets import SCHEDULER, SCHEDULER_OF

PLAIN = ("eager", "compile", "checkpoint")
PRESETS = ("exact", "paper", "balanced", "max")
ACTIVATION_BUDGETS = tuple(f"activation-budget-{tenths / 10:g}" for tenths in range(1, 10))
_OPEN, _LOSS = "-open", "-loss"
_LEVELS = ("cheap", "products", "blocks", "auto")
_LORA = "lora-"
_LORA_RANK = 8


@dataclass(frozen=True)
class Rival:
    """One way to train. ``preset``: of slimfit_fx, None for everybody else; the fields below it are its settings."""

    name: str
    preset: str | None = None
    all_open: bool = False
    recompute: str | None = None
    loss_only: bool = False
    memory_budget: str | None = None
    compiled: bool = False
    checkpoint: bool = False
    lora: bool = False
    eager_attention: bool = False
    activation_budget: float | None = None

    def case(self, case: Case) -> Case:
        """Return ``case`` as this rival trains it.

        Attention as plain products comes with the dropout of BERT's config, which has one probability for both.
        """
        return replace(case, attention="eager", attention_dropout=case.dropout) if self.eager_attention else case


_NAMED = {
    rival.name: rival
    for rival in (
        Rival("eager-attention", eager_attention=True),
        Rival("eager"),
        Rival("compile", compiled=True),
        Rival("checkpoint", checkpoint=True),
        Rival("compile-checkpoint", compiled=True, checkpoint=True),
        Rival("lora", lora=True),
        Rival("lora-checkpoint", lora=True, checkpoint=True),
    )
}


def rival_of(name: str) -> Rival:
    """Return the rival of this name; ValueError for a name that nobody bears."""
    found = _NAMED.get(name) or _ours(name) or _with_size(name)
    if found is None:
        ours = [
            *PRESETS,
            *(f"{preset}{end}" for preset in PRESETS for end in (*(f"-{level}" for level in _LEVELS), _LOSS, _OPEN)),
            *(f"{_LORA}{preset}{_OPEN}" for preset in PRESETS),
        ]
        legal = ", ".join(
            [*_NAMED, "activation-budget-X (0 < X <= 1)", *ours, "budget-X (a size such as 8GiB, or 50% of eager's)"]
        )
        raise ValueError(f"unknown rival: got {name!r}; legal: {legal}")
    return found


def _ours(name: str) -> Rival | None:
    asked = name.removeprefix(_LORA).removesuffix(_OPEN)
    rest = asked.removesuffix(_LOSS)
    level = next((level for level in _LEVELS if rest.endswith(f"-{level}")), None)
    preset = rest if level is None else rest.removesuffix(f"-{level}")
    if preset not in PRESETS:
        return None
    return Rival(
        name, preset, name.endswith(_OPEN), level, rest != asked, compiled=True, lora=name.startswith(_LORA)
    )  # fmt: skip


def _with_size(name: str) -> Rival | None:
    from slimfit_fx.planning.budget import parse_bytes

    kind, _, size = name.rpartition("-")
    try:
        if kind == "activation-budget" and 0 < float(size) <= 1:
            return Rival(name, compiled=True, activation_budget=float(size))
        if kind == "budget" and (0 < float(size[:-1]) < 100 if size.endswith("%") else parse_bytes(size)):
            return Rival(name, "max", memory_budget=size, compiled=True)
    except ValueError:
        pass  # neither a number nor a size: nobody's name
    return None


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
        loss: Tensor = self.outputs().loss
        return loss

    def outputs(self) -> Any:
        """Return all that the model returns for the batch."""
        with autocast(self.case):
            return self.call(**self.batch)

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
        if preset_of(self.name) is None:
            return None
        import slimfit_fx

        return slimfit_fx.session(self.model)


def preset_of(name: str) -> str | None:
    """Return the preset of a slimfit_fx rival, None for any other; ValueError for a name that nobody bears."""
    return rival_of(name).preset


def make_trainee(name: str, case: Case, settings: Settings) -> Trainee:
    """Build the model of ``case`` (same weights and data for every rival) and set it up as ``name`` says."""
    rival = rival_of(name)
    case = rival.case(case)
    model = adapted(rival, build_model(case, seed=settings.seed))
    call = _callable(rival, model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.01)
    batch = make_batch(case, seed=settings.seed)
    torch.manual_seed(settings.seed)
    return Trainee(name, case, model, call, optimizer, batch)


def adapted(rival: Rival, model: Any) -> nn.Module:
    """Return the model with what ``rival`` changes in it before anything compiles it: checkpointing, adapters."""
    if rival.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not rival.lora:
        found: nn.Module = model
        return found
    from peft import LoraConfig, get_peft_model

    head = next(name for name in ("qa_outputs", "classifier") if hasattr(model, name))
    return get_peft_model(model, LoraConfig(r=_LORA_RANK, target_modules=LORA_TARGETS, modules_to_save=[head]))


LORA_TARGETS = r".*attention.*\.(query|value|q_proj|v_proj)"
"""Query and value projections, peft's own choice for BERT and ViT."""


def _scheduler_of(rival: Rival, settings: Settings) -> str:
    """ILS is what the rival's preset has of it: the paper's own under ``paper``."""
    if rival.all_open:
        return "none"
    return SCHEDULER_OF.get(rival.preset or "", SCHEDULER) if settings.scheduler == SCHEDULER else settings.scheduler


def config_of(rival: Rival, settings: Settings) -> Any:
    """Return slimfit_fx's settings of a rival that is ours."""
    import slimfit_fx

    asked = {} if rival.recompute is None else {"recompute": rival.recompute}
    return slimfit_fx.Config(
        preset=rival.preset or "balanced",
        freeze_rate=settings.freeze_rate,
        scheduler=_scheduler_of(rival, settings),
        executor=settings.executor,
        **asked,
        outputs="loss" if rival.loss_only else "all",
        memory_budget=rival.memory_budget,
        seed=settings.seed,
        strict=True,
    )


def _callable(rival: Rival, model: nn.Module, settings: Settings) -> Callable[..., Any]:
    if rival.preset is not None:
        import slimfit_fx

        return slimfit_fx.optimize(model, config_of(rival, settings))
    if not rival.compiled:
        return model
    compiled = _compiled(model)
    return compiled if rival.activation_budget is None else _saving(compiled, rival.activation_budget)


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """torch.compile of ``model``, which shares nothing with what was compiled before of its class.

    Else a second model of one process runs the graph of the first, whatever settings it was to be compiled with.
    """
    from slimfit_fx.capture.dynamo import compile_forward

    return compile_forward(model, "inductor")


def _saving(compiled: Callable[..., Any], share: float) -> Callable[..., Any]:
    """``compiled`` with torch's activation_memory_budget: it is read when the first call compiles."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=share):
            return compiled(*args, **kwargs)

    return call
