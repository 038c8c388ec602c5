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
        found: dict[str, Tensor] = remembered(path, lambda: pretrain(pretraining_examples()))
        return found

    def make_model(seed: int) -> nn.Module:
        model = vision_transformer(10, width=WIDTH, layers=LAYERS, seed=seed)
        model.base_model.load_state_dict(body())
        return model

    title = "a ViT that knows the digits 0 to 4 learns all ten"
    return Task("digits", scale, title, _RECIPES[scale], ACCURACY, 0.90, make_model, functools.cache(load_splits))


def pretraining_examples() -> Examples:
    """Half of the images of 0 to 4: always the same, and never tested on."""
    return _take(*_all_digits())


def load_splits(seed: int = 0) -> Splits:
    """Of each digit half to train, a sixth to choose the learning rate, a third to test: drawn anew by each seed.

    One split would have 599 images to test: what a method gains there by chance, a third of a point, would be in the
    result of every seed, and in no interval. What was pretrained on stays with what is trained on.
    """
    images, pretrained = _all_digits()
    known = torch.zeros(len(images), dtype=torch.bool).index_fill(0, pretrained, True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in range(10):
        mine = order[images.labels[order] == label]
        mine = torch.cat([mine[known[mine]], mine[~known[mine]]])
        half = int(known[mine].sum()) or len(mine) // 2
        held_out = half + (len(mine) - half) // 3
        for part, chosen in zip(parts, mine.tensor_split([half, held_out]), strict=True):
            part.append(chosen)
    train, validation, test = (_take(images, torch.cat(part).sort().values) for part in parts)
    return Splits(train, validation, test)


@functools.cache
def _all_digits() -> tuple[Examples, Tensor]:
    """All 1,797, and where those stand that are pretrained on."""
    rest, test = digits()
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    chosen = order[len(order) // 4 :]
    labels = torch.cat([rest.labels, test.labels])
    inputs = {name: torch.cat([value, test.inputs[name]]) for name, value in rest.inputs.items()}
    return Examples(inputs, labels), chosen[labels[chosen] < KNOWN]


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
