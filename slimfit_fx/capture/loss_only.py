"""``outputs="loss"``: a training forward gives its loss; of other outputs that have a gradient, the shape alone.

::

    return loss, logits          ->          return loss        (and a tensor like logits without data)

A user output is alive through backward, is never encoded, and if nobody differentiates it autograd fills a gradient of
its size with zeros. The logits of a language model are the largest tensors of a step. Without them no kernel writes
them: tiles of the head make a part of them, and make it again for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimfit_fx.graph.joint import hint
from slimfit_fx.graph.symbols import symbols_of_layout

Compiled = Callable[..., Any]
WORTH_SAYING = 1 << 24
"""Bytes of outputs that a plan speaks of."""


@dataclass(frozen=True)
class _Shape:
    """An output that is left out: its place, and what it would be."""

    place: int
    val: Tensor
    """As dynamo saw it; sizes may be symbolic."""


@dataclass(frozen=True)
class LossOnly:
    """Which outputs of one graph are left out, and what its caller is given for them."""

    left_out: tuple[_Shape, ...]
    symbols: tuple[tuple[int, Any], ...]
    """(place among the arguments, symbol) of the sizes that are not plain numbers."""
    refusal: str = ""
    """Why none is, though it was asked for."""

    def drop(self, gm: fx.GraphModule) -> None:
        """Take them out of the outputs of ``gm``; what is computed for them only goes when it is traced."""
        (output,) = gm.graph.find_nodes(op="output")
        gone = {shape.place for shape in self.left_out}
        output.args = (tuple(value for place, value in enumerate(output.args[0]) if place not in gone),)
        gm.recompile()

    def filled(self, compiled: Compiled) -> Compiled:
        """``compiled``, of the graph without them, as the function that the caller of the whole graph expects."""
        if not self.left_out:
            return compiled

        def call(*args: Any) -> tuple[Any, ...]:
            found = list(compiled(*args))
            values = {symbol: int(args[place]) for place, symbol in self.symbols}
            for shape in self.left_out:
                found.insert(shape.place, _without_data(shape.val, values))
            return tuple(found)

        return call

    def describe(self) -> str:
        """For the plan."""
        if not self.left_out:
            return self.refusal
        return f"outputs beside the loss are left out: {len(self.left_out)}, {self._largest()}"

    def advise(self) -> str:
        """What to say of them where they were not asked to be left out; empty if they are small."""
        if sum(_nbytes(shape.val) for shape in self.left_out) < WORTH_SAYING:
            return ""
        return f'outputs beside the loss are held through backward, {self._largest()}: outputs="loss" leaves them out'

    def _largest(self) -> str:
        largest = max((shape.val for shape in self.left_out), key=_nbytes)
        return f"the largest of size ({', '.join(map(str, largest.shape))})"


NOTHING_LEFT_OUT = LossOnly((), ())


def find_loss_only(gm: fx.GraphModule, *, breaks: bool) -> LossOnly:
    """The outputs of dynamo's graph that are no loss; none of a graph behind which the forward ``breaks``.

    A loss is a single number that has a gradient. Where there is none, all outputs stay. So do those without a gradient
    (predictions, counters), and inputs.
    """
    if breaks:
        return LossOnly((), (), "all outputs stay: the forward goes on in another graph")
    (output,) = gm.graph.find_nodes(op="output")
    returned = list(enumerate(output.args[0]))
    trained = [(place, node, val) for place, node in returned if (val := _trained(node)) is not None]
    if not any(val.dim() == 0 for _, _, val in trained):
        return LossOnly((), (), "all outputs stay: none of them is a loss, a single number that has a gradient")
    known = {
        value.node.expr: place
        for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))
        if isinstance(value := node.meta.get("example_value"), torch.SymInt)
    }
    left_out = [_Shape(place, val) for place, _, val in trained if val.dim() and symbols_of_layout(val) <= known.keys()]
    wanted = set().union(*(symbols_of_layout(shape.val) for shape in left_out))
    return LossOnly(tuple(left_out), tuple((place, symbol) for symbol, place in known.items() if symbol in wanted))


def _trained(node: Any) -> Tensor | None:
    """The example value of an output that is computed and has a gradient."""
    val = node.meta.get("example_value") if isinstance(node, fx.Node) and node.op != "placeholder" else None
    return val if isinstance(val, Tensor) and val.requires_grad else None


def _nbytes(val: Tensor) -> int:
    return hint(val.numel()) * val.element_size()


def _without_data(val: Tensor, values: dict[Any, int]) -> Tensor:
    shape, stride = (_numbers(sizes, values) for sizes in (val.shape, val.stride()))
    return torch.empty_strided(shape, stride, dtype=val.dtype, device="meta")


def _numbers(sizes: Sequence[Any], values: dict[Any, int]) -> list[int]:
    return [int(size.node.expr.xreplace(values)) if isinstance(size, torch.SymInt) else int(size) for size in sizes]
