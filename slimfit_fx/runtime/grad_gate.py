"""Between a compiled graph and its parameters: the gradient of a closed unit becomes None.

The compiled backward returns a ghost for a closed unit; nobody may read it, and autograd would. So each call passes its
parameters through one autograd node that forwards the gradients of open units and returns None for the others, by the
gates of its own forward. It also holds for units whose gradient could not be put behind a branch, and needs nothing
that compiling produced.

What a graph break leaves to eager execution passes through no such node: ``drop_eager_gradients`` drops the gradient of
a closed unit there as soon as autograd has accumulated it, so that nothing behind backward sees it (clipping, for one).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from slimfit_fx.runtime.gates import GateTable


class GradGate(torch.autograd.Function):
    """Identity on the parameters; backward drops the gradients of the closed ones."""

    @staticmethod
    def forward(ctx: Any, gates: GateTable, is_open: tuple[bool, ...], *params: Tensor) -> tuple[Tensor, ...]:
        """``is_open[i]`` tells whether ``params[i]`` trains in this step."""
        ctx.gates, ctx.is_open, ctx.params = gates, is_open, params
        ctx.set_materialize_grads(False)
        return params  # autograd makes views of them

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pass on the gradients of what trains; None for the rest."""
        ctx.gates.note_decided(ctx.params)
        return (None, None, *(g if is_open else None for g, is_open in zip(grads, ctx.is_open, strict=True)))


def gate_gradients(gates: GateTable, params: list[Tensor], is_open: list[bool]) -> list[Tensor]:
    """The same parameters, whose gradients reach them only where ``is_open``."""
    return list(GradGate.apply(gates, tuple(is_open), *params))


def drop_eager_gradients(gates: GateTable, name: str, param: Tensor) -> RemovableHandle:
    """Drop gradients of ``param``, of unit ``name``, that come past every graph while the unit is closed."""
    table = weakref.ref(gates)

    def drop(param: Tensor) -> None:
        gates = table()
        if gates is not None and not gates.is_open(name) and not gates.take_decided(name):
            param.grad = None

    return param.register_post_accumulate_grad_hook(drop)
