"""``slimfit_fx::grouped_weight_gradient(x, g, ends, turned)``: the gradients of the matrices of all experts.

Rows of ``x`` (tokens, inputs) and of ``g`` (tokens, outputs) are sorted by expert, and those of expert ``e`` end before
row ``ends[e]``; ``ends`` holds integers. Returns ``x[rows].T @ g[rows]`` for each expert, (experts, inputs, outputs),
and zeros for one without rows. ``turned``: each matrix lies in memory column by column, as those of experts do that are
kept as (experts, outputs, inputs). See passes/split_gradients.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slimfit_fx", "FRAGMENT")
_LIBRARY.define(
    "grouped_weight_gradient(Tensor x, Tensor g, Tensor ends, bool turned) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def _grouped_weight_gradient(x: Tensor, g: Tensor, ends: Tensor, turned: bool) -> Tensor:
    result = _empty(x, g, ends, turned)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            torch.mm(x[begin:end].T, g[begin:end], out=result[expert])
            begin = end
        else:
            result[expert].zero_()
    return result


def _empty(x: Tensor, g: Tensor, ends: Tensor, turned: bool) -> Tensor:
    experts, inputs, outputs = ends.shape[0], x.shape[1], g.shape[1]
    if turned:
        return x.new_empty((experts, outputs, inputs)).permute(0, 2, 1)
    return x.new_empty((experts, inputs, outputs))


_LIBRARY.impl("grouped_weight_gradient", _grouped_weight_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_weight_gradient", _empty, "Meta")
