"""Run a product of backward as late as its first reader allows, where that makes room for what runs in between.

::

    da = mm(g, w); h = decode(...); dw = cond(gate, ..., (g, h)); dh = mul(da, gelu'(h))
    ->
    h = decode(...); dw = cond(gate, ..., (g, h)); da = mm(g, w); dh = mul(da, gelu'(h))

Autograd computes the gradient of a layer's input before that of its weight, so that the widest values of a layer (of a
feed-forward block: its gradient, what is decoded or recomputed for it, and what the weight's gradient is made of) are
all there at once. A product is moved only if what it reads and is kept longer for it is no larger than what it makes,
and than what is made right behind it: then no moment of the step takes more than before. Moves nodes only.
"""

from __future__ import annotations

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.passes.find_cones import tangent_fed
from slimfit_fx.passes.sink_backward import writes


def delay_products(backward: fx.GraphModule) -> int:
    """Move products to just before their first readers. Returns how many moved.

    Leaves a graph alone that writes to its inputs: a reader must not come to stand behind the writer.
    """
    graph = backward.graph
    if any(writes(node) for node in graph.nodes):
        return 0
    fed = tangent_fed(graph)
    moved = 0
    for node in reversed(list(graph.nodes)):
        if node in fed and ops.is_matrix_product(node) and ops.is_tensor(node):
            moved += _delay(node)
    if moved:
        graph.lint()
        backward.recompile()
    return moved


def _delay(product: fx.Node) -> bool:
    group, between, reader = _until_read(product)
    place = reader
    while between and _waits_too(between[-1], reader):
        place = between.pop()
    if reader.op == "output" or not any(node.op == "call_function" and not ops.is_symbol(node) for node in between):
        return False
    kept = sum(map(nbytes, _kept_longer(product, place)))
    if kept > min(nbytes(product), _made_by(place)):
        return False
    for node in group:
        place.prepend(node)
    return True


def _until_read(product: fx.Node) -> tuple[list[fx.Node], list[fx.Node], fx.Node]:
    """(``product`` and its views, what else runs before it is read, its first reader)."""
    group, between = [product], list[fx.Node]()
    node = product.next
    while True:
        if ops.is_view(node) and node.args[0] in group:
            group.append(node)
        elif node.op == "output" or any(i in group for i in node.all_input_nodes):
            return group, between, node
        else:
            between.append(node)
        node = node.next


def _waits_too(node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``node`` is a product that waits for the same reader, or a view of one."""
    product = ops.view_base(node)
    return ops.is_matrix_product(product) and _until_read(product)[2] is reader


def _made_by(node: fx.Node) -> int:
    """Bytes that ``node`` makes; none if it is no operator with one result in memory of its own."""
    return nbytes(node) if ops.is_tensor(node) and not ops.is_view(node) else 0


def _kept_longer(product: fx.Node, place: fx.Node) -> list[fx.Node]:
    """What ``product`` reads and nobody else reads at ``place`` or behind it.

    Parameters and inputs of the model stay anyway.
    """
    found = []
    for value in dict.fromkeys(ops.view_base(i) for i in product.all_input_nodes if ops.is_tensor(i)):
        stays = value.op != "call_function" and "primals" in str(value.target)
        if not stays and not any(user is place or place < user for user in _users(value)):
            found.append(value)
    return found


def _users(value: fx.Node) -> list[fx.Node]:
    """Who reads ``value``, also through views."""
    stack, found = [value], []
    while stack:
        value = stack.pop()
        for user in value.users:
            found.append(user)
            if ops.is_view(user) and user.args[0] is value:
                stack.append(user)
    return found
