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
    """Build the task; the pretrained bodies, one for each seed, lie in ``cache``, trained when first asked for."""
    load = functools.cache(load_splits)

    def body(seed: int) -> dict[str, Tensor]:
        path = cache / f"digits-{WIDTH}x{LAYERS}-{_PRETRAINING_STEPS}-split{seed}.pt"
        found: dict[str, Tensor] = remembered(path, lambda: pretrain(load(seed).train.below(KNOWN)))
        return found

    def make_model(seed: int) -> nn.Module:
        model = vision_transformer(10, width=WIDTH, layers=LAYERS, seed=seed)
        model.base_model.load_state_dict(body(seed))
        return model

    title = "a ViT that knows the digits 0 to 4 learns all ten"
    return Task("digits", scale, title, _RECIPES[scale], ACCURACY, 0.90, make_model, load)


def load_splits(seed: int = 0) -> Splits:
    """Half of the digits to train, a sixth to choose the learning rate, a third to test.

    Each seed draws anew what is trained on, what is tested on and so what is pretrained on: one split would put into
    the result of every seed, and into no interval, what a method gains by chance on one set of 599 images, a third of
    a point. What the learning rate is chosen by is the same for all, and tested on by none.
    """
    from sklearn.model_selection import train_test_split

    rest, held_back = digits()
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    others = _joined(_take(rest, order[len(order) // 4 :]), held_back)
    train, test = train_test_split(
        torch.arange(len(others)).numpy(), test_size=len(held_back), stratify=others.labels.numpy(), random_state=seed
    )
    validation = _take(rest, order[: len(order) // 4])
    return Splits(_take(others, torch.from_numpy(train)), validation, _take(others, torch.from_numpy(test)))


def _joined(first: Examples, second: Examples) -> Examples:
    inputs = {name: torch.cat([value, second.inputs[name]]) for name, value in first.inputs.items()}
    return Examples(inputs, torch.cat([first.labels, second.labels]))


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
