"""The memory-efficient attention of a GPU on a CPU, which draws its dropout itself and gives the seed.

Seeds are numbers in order. ``replay`` makes a call on the whole batch drop what calls on tiles have dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

FORWARD = torch.ops.aten._scaled_dot_product_efficient_attention.default
BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


class Kernel:
    """Both kernels. ``drawn``: (seed, for how many examples), in order."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int]] = []
        self._numbers = itertools.count(1)
        self._parts: dict[int, list[int]] = {}
        self._replayed: list[tuple[int, int]] = []

    def replay(self, drawn: Sequence[tuple[int, int]]) -> None:
        """Let the next calls drop what was drawn for as many examples as they see."""
        self._replayed = list(drawn)

    def _seed(self, examples: int) -> int:
        number, parts, missing = next(self._numbers), list[int](), examples
        while self._replayed and missing:
            seed, count = self._replayed.pop(0)
            parts, missing = [*parts, seed], missing - count
        self._parts[number] = parts or [number]
        self.drawn.append((number, examples))
        return number

    def _kept(self, probabilities: Tensor, seed: int, rate: float) -> Tensor:
        """What each probability is multiplied by."""
        if rate == 0.0:
            return torch.ones_like(probabilities)
        seeds = self._parts[seed]
        masks = [_mask(part, number, rate) for part, number in zip(probabilities.chunk(len(seeds)), seeds, strict=True)]
        return torch.cat(masks)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: bool, rate: float = 0.0,
        causal: bool = False, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(out, logsumexp, seed, offset) as the operator gives them."""
        scores = _scores(query, key, bias, causal, scale)
        seed = self._seed(query.shape[0]) if rate else 0
        probabilities = scores.softmax(-1)
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        out.copy_((probabilities * self._kept(probabilities, seed, rate)) @ value)
        length = query.shape[2]
        sums = F.pad(scores.logsumexp(-1), (0, math.ceil(length / 32) * 32 - length)) if lse else scores.new_empty(0)
        return out, sums, torch.tensor(seed), torch.tensor(0)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        seed: Tensor, offset: Tensor, rate: float, wanted: Any, causal: bool = False, *, scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Gradients of query, key and value."""
        factor = scale or query.shape[-1] ** -0.5
        probabilities = _scores(query, key, bias, causal, scale).softmax(-1)
        kept = self._kept(probabilities, int(seed), rate)
        of_kept = grad @ value.transpose(-1, -2) * kept
        of_scores = probabilities * (of_kept - (of_kept * probabilities).sum(-1, keepdim=True))
        found = (of_scores @ key * factor, of_scores.transpose(-1, -2) @ query * factor,
                 (probabilities * kept).transpose(-1, -2) @ grad)  # fmt: skip
        made = [torch.empty_strided(t.shape, _strides(t)).copy_(f) for t, f in zip((query, key, value), found)]  # noqa: B905
        return made[0], made[1], made[2], None


def _strides(like: Tensor) -> tuple[int, ...]:
    """The layout in which the gradient of ``like`` comes: (batch, length, heads, width) in memory."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).stride()


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores if bias is None else scores + bias


def _mask(like: Tensor, seed: int, rate: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=generator) >= rate) / (1 - rate)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention`` by these kernels."""
    assert not enable_gqa
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -1e4)
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    operands = (query, key, value, attn_mask)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*operands, True, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def drawing() -> Iterator[Kernel]:
    """Let attention run on these kernels, here on a CPU."""
    kernel, library = Kernel(), torch.library.Library("aten", "IMPL")
    library.impl(FORWARD, kernel.forward, "CPU")
    library.impl(BACKWARD, kernel.backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield kernel
    library._destroy()
