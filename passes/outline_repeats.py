"""Compile what repeats once: identical blocks become calls of one subgraph.

::

    a1 = f(x, w0); x1 = g(a1); a2 = f(x1, w1); x2 = g(a2)   ->   x1 = block(x, w0); x2 = block(x1, w1)

``block`` is an ``invoke_subgraph``, which Inductor turns into one function that is called for every layer: the time to
compile no longer grows with depth. What differs between layers - parameters, gates, saved values, random seeds - are
the block's operands.

A block returns memory of its own only: a compiler that does not look inside must not take two of its results, or a
result and an operand, for separate memory when they are not. A view that would break this is made behind the call.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.canonical import graph_text, value_text
from slimfit_fx.graph.repeats import Window, arguments_of, cuts, find_run
from slimfit_fx.graph.retrace import survives_pickling
from slimfit_fx.graph.symbols import missing_symbols

log = logging.getLogger("slimfit_fx.passes")
INVOKE = torch.ops.higher_order.invoke_subgraph
FEWEST_SAVED = 64
"""Nodes that outlining must spare the compiler: a call has a price too."""
_CUTS_TRIED = 8
_MAY_ALIAS = {"_unsafe_view", "reshape", "contiguous", "_reshape_alias"}


@dataclass(frozen=True)
class Block:
    """Windows that do the same, and what crosses their borders.

    ``inputs[j][w]`` is operand ``j`` of window ``w``. ``slots`` tells, for each argument from outside in the order in
    which the nodes have them, which operand it is: two may be one node in one window and not in another. ``results``
    are places of nodes within a window, in order; ``replayed`` maps the place of a view to the places of the views that
    lead to it from ``results`` or an operand.
    """

    windows: tuple[Window, ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    slots: tuple[int, ...]
    results: tuple[int, ...]
    replayed: dict[int, tuple[int, ...]]


def outline_repeats(module: fx.GraphModule, *, spare_kernels: bool = False) -> int:
    """Replace repeated stretches of ``module`` by calls of blocks. Returns how many calls there are now.

    Blocks end where the fewest bytes cross their border; ``spare_kernels``: where it cuts through no kernel, if it can.
    That is faster, and in a forward it takes no more memory: what crosses is there anyway. In a backward it may.
    """
    graph = module.graph
    todo = list(stretches(graph))
    calls, blocks = 0, 0
    while todo:
        nodes = todo.pop()
        block = _find_block(graph, nodes, spare_kernels)
        if block is None:
            continue
        replace(module, block, body_of(module, block), f"block_{blocks}")
        calls, blocks = calls + len(block.windows), blocks + 1
        first, last = nodes.index(block.windows[0][0]), nodes.index(block.windows[-1][-1])
        todo += [nodes[:first], nodes[last + 1 :]]
    if calls:
        _seeds_by_view(graph)
        graph.lint()
        module.recompile()
    return calls


def stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Nodes in order, cut where nothing may move; seeds, which differ from layer to layer, are no part of it."""
    stretch: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or _is_seed(node):
            continue
        if _keeps_its_place(node):
            yield stretch
            stretch = []
        else:
            stretch.append(node)
    yield stretch


def _is_seed(node: fx.Node) -> bool:
    return ops.op_name(node) == "inductor_lookup_seed"


def _keeps_its_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    draws_seeds = ops.op_name(node) in {"inductor_seeds", "inductor_seed"}
    return draws_seeds or node.target is INVOKE or (schema is not None and schema.is_mutable)


# -- deciding ----------------------------------------------------------------------------------------------------------
def _find_block(graph: fx.Graph, nodes: Sequence[fx.Node], spare_kernels: bool) -> Block | None:
    run = find_run(nodes, fewest_saved=FEWEST_SAVED)
    if run is None:
        return None
    for windows in itertools.islice(cuts(nodes, run, spare_kernels=spare_kernels), _CUTS_TRIED):
        block = block_of(graph, windows)
        if isinstance(block, Block):
            return block
        log.debug("a repeated stretch of %d nodes stays as it is: %s", len(windows[0]), block)
    return None


def block_of(graph: fx.Graph, windows: Sequence[Window]) -> Block | str:
    """The block that these windows make, or the reason why they make none."""
    insides = [set(window) for window in windows]
    outside = [_outside(window, inside) for window, inside in zip(windows, insides, strict=True)]
    read_at = list(zip(*outside, strict=True))
    inputs = tuple(dict.fromkeys(read_at))
    slots = tuple(inputs.index(nodes) for nodes in read_at)
    for operand in inputs:
        if len({value_text(n.meta.get("val")) for n in operand}) > 1:
            return f"operand {operand[0].name} has another shape or layout elsewhere"
        if not (ops.is_tensor(operand[0]) or ops.is_symbol(operand[0])):
            return f"operand {operand[0].name} is neither a tensor nor a size"
    firsts = [operand[0] for operand in inputs]
    extra, unknown = missing_symbols(graph, firsts, [*firsts, *windows[0]])
    if unknown:
        return f"no input brings the symbol {min(map(str, unknown))}"
    inputs += tuple((symbol,) * len(windows) for symbol in extra)
    escapes = [
        {place for place, node in enumerate(window) if not inside.issuperset(node.users)}
        for window, inside in zip(windows, insides, strict=True)
    ]
    read = sorted(set().union(*escapes))
    exits = _exits(windows[0], read)
    if isinstance(exits, str):
        return exits
    return Block(tuple(windows), inputs, slots, *exits) if exits[0] else "it makes nothing but views"


def _outside(window: Window, inside: set[fx.Node]) -> list[fx.Node]:
    return [argument for node in window for argument in arguments_of(node) if argument not in inside]


