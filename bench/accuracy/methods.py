"""Set a model up to be fine-tuned by one method, and again for the next seed without compiling it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.accuracy.cells import Method
from bench.accuracy.tasks.base import Task

LORA_RANK = 8


class Trainee:
    """The model of a task under one method. ``begin(seed)`` gives it the weights, and the schedule, of a new run.

    A model that slimfit_fx compiled is kept: it takes over weights and schedule of a freshly made one, which is the
    same run (``tests/test_bench_accuracy.py`` compares).
    """

    def __init__(self, task: Task, method: Method, *, device: torch.device, executor: str) -> None:
        self.task = task
        self.method = method
        self._device = device
        self._executor = executor
        self._compiled: nn.Module | None = None

    def begin(self, seed: int) -> nn.Module:
        """Return the model as it stands before the first step of a run with this seed, in training mode."""
        model = self.task.make_model(seed).to(self._device)
        if self.method.kind == "head":
            _freeze_backbone(model)
        elif self.method.kind == "lora":
            model = _add_adapters(model, seed)
        elif self.method.kind == "slimfit":
            model = self._take_over(self._optimize(model, seed))
        return model.train()

    def _optimize(self, model: nn.Module, seed: int) -> nn.Module:
        import slimfit_fx

        method = self.method
        unpaced: dict[str, Any] = {} if method.paced else {"moments": "updates", "catch_up": 0.0}
        return slimfit_fx.optimize(
            model,
            preset=method.preset,
            freeze_rate=method.freeze_rate,
            scheduler=method.scheduler,
            executor=self._executor,
            seed=seed,
            strict=True,
            **unpaced,
        )

    def _take_over(self, fresh: nn.Module) -> nn.Module:
        """The compiled model with weights and schedule of ``fresh``; ``fresh`` itself if there is none yet."""
        import slimfit_fx

        if self._compiled is None:
            torch._dynamo.reset()
            self._compiled = fresh
            return fresh
        self._compiled.load_state_dict(fresh.state_dict())
        self._compiled.zero_grad(set_to_none=True)
        slimfit_fx.session(self._compiled).load_state_dict(slimfit_fx.session(fresh).state_dict())
        slimfit_fx.restore(fresh)
        return self._compiled


def frozen_share(model: nn.Module, steps: int) -> float:
    """Mean share of the units that were frozen in the last ``steps`` steps; 0 for a model of another method."""
    from slimfit_fx.api import find_session

    found = find_session(model)
    if found is None or not steps:
        return 0.0
    opened = [len(units) for _, units in list(found.gates.history)[-steps:]]
    return 1.0 - sum(opened) / len(opened) / len(found.gates.names)


def recompiles(model: nn.Module) -> int:
    """Graphs that slimfit_fx compiled again so far; 0 for a model of another method."""
    from slimfit_fx.api import find_session

    found = find_session(model)
    return 0 if found is None else found.recompiles


def _freeze_backbone(model: nn.Module) -> None:
    """Leave nothing trainable but what lies outside of ``base_model``."""
    for param in model.base_model.parameters():  # type: ignore[union-attr]
        param.requires_grad_(False)


def _add_adapters(model: nn.Module, seed: int) -> nn.Module:
    """LoRA of rank 8 on every matrix of the backbone, and the head, as peft has it."""
    from peft import LoraConfig, get_peft_model

    backbone: Any = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=[f"{prefix}.{name}" for name, _ in _matrices(backbone)],
        modules_to_save=_head_names(model),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for _, module in _matrices(backbone)),
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _matrices(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def _head_names(model: nn.Module) -> list[str]:
    """The direct children of ``model`` that lie outside of its backbone and have parameters."""
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and next(child.parameters(), None) is not None
    ]
