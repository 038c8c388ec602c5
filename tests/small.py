"""Models that are small enough to be planned many times in one test; one still has what presets differ in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """An embedding, one feed-forward block with LayerNorm, GELU and dropout, a head. Tokens are (batch, length)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(100, width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def small_batch(batch: int = 24, length: int = 48) -> tuple[Tensor, Tensor]:
    """Tokens (batch, length) and labels (batch,), int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, (batch, length), generator=generator), torch.randint(5, (batch,), generator=generator)


class Smaller(nn.Module):
    """Two layers with a GELU between them: code for its kernels is written within a second or two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 128), nn.Linear(128, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.up(x))), labels)


def smaller_batch(count: int) -> tuple[Tensor, Tensor]:
    """Vectors (count, 16) and labels (count,)."""
    return torch.zeros(count, 16), torch.zeros(count, dtype=torch.long)
