"""Images: a vision transformer that knows the digits 0 to 4 learns all ten (scikit-learn's digits, real images)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from bench.accuracy.tasks.base import ACCURACY, Recipe, Splits, Task, remembered
from slimfit_fx.demo.data import Examples, batches, digits
from slimfit_fx.demo.models import vision_transformer

KNOWN = 5
"""Pretraining sees the digits below this one."""
WIDTH, LAYERS = 128, 4
_RECIPES = {
    "full": Recipe(epochs=24, batch=64, learning_rate=1e-3),
    "quick": Recipe(epochs=12, batch=64, learning_rate=1e-3),
}
_PRETRAINING_STEPS, _PRETRAINING_BATCH, _PRETRAINING_RATE = 300, 128, 1e-3


def digits_task(scale: str, cache: Path) -> Task:
    """Build the task; the pretrained body lies in ``cache`` and is trained when it is first asked for."""

    @functools.cache
    def body() -> dict[str, Tensor]:
        path = cache / f"digits-{WIDTH}x{LAYERS}-{_PRETRAINING_STEPS}.pt"
        found: dict[str, Tensor] = remembered(path, lambda: pretrain(load().train.below(KNOWN)))
        return found

    def make_model(seed: int) -> nn.Module:
        model = vision_transformer(10, width=WIDTH, layers=LAYERS, seed=seed)
        model.base_model.load_state_dict(body())
        return model

    load = functools.cache(load_splits)
    title = "a ViT that knows the digits 0 to 4 learns all ten"
    return Task("digits", scale, title, _RECIPES[scale], ACCURACY, 0.90, make_model, load)


def load_splits() -> Splits:
    """Half of the digits to train, a sixth to choose the learning rate, a third to test."""
    rest, test = digits()
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    chosen, held_out = order[len(order) // 4 :], order[: len(order) // 4]
    return Splits(_take(rest, chosen), _take(rest, held_out), test)


def _take(examples: Examples, index: Tensor) -> Examples:
    return Examples({name: value[index] for name, value in examples.inputs.items()}, examples.labels[index])


def pretrain(examples: Examples, steps: int = _PRETRAINING_STEPS) -> dict[str, Any]:
    """Train a ViT on ``examples``, moved, scaled and noisy, and return the weights of all but its classifier."""
    model = vision_transformer(KNOWN, width=WIDTH, layers=LAYERS, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    chance = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), desc="digits: pretraining on 0 to 4", unit="step", dynamic_ncols=True)
    for _, batch in zip(bar, batches(examples, _PRETRAINING_BATCH, seed=0), strict=False):
        model(pixel_values=augmented(batch["pixel_values"], chance), labels=batch["labels"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    body: dict[str, Any] = model.base_model.state_dict()
    return body


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """Move each image by up to one pixel each way, change its contrast by up to a fifth, add noise.

    ``images``: (n, 1, 8, 8) in [-1, 1], where -1 is paper.
    """
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = (torch.randint(0, 3, (count, 1), generator=chance) + torch.arange(size) for _ in range(2))
    moved = padded[torch.arange(count)[:, None, None], 0, down[:, :, None], right[:, None, :]].unsqueeze(1)
    contrast = 0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=chance)
    return (moved + 1) * contrast - 1 + 0.1 * torch.randn(images.shape, generator=chance)
