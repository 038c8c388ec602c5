"""Give the gradient of a weight an operator of its own where one operator makes several gradients at once.

::

    both = grouped_mm_fallback_backward(x, w, ends, g)      dx = grouped_mm_fallback(g, w.permute(0, 2, 1), ends)
    dx, dw = both[0], both[1]                           ->  dw = grouped_weight_gradient(x, g, ends)

What is behind the gate of ``w`` can then be skipped, and ``x`` dropped, while ``dx`` is always needed. These are the
products of a mixture of experts in transformers that is not in bf16 throughout; its operator computes both gradients
apart, expert by expert, so that neither products nor bits change. On a GPU each of the two waits for ``ends``, as the
one did. (``convolution_backward`` makes several gradients, too. Its parts would have to be compiled inside a branch for
layouts that the compiler has not chosen yet.)
"""

from __future__ import annotations

import torch
from torch import fx

import slimfit_fx.runtime.grouped  # noqa: F401  (registers an operator)
from slimfit_fx.graph import ops

_INPUT, _WEIGHT = 0, 1
"""Places among the results."""


def split_gradients(module: fx.GraphModule) -> int:
    """Split what can be split in a joint graph. Returns the number of operators."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and ops.op_name(node) == "grouped_mm_fallback_backward":
            count += _split_grouped_product(module.graph, node)
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def _split_grouped_product(graph: fx.Graph, node: fx.Node) -> bool:
    """False, and nothing changes, unless both gradients are read and lie in memory as the new operators make them."""
    read = {int(user.args[1]): user for user in node.users if ops.is_getitem(user) and user.users}  # type: ignore[arg-type]
    value, weight, ends, gradient = node.args
    dtypes = {n.meta["val"].dtype for n in (value, weight, gradient)}  # type: ignore[union-attr]
    if read.keys() != {_INPUT, _WEIGHT} or len(dtypes) > 1 or not read[_INPUT].meta["val"].is_contiguous():
        return False
    found = read[_WEIGHT].meta["val"]
    is_turned = not found.is_contiguous()
    if is_turned and not found.permute(0, 2, 1).is_contiguous():
        return False
    with graph.inserting_before(node):
        turned = graph.call_function(torch.ops.aten.permute.default, (weight, [0, 2, 1]))
        dx = graph.call_function(torch.ops.transformers.grouped_mm_fallback.default, (gradient, turned, ends))
        made = torch.ops.slimfit_fx.grouped_weight_gradient.default
        dw = graph.call_function(made, (value, gradient, ends, is_turned))
    turned.meta = {k: v for k, v in node.meta.items() if k != "eager_input_vals"}
    turned.meta["val"] = weight.meta["val"].permute(0, 2, 1)  # type: ignore[union-attr]
    for new, place in ((dx, _INPUT), (dw, _WEIGHT)):
        given = tuple(a.meta["val"] if isinstance(a, fx.Node) else a for a in new.args)
        new.meta = {**read[place].meta, "eager_input_vals": (given, {})}  # the compiler keeps to these strides
        read[place].replace_all_uses_with(new)
    return True
