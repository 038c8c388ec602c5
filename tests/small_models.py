"""Models of a few thousand parameters for tests that train: their batches, losses and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LENGTH, BATCH, VOCABULARY, CLASSES = 16, 2, 8, 4, 31, 5


class Block(nn.Module):
    """A transformer block: fused q/k/v, SDPA, GELU, dropout in three places."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.proj(attended), rate)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), rate)


class Tiny(nn.Module):
    """Embedding, blocks, LayerNorm, head. ``forward(tokens, labels)`` returns the loss, else the logits."""

    def __init__(self, depth: int = 2, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.train()

    def features(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(self.features(tokens)).mean(dim=1))
        return logits if labels is None else F.cross_entropy(logits.float(), labels)


def tokens(seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """A batch of tokens (batch, length) and labels (batch,), without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return data, torch.randint(CLASSES, (batch,), generator=generator)


def optimizer_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """A copy of what the optimizer remembers of ``param``."""
    state = optimizer.state.get(param, {})
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two optimizer states are equal bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )
