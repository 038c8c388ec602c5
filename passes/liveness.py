"""Liveness: which gradients does each value still serve?

Walk backward from the gradients. A node serves the union of what its readers serve; a gradient of a gated unit
serves that gate, any other gradient serves STATIC. A saved value is *dynamic* when its backward readers serve gated
gradients only: with all those gates closed nobody needs it.

::

    dW = mm(g.t(), x)        serves {gate of W}        ->  x is dynamic, if nothing else reads it
    dx = mm(g, W)            serves {STATIC, ...}      ->  g is static

Tags only: ``meta["slimfit_serves"]`` (a frozenset of gate numbers and STATIC). Holds for any operator, with no pattern
per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from slimfit_fx.graph.joint import STATIC, JointGraph, backward_closure, forward_needs

SERVES = "slimfit_serves"
NONE: frozenset[int] = frozenset()


def served_gates(graph: fx.Graph, grads: Sequence[tuple[fx.Node, int]]) -> dict[fx.Node, frozenset[int]]:
    """For every node of ``graph`` the gates of the gradients that depend on it.

    ``grads`` lists (gradient node, gate or STATIC); one node may be the gradient of several parameters.
    """
    own: dict[fx.Node, set[int]] = {}
    for node, gate in grads:
        own.setdefault(node, set()).add(gate)
    serves: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            continue
        reached = set(own.get(node, ()))
        for user in node.users:
            reached |= serves.get(user, NONE)
        serves[node] = frozenset(reached)
    return serves


def tag_liveness(joint: JointGraph) -> int:
    """Tag every value of the joint graph with the gates that its *backward readers* serve. Returns the number of tags.

    For a forward value only readers that run in backward count: that a later forward node reads it too
    keeps it alive in forward, not until backward.
    """
    grads = [(n, g) for n, g in zip(joint.grad_nodes(), joint.grads, strict=True) if isinstance(n, fx.Node)]
    serves = served_gates(joint.graph, grads)
    closure, forward = backward_closure(joint), forward_needs(joint)
    count = 0
    for node in joint.graph.nodes:
        if node.op == "output":
            continue
        if node in closure or node not in forward:
            tag = serves[node]
        else:
            readers = [u for u in node.users if u.op != "output" and (u in closure or u not in forward)]
            tag = frozenset().union(*(serves[u] for u in readers)) if readers else NONE
        node.meta[SERVES] = tag
        count += 1
    return count


def is_dynamic(serves: frozenset[int]) -> bool:
    """Whether a value with this tag is needed for gated gradients only."""
    return bool(serves) and STATIC not in serves
