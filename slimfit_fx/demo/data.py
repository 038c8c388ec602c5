"""Labelled examples as tensors, the batches drawn from them, and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Keyword arguments of a model's forward, ``labels`` among them."""


@dataclass(frozen=True)
class Examples:
    """``inputs``: name of an argument -> (examples, ...); ``labels``: (examples,) int64."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """The examples at ``index`` (a slice, positions or a mask), as one batch."""
        return {**{name: value[index] for name, value in self.inputs.items()}, "labels": self.labels[index]}

    def below(self, label: int) -> Examples:
        """Those whose label is less than ``label``."""
        kept = self.labels < label
        return Examples({name: value[kept] for name, value in self.inputs.items()}, self.labels[kept])


def batches(examples: Examples, size: int, *, seed: int) -> Iterator[Batch]:
    """Yield batches of ``size`` without end: epochs in an order drawn from ``seed``, less incomplete last batches.

    The same ``seed`` gives the same batches, to the bit.

    Raises:
        ValueError: fewer than ``size`` examples.
    """
    if len(examples) < size:
        raise ValueError(f"batch must be at most the number of examples, {len(examples)}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        for chosen in order.split(size)[: len(examples) // size]:
            yield examples[chosen]


def digits(seed: int = 0) -> tuple[Examples, Examples]:
    """Return scikit-learn's digits as (train, test), two thirds and one third of each class.

    1,797 real images in all, (1, 8, 8) float32 in [-1, 1], of digits that 43 people wrote (UCI, "Optical Recognition of
    Handwritten Digits"). They come with scikit-learn: nothing is downloaded.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    train, test = train_test_split(
        torch.arange(len(found.target)).numpy(), test_size=1 / 3, stratify=found.target, random_state=seed
    )
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.int64)
    return Examples({"pixel_values": images[train]}, labels[train]), Examples(
        {"pixel_values": images[test]}, labels[test]
    )