def _exits(window: Window, read: list[int]) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]] | str:
    """``results`` and ``replayed`` of a block whose nodes at the places ``read`` are read by others."""
    place = {node: index for index, node in enumerate(window)}
    read_of: dict[fx.Node, list[int]] = {}
    for index in read:
        if not ops.is_tensor(window[index]):
            return f"result {window[index].name} is no tensor"
        read_of.setdefault(owner(window[index]), []).append(index)
    results: list[int] = []
    replayed: dict[int, tuple[int, ...]] = {}
    for source, readers in read_of.items():
        if source in place and len(readers) == 1:
            results += readers
            continue
        if source in place:
            results.append(place[source])
        for reader in readers:
            if window[reader] is source:
                continue
            chain = _views_between(source, window[reader], place)
            if chain is None:
                return f"view {window[reader].name} cannot be made outside"
            replayed[reader] = chain
    return tuple(results), replayed


def owner(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may share."""
    while node.op == "call_function":
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return node
        if ops.is_getitem(node):
            if not ops.is_view(source):
                return node
        elif not (ops.is_view(node) or ops.op_name(node) in _MAY_ALIAS):
            return node
        node = source
    return node


def _views_between(source: fx.Node, node: fx.Node, place: dict[fx.Node, int]) -> tuple[int, ...] | None:
    """Places of the nodes from ``source`` (left out) to ``node``; None if one of them reads more than its source."""
    chain: list[int] = []
    while node is not source:
        if len(arguments_of(node)) != 1 or node not in place:
            return None
        chain.append(place[node])
        node = cast(fx.Node, node.args[0])
    return tuple(reversed(chain))


# -- acting ------------------------------------------------------------------------------------------------------------
def replace(module: fx.GraphModule, block: Block, body: fx.GraphModule, name: str) -> None:
    """Put calls of ``body``, under this name, in place of the windows of ``block``."""
    identifier = identifier_of(name, body.graph)
    module.add_submodule(name, body)
    _seeds_first(module.graph)
    current: dict[fx.Node, fx.Node] = {}
    for number in range(len(block.windows)):
        _call_block(module.graph, block, number, (name, identifier), current)


def identifier_of(name: str, graph: fx.Graph) -> str:
    """What tells a block from every other one."""
    return f"{name}_{hashlib.sha256(graph_text(graph.nodes).encode()).hexdigest()[:16]}"


def body_of(module: fx.GraphModule, block: Block) -> fx.GraphModule:
    """What a window of ``block`` does, on operands."""
    graph, env = fx.Graph(), {}
    window = block.windows[0]
    submodules: dict[str, torch.nn.Module] = {}
    operands = []
    for index, nodes in enumerate(block.inputs):
        operands.append(graph.placeholder(f"operand_{index}"))
        operands[-1].meta = {"val": nodes[0].meta["val"]}
    slots = iter(block.slots)

    def inside(node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            if node not in env:
                submodules[str(node.target)] = getattr(module, str(node.target))
                env[node] = graph.get_attr(str(node.target))
            return env[node]
        return env[node] if node in env else operands[next(slots)]

    for node in window:
        env[node] = graph.node_copy(node, inside)
    graph.output(tuple(env[window[place]] for place in block.results))
    inside_block = fx.GraphModule(submodules, graph)
    survives_pickling(inside_block)
    return inside_block


def _seeds_first(graph: fx.Graph) -> None:
    """Look up each seed right behind where all were drawn: blocks take theirs as operands."""
    last: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if _is_seed(node):
            source = cast(fx.Node, node.args[0])
            last.get(source, source).append(node)
            last[source] = node


def _seeds_by_view(graph: fx.Graph) -> None:
    """Hand seeds to blocks as views of where all were drawn; to look one up is a kernel of its own.

    ::

        seed = inductor_lookup_seed(seeds, 3); y = block(x, seed)   ->   seed = select(seeds, 0, 3); y = block(x, seed)
    """
    for node in list(graph.nodes):
        if not _is_seed(node) or any(user.target is not INVOKE for user in node.users):
            continue
        source, number = node.args
        with graph.inserting_before(node):
            view = graph.call_function(torch.ops.aten.select.int, (source, 0, number))
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view)
        graph.erase_node(node)


def _call_block(
    graph: fx.Graph, block: Block, number: int, called: tuple[str, str], current: dict[fx.Node, fx.Node]
) -> None:
    """Put a call in place of window ``number``. ``current``: what stands for nodes of windows that are gone."""
    name, identifier = called
    operands = [current.get(nodes[number], nodes[number]) for nodes in block.inputs]
    window = block.windows[number]
    inside = set(window)
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(window[0]):
        body = graph.get_attr(name)
        call = graph.call_function(INVOKE, (body, identifier, *operands))
        call.meta = {"val": tuple(window[place].meta["val"] for place in block.results)}
        for index, place in enumerate(block.results):
            made[window[place]] = graph.call_function(operator.getitem, (call, index))
            made[window[place]].meta = _described(window[place])
        for place in sorted({p for chain in block.replayed.values() for p in chain}):
            node = window[place]
            if node not in made:
                made[node] = graph.node_copy(node, lambda n: made.get(n, current.get(n, n)))
                made[node].meta = _described(node)
    for node, replacement in made.items():
        node.replace_all_uses_with(
            replacement, delete_user_cb=lambda user: user not in inside and user not in made.values()
        )
    for node in reversed(window):
        graph.erase_node(node)
    current |= made


def _described(node: fx.Node) -> dict[str, object]:
    return {k: v for k, v in node.meta.items() if k != "eager_input_vals"}
