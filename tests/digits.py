"""scikit-learn's digits for tests that train to an accuracy: data, a small transformer, and its step peak.

One run's accuracy differs by half a point from machine to machine, as sums are rounded otherwise. So that a point is
more than that, 797 images are held out, training goes on until the accuracy hardly rises, and what is compared is the
mean over a few orders of the training images.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from effort import THOROUGH
from sklearn.datasets import load_digits
from small_models import Block
from torch import Tensor, nn
from torch.nn import functional as F

from slimfit_fx.runtime.measure import step_memory

PATCHES, PATCH, WIDTH, TRAIN = 4, 16, 32, 1000
EPOCHS, SIZE, RATE, ORDERS = 8, 200, 4e-3, range(3 if THOROUGH else 2)
_EARLY = 100  # images per step before the fine-tuning
STEPS = EPOCHS * TRAIN // SIZE
OURS = {"executor": "interpreter", "min_bytes": 256, "freeze_rate": 0.5}


class Reader(nn.Module):
    """A transformer over 4x4 patches. ``forward(pixels, labels)`` returns {"loss", "logits"}."""

    def __init__(self, depth: int = 2, width: int = WIDTH, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(PATCH, width)
        self.place = nn.Parameter(torch.randn(PATCHES, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, 4, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(pixels) + self.place
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x).mean(dim=1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def arrays() -> tuple[Tensor, Tensor]:
    """All images as patches (1797, 4, 16) in [0, 1] and labels (1797,), in a random order: writers lie in a row."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).reshape(-1, 2, 4, 2, 4).transpose(2, 3)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels.reshape(-1, PATCHES, PATCH)[order] / 16, torch.tensor(digits.target)[order]


def batches(epochs: int, size: int = SIZE, seed: int = 0, images: int = TRAIN) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of the first ``images`` training images."""
    pixels, labels = arrays()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(images, generator=generator)
        for chosen in order.split(size):
            yield pixels[chosen], labels[chosen]


@functools.cache
def _pretrained() -> Reader:
    model = Reader(depth=3, dropout=0.1)
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-2), 40 * (TRAIN // 2 // _EARLY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for pixels, labels in batches(40, _EARLY, images=TRAIN // 2):
        optimizer.zero_grad()
        model(pixels, labels)["loss"].backward()
        optimizer.step()
        schedule.step()
    return model


def pretrained() -> Reader:
    """A model that has learned from half of the training images, to be fine-tuned on all of them (a fresh copy)."""
    return copy.deepcopy(_pretrained()).train()


def accuracy(model: nn.Module) -> float:
    """Share of the held-out images that the model reads right."""
    pixels, labels = arrays()
    model.eval()
    with torch.no_grad():
        return (model(pixels[TRAIN:])["logits"].argmax(-1) == labels[TRAIN:]).float().mean().item()


def mean_accuracy(run: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
    """Mean accuracy and largest peak of ``run`` over the ``ORDERS`` that it is given."""
    found = [run(order) for order in ORDERS]
    return sum(a for a, _ in found) / len(found), max(p for _, p in found)


def peak(model: nn.Module, call: Callable[..., Any] | None = None, size: int = SIZE) -> int:
    """Step peak in bytes on a batch of the first images, by the allocator's events, without an optimizer step.

    A ``size`` of its own would compile the model again, with symbolic sizes.
    """
    pixels, labels = arrays()
    model.train()
    model.zero_grad()
    found = step_memory(lambda: (call or model)(pixels[:size], labels[:size])["loss"], lambda loss: loss.backward())
    model.zero_grad()
    return found.peak_bytes
