"""Run decode and recompute as late as possible in backward.

::

    x = decode(q); y = decode(r); a = f(g, x); b = h(a, y)   ->   x = decode(q); a = f(g, x); y = decode(r); b = h(a, y)

What no tangent reaches could run at once when backward starts, and would then sit in memory until its reader comes: the
saved bytes fall and the physical peak rises. Moves nodes only; nothing is added or removed.
"""

from __future__ import annotations

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.find_cones import tangent_fed


def sink_backward(backward: fx.GraphModule) -> int:
    """Move every node that no tangent reaches to just before its first reader. Returns how many moved.

    Leaves a graph alone that writes to its inputs: a reader must not come to stand behind the writer.
    """
    graph = backward.graph
    before = list(graph.nodes)
    if any(writes(node) for node in before):
        return 0
    fed = tangent_fed(graph)
    movable = {n for n in before if n.users and n not in fed and _may_move(n)}
    waiting = set(movable)
    after = [n for node in before if node not in movable for n in _behind_its_inputs(node, waiting)]
    moved = sum(new is not old and new in movable for new, old in zip(after, before, strict=True))
    if moved:
        for node in after:
            if node.op not in ("placeholder", "output"):
                graph.output_node().prepend(node)
        graph.lint()
        backward.recompile()
    return moved


def writes(node: fx.Node) -> bool:
    """Whether ``node`` changes memory that it is given."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _may_move(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and not ops.is_random(node))


def _behind_its_inputs(node: fx.Node, waiting: set[fx.Node]) -> list[fx.Node]:
    """``node`` and, ahead of it, all ``waiting`` nodes that it depends on; takes them out of ``waiting``."""
    order: list[fx.Node] = []
    stack = [(node, False)]
    while stack:
        current, inputs_done = stack.pop()
        if inputs_done:
            order.append(current)
        elif current is node or current in waiting:
            waiting.discard(current)
            stack.append((current, True))
            stack.extend((wanted, False) for wanted in reversed(current.all_input_nodes))
    return order
