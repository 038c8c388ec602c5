"""What tests of training share: a few ordinary steps, and a pair of an optimized model and its reference."""

from __future__ import annotations

from typing import Any

import torch
from reference import compile_reference, optimized
from small_models import Tiny, tokens


def train(model, optimizer, numbers) -> list[float]:
    """Ordinary steps on batch 0, 1, ...; returns the losses."""
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        loss = model(*tokens(number))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CLOSED_OF_ONE = ("blocks.0.qkv.weight", "blocks.0.norm2.weight", "blocks.0.down.weight", "embed.weight")
CLOSED_OF_TWO = ("blocks.0.qkv.weight", "blocks.1.*", "embed.weight")


def one_block() -> Tiny:
    return Tiny(depth=1)


def pair(*, closed: tuple[str, ...] | None = None, make=one_block, **settings: Any):
    """(optimized model, its session, compiled reference, its model); `closed` units are pinned, all others open."""
    if closed is None:
        closed = CLOSED_OF_ONE if make is one_block else CLOSED_OF_TWO
    model, session = optimized(make(), **{"preset": "exact", "scheduler": "none", **settings})
    if closed:
        session.freeze(closed)
    reference = make()
    return model, session, compile_reference(reference), reference


def grads_of(model) -> dict[str, torch.Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


class Skipped(Tiny):
    """A graph break inside a loop: dynamo runs this function eagerly and compiles the blocks, all with one graph."""

    def features(self, data):
        x = self.embed(data)
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x
