"""Between a compiled graph and its parameters: the gradient of a closed unit becomes None.

The compiled backward returns a ghost for a closed unit; nobody may read it, and autograd would. So each call passes its
parameters through one autograd node that forwards the gradients of open units and returns None for the others, by the
gates of its own forward. It also holds for units whose gradient could not be put behind a branch, and needs nothing
that compiling produced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GradGate(torch.autograd.Function):
    """Identity on the parameters; backward drops the gradients of the closed ones."""

    @staticmethod
    def forward(ctx: Any, is_open: tuple[bool, ...], *params: Tensor) -> tuple[Tensor, ...]:
        """``is_open[i]`` tells whether ``params[i]`` trains in this step."""
        ctx.is_open = is_open
        ctx.set_materialize_grads(False)
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pass on the gradients of what trains; None for the rest."""
        return (None, *(g if is_open else None for g, is_open in zip(grads, ctx.is_open, strict=True)))


def gate_gradients(params: list[Tensor], is_open: list[bool]) -> list[Tensor]:
    """The same parameters, whose gradients reach them only where ``is_open``."""
    return list(GradGate.apply(tuple(is_open), *params))
