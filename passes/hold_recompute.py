"""Tie decode and recompute to their place in backward, and let no decoded value outlive its reader.

::

    s = bmm(decode(q), decode(k)); ...; dk = bmm(ds, decode(q))      (one decode of q, alive in between)
    ->
    q1 = hold(q, g); s = bmm(decode(q1), ...); ...; q2 = hold(q, ds); dk = bmm(ds, decode(q2))

Every operator that materialises its operands (matrix products, fused attention) gets a decode of its own, and that
decode waits for the last gradient before it. Without the wait, Inductor fuses the recompute of all layers into one
kernel (they read the same attention mask) and all of them come back at once: the saved bytes fall and the physical peak
rises.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

import slimfit_fx.runtime.hold  # noqa: F401  (registers the operator)
from slimfit_fx.graph import ops
from slimfit_fx.passes.find_cones import tangent_fed

HOLD = torch.ops.slimfit_fx.hold.default
LONGEST_CHAIN = 40
"""A longer chain is not cloned per reader: it is no decode but a recompute, and costs."""


def hold_recompute(backward: fx.GraphModule, saved: Collection[fx.Node]) -> int:
    """Insert holds on ``saved`` (placeholders that are no inputs of the model). Returns how many were inserted."""
    graph = backward.graph
    fed = tangent_fed(graph)
    holdable, count = set(saved), 0
    token: fx.Node | None = None
    for node in list(graph.nodes):
        if not _materialises(node):
            continue
        if token is not None:
            count += _hold_operands(graph, node, token, fed, holdable)
        if node in fed and ops.is_tensor(node):
            token = node
    if count:
        graph.eliminate_dead_code()
        graph.lint()
        backward.recompile()
    return count


def _materialises(node: fx.Node) -> bool:
    """Operators that need their operands in memory: everything that is not cheap, and no branch of ours."""
    if node.op != "call_function" or ops.is_cheap(node) or node.target is HOLD:
        return False
    return not isinstance(node.target, torch._ops.HigherOrderOperator) and not ops.op_name(node).startswith(
        ("stash", "ghost")
    )


def _hold_operands(graph: fx.Graph, reader: fx.Node, token: fx.Node, fed: set[fx.Node], holdable: set[fx.Node]) -> int:
    chain = _decode_chain(reader, fed)
    leaves = {i for n in (*chain, reader) for i in n.all_input_nodes if i in holdable}
    if not leaves or any(n.target is HOLD for n in chain):
        return 0
    private = _is_private(chain, reader)
    env: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(reader):
        for leaf in sorted(leaves, key=lambda n: n.name):
            env[leaf] = graph.call_function(HOLD, (leaf, token))
            env[leaf].meta = {"val": leaf.meta["val"]}
    if private:
        for node in chain:
            reader.prepend(node)
            _reread(node, env)
    else:
        with graph.inserting_before(reader):
            for node in chain:
                env[node] = graph.node_copy(node, lambda n: env.get(n, n))
    _reread(reader, env)
    return len(leaves)


def _reread(node: fx.Node, env: dict[fx.Node, fx.Node]) -> None:
    node.args = fx.map_arg(node.args, lambda n: env.get(n, n))
    node.kwargs = fx.map_arg(node.kwargs, lambda n: env.get(n, n))


def _decode_chain(reader: fx.Node, fed: set[fx.Node]) -> list[fx.Node]:
    """Cheap nodes without a tangent that ``reader`` depends on, in graph order; empty when there are too many."""
    chain: set[fx.Node] = set()
    stack = list(reader.all_input_nodes)
    while stack:
        node = stack.pop()
        if (
            node.op == "call_function"
            and node not in fed
            and node not in chain
            and ops.is_cheap(node)
            and not ops.is_symbol(node)
        ):
            chain.add(node)
            stack.extend(node.all_input_nodes)
    if len(chain) > LONGEST_CHAIN:
        return []
    position = {n: i for i, n in enumerate(reader.graph.nodes)} if len(chain) > 1 else {}
    return sorted(chain, key=lambda n: position.get(n, 0))


def _is_private(chain: list[fx.Node], reader: fx.Node) -> bool:
    inside = {*chain, reader}
    return all(u in inside for n in chain for u in n.users)
