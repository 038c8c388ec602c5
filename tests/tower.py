"""A small model with a norm, a dynamic activation, a GELU, dropout and four gates: Inductor compiles it soon."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class Tower(nn.Module):
    """``forward`` returns a loss. What enters ``mid`` serves the gradient of its weight only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.mid, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.mid(self.up(self.norm(x)))), 0.1, self.training)
        return self.down(hidden).float().square().mean()


def rows(count: int = 8, seed: int = 0) -> tuple[Tensor]:
    """A batch, without touching the global random state."""
    return (torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)),)
