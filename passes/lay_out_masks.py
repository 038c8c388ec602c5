"""Let attention's backward read a mask where it lies, instead of a copy for every head.

::

    m = where(allowed, 0, -inf)                  (b, 1, n, n), computed again in backward
    dq = attention_backward(g, q, k, v, expand(m, (b, h, n, n)), ...)
    ->
    dq = attention_backward(g, q, k, v, expand(laid_out(m), (b, h, n, n)), ...)

A compiler hands an operator that it did not write operands that lie in memory. What is pointwise and then expanded it
computes in the expanded shape: scores for every head and pair of tokens, as many bytes as attention without a fused
kernel would take (torch/_inductor/lowering.py has an exception for attention's forward only). ``laid_out`` makes the
value stand in memory before it is expanded.
"""

from __future__ import annotations

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.insert_gates import LAID_OUT


def lay_out_masks(backward: fx.GraphModule) -> int:
    """Pin what attention's backward reads expanded. Returns how many values were pinned.

    Leaves alone what lies in memory anyway: inputs of the graph, and what no pointwise kernel makes.
    """
    graph, pinned = backward.graph, dict[fx.Node, fx.Node]()
    for node in list(graph.nodes):
        for operand in node.all_input_nodes if _is_attention(node) else ():
            source = operand.args[0] if _repeats(operand) else None
            if isinstance(source, fx.Node) and ops.is_cheap(ops.view_base(source)):
                pinned[source] = pinned.get(source) or _pin(graph, source)
                operand.args = (pinned[source], *operand.args[1:])
    if pinned:
        graph.lint()
        backward.recompile()
    return len(pinned)


def _is_attention(node: fx.Node) -> bool:
    name = ops.op_name(node) if node.op == "call_function" else ""
    return name.startswith("_scaled_dot_product") and name.endswith("backward")


def _repeats(node: fx.Node) -> bool:
    """Whether ``node`` shows what it is a view of several times over, and nothing pinned it yet."""
    if node.op != "call_function" or node.target is not torch.ops.aten.expand.default:
        return False
    value, source = node.meta["val"], node.args[0]
    is_pinned = isinstance(source, fx.Node) and source.target is LAID_OUT
    return not is_pinned and any(s == 0 and n != 1 for s, n in zip(value.stride(), value.shape, strict=True))


def _pin(graph: fx.Graph, source: fx.Node) -> fx.Node:
    with graph.inserting_after(source):
        made = graph.call_function(LAID_OUT, (source,))
    made.meta = {"val": source.meta["val"], "eager_input_vals": ((source.meta["val"],), {})}
    return made
