"""Find the cones of a backward graph: what runs only for the gradient of one unit and may be skipped when it is closed.

Every node gets a *home*: the main graph, or the cones that need it. From the gradients backward:

- needed by the main graph              -> main; a cheap one that no tangent reaches (decode, recompute) is cloned into
                                           the cones that read it too, so that it stays fused there
- needed by one cone only               -> that cone, whatever it costs
- needed by several cones, cheap        -> cloned into each of them, into four at most if a tangent reaches it
- needed by several, expensive          -> a cone of its own on the OR of their gates, which they read: cones nest
- an early part of a sum (a weight that is used twice, as a tied embedding), made of more bytes than it has -> a cone of
                                           its own on the same gate: what it is made of need not wait for the last part
- the same, but it can end no branch, or the gates are more than four -> main, with the reason

Analysis only: returns a ``ConePlan``; insert_gates.py acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC, nbytes
from slimfit_fx.planning.chances import MAX_GATES_PER_CONE

MAIN = -1
_MOST_PARTS = 32
"""Branches of their own that the parts of one gradient may have."""
CONE = "slimfit_cone"
"""Marks a branch and what comes out of it, with its gates."""


@dataclass
class Cone:
    """One conditional region: it runs if one of ``gates`` is open, and returns ``results``.

    ``output`` is the place of that gradient among the results of backward; None for values that other cones read.
    ``nodes`` in graph order; ``operands`` come from outside.
    """

    output: int | None
    gates: frozenset[int]
    results: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    operands: list[fx.Node]


@dataclass
class ConePlan:
    """What to do to a pair of graphs.

    ``cones`` to build, each behind those that it reads; ``stashes``: saved placeholder -> gates that need it;
    ``refusals``: (what, why it stays in the main graph); ``ungated``: gate -> why a gradient of it is in no cone.
    """

    cones: list[Cone] = field(default_factory=list)
    stashes: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    ungated: dict[int, list[str]] = field(default_factory=dict)

    def refuse_root(self, root: fx.Node, gate: int, reason: str) -> None:
        """Note why the gradient ``root`` of ``gate`` is computed in any case."""
        self.refusals.append((root.name, reason))
        self.ungated.setdefault(gate, []).append(reason)


def find_cones(backward: fx.Graph, gates: Sequence[int], saved: Sequence[fx.Node], *, min_bytes: int) -> ConePlan:
    """Plan the cones of ``backward``.

    ``gates[j]`` is the gate of its output ``j`` or STATIC; ``saved`` are the placeholders of its saved tensors.
    """
    outputs = list(backward.output_node().args[0])  # type: ignore[arg-type]
    plan = ConePlan()
    roots = _cone_roots(outputs, gates, plan)
    barred: set[fx.Node] = set()
    while True:
        homes = _Homes(backward, outputs, {index: (root, gates[index]) for index, root in roots.items()}, barred)
        members = homes.members()
        unfit = {index: why for index in homes.roots if (why := _refuse_cone(homes.roots[index], members[index]))}
        if not unfit:
            break
        for index, reason in unfit.items():  # whose nodes, and those they read, are needed in any case
            if index in roots:
                plan.refuse_root(roots.pop(index), gates[index], reason)
            else:
                barred.add(homes.roots[index])
    plan.refusals += homes.refusals
    for index in sorted(homes.roots, key=homes.order):
        nodes = members[index]
        output = index if index in roots else None
        results = _results(homes.roots[index])
        plan.cones.append(Cone(output, homes.gates[index], results, nodes, _operands(nodes)))
    _plan_stashes(plan, backward, saved, min_bytes)
    return plan


def _results(root: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that a cone returns: ``root``, or what is read of its results."""
    return (root,) if ops.is_tensor(root) else tuple(element for element in root.users if element.users)


def _refuse_cone(root: fx.Node, members: Sequence[fx.Node]) -> str | None:
    if any(_is_symbolic_number(n) for n in _operands(members)):
        return "it reads a number made of symbolic sizes, which no branch takes"
    if not ops.is_getitem(root) and any(_has_any_layout(n) for n in (*members, *_operands(members))):
        return "it is made from the gradient of a convolution, whose layout the compiler picks"
    base = ops.view_base(root)
    if ops.is_getitem(base) and base.args[0] not in members:
        return "one operator makes it together with a gradient that is always needed"
    if not _is_worth_a_branch(members, root):
        return "its gradient costs nothing of its own: only views of values that are needed anyway"
    return None


def _has_any_layout(node: fx.Node) -> bool:
    maker = node.args[0] if ops.is_getitem(node) and isinstance(node.args[0], fx.Node) else node
    return ops.picks_its_layout(maker)


def _cone_roots(outputs: Sequence[fx.Node | None], gates: Sequence[int], plan: ConePlan) -> dict[int, fx.Node]:
    """Gradient outputs that can end in a branch: computed, static shape, the gradient of one parameter only."""
    roots: dict[int, fx.Node] = {}
    for index, (node, gate) in enumerate(zip(outputs, gates, strict=True)):
        if gate == STATIC or not isinstance(node, fx.Node):
            continue
        reason = _refuse_root(node, outputs)
        if reason is None:
            roots[index] = node
        else:
            plan.refuse_root(node, gate, reason)
    return roots


def _refuse_root(node: fx.Node, outputs: Sequence[fx.Node | None]) -> str | None:
    if node.op != "call_function":
        return "its gradient is an input of the backward graph"
    if CONE in node.meta:
        return "its gradient is behind its gate already"
    if not ops.is_tensor(node):
        return "its gradient is not one tensor"
    if any(not isinstance(s, int) for s in node.meta["val"].shape):
        return "its gradient has a symbolic shape"
    if sum(o is node for o in outputs) > 1:
        return "its gradient is shared with another parameter"
    if any(u.op != "output" for u in node.users):
        return "its gradient is read by another computation"
    return None


class _Homes:
    """Where each node lives: ``home[n]`` is the main graph or cones; ``clones[n]`` are cones that hold one more of it.

    ``roots[i]`` is what cone ``i`` is there for and ``gates[i]`` what opens it: gradients by their place among the
    results, then operators whose result, or results, several cones read. Nodes in ``barred`` are none of the latter.
    """

    def __init__(
        self,
        graph: fx.Graph,
        outputs: Sequence[fx.Node | None],
        gradients: dict[int, tuple[fx.Node, int]],
        barred: set[fx.Node],
    ) -> None:
        self.graph, self._barred, self._fed = graph, barred, tangent_fed(graph)
        self.roots = {index: root for index, (root, _) in gradients.items()}
        self.gates = {index: frozenset([gate]) for index, (_, gate) in gradients.items()}
        self.refusals: list[tuple[str, str]] = []
        self._first_shared = len(outputs)
        self._shared: dict[fx.Node, int] = {}
        position = {node: place for place, node in enumerate(graph.nodes)}
        self._early = frozenset().union(*(early_parts(root, position) for root in self.roots.values()))
        self.home: dict[fx.Node, frozenset[int]] = {}
        self.clones: dict[fx.Node, frozenset[int]] = {}
        root_of = {root: index for index, root in self.roots.items()}
        for node in reversed(graph.nodes):
            if node in root_of:
                self.home[node] = frozenset([root_of[node]])
            elif node.op != "output":
                self.home[node], self.clones[node] = self._place(node, self._wanted(node))

    def members(self) -> dict[int, list[fx.Node]]:
        """The nodes of each cone, in graph order."""
        found: dict[int, list[fx.Node]] = {index: [] for index in self.roots}
        for node in self.graph.nodes:
            for index in (self.home.get(node, frozenset()) | self.clones.get(node, frozenset())) - {MAIN}:
                found[index].append(node)
        return found

    def order(self, index: int) -> tuple[bool, int]:
        """Sorts cones behind those that they read: what is shared was found from its readers on."""
        shared = index >= self._first_shared
        return not shared, -index if shared else index

    def _wanted(self, node: fx.Node) -> frozenset[int]:
        places = [self.home.get(u, frozenset([MAIN])) | self.clones.get(u, frozenset()) for u in _readers(node)]
        return frozenset().union(*places)

    def _place(self, node: fx.Node, wanted: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
        """(home, clones) of a node that these cones, or the main graph, want."""
        cones = wanted - {MAIN}
        if node.op != "call_function" or not wanted:
            return frozenset([MAIN]), frozenset()
        maker = node.args[0] if ops.is_getitem(node) and isinstance(node.args[0], fx.Node) else node
        cheap, fed = ops.is_cheap(maker), node in self._fed
        if MAIN in wanted:
            movable = cheap and (ops.is_view(maker) or not fed)
            return frozenset([MAIN]), cones if movable and not _must_stay(node) else frozenset()
        if _must_stay(node):
            return frozenset([MAIN]), frozenset()
        opening = frozenset().union(*(self.gates[cone] for cone in cones))
        if len(cones) == 1:
            apart = node in self._early and self._refuse_sharing(maker, node, len(opening)) is None
            return frozenset([self._share(maker, opening)]) if apart else cones, frozenset()
        why_not = self._refuse_sharing(maker, node, len(opening))
        few = len(cones) <= MAX_GATES_PER_CONE
        if cheap and (not fed or (few and not (why_not is None and self._gathers(node)))):
            return cones, frozenset()
        if why_not is None:
            return frozenset([self._share(maker, opening)]), frozenset()
        self.refusals.append((node.name, f"serves {len(opening)} units at once: {why_not}"))
        return frozenset([MAIN]), frozenset(cones) if ops.is_view(node) else frozenset()

    def _share(self, node: fx.Node, opening: frozenset[int]) -> int:
        """The cone that is there for ``node``, on the OR of the gates ``opening``; elements of a tuple share one."""
        if node not in self._shared:
            index = self._shared[node] = self._first_shared + len(self._shared)
            self.roots[index], self.gates[index] = node, opening
        return self._shared[node]

    def _refuse_sharing(self, maker: fx.Node, node: fx.Node, units: int) -> str | None:
        if units > MAX_GATES_PER_CONE:
            return f"more than {MAX_GATES_PER_CONE} are hardly ever all closed"
        if maker in self._barred:
            return "it can end no branch"
        if ops.is_view(node) or ops.is_view(maker):
            return "it is a view"
        if not ops.is_tensor(node):
            return "it is no tensor"
        if any(not isinstance(s, int) for s in node.meta["val"].shape):
            return "it has a symbolic shape"
        return None

    def _gathers(self, node: fx.Node) -> bool:
        """Whether only ``node`` reads some product, and is no larger: one value is handed on in place of several."""
        products = [_behind_views(i, node) for i in node.all_input_nodes]
        sizes = [nbytes(p) for p in products if p is not None and p in self._fed and not ops.is_cheap(p)]
        return not ops.is_view(node) and bool(sizes) and nbytes(node) <= sum(sizes)


def early_parts(root: fx.Node, position: Mapping[fx.Node, int]) -> frozenset[fx.Node]:
    """Of the sum that ``root`` is, the parts, and sums of parts, that are known before its last part is.

    Products and reductions, whose operands are let go then. One that is larger than its operands may wait, since it
    would be held instead. Of a long sum (a cell that runs for each token) a few, evenly spread: each is a branch.
    ``position``: of every node in the graph.
    """
    sums: list[tuple[fx.Node, fx.Node]] = []  # and what each adds to the one behind it, outermost first
    total = _within_casts(root)
    while ops.op_name(total) == "add" and len(total.all_input_nodes) == 2:
        one, other = (_within_casts(part) for part in total.all_input_nodes)
        inner, part = (other, one) if _is_sum(other) else (one, other)
        sums.append((total, part))
        total = inner
    found: list[fx.Node] = []
    known, worth_it = position[ops.view_base(total)], _shrinks(total)
    for outer, part in reversed(sums):
        place, shrinks = position[ops.view_base(part)], _shrinks(part)
        if known <= place and worth_it:
            found.append(total)
        elif place < known and shrinks:
            found.append(part)
        total, known, worth_it = outer, max(known, place), worth_it or shrinks
    return frozenset(found[:: max(1, -(-len(found) // _MOST_PARTS))])


def _within_casts(node: fx.Node) -> fx.Node:
    """What ``node`` is a cast or a view of, as far as nobody else reads it on the way."""
    while len(node.all_input_nodes) == 1 and (ops.is_view(node) or ops.op_name(node) == "convert_element_type"):
        (source,) = node.all_input_nodes
        if len(source.users) > 1 or source.op != "call_function":
            break
        node = source
    return node


def _is_sum(node: fx.Node) -> bool:
    return ops.op_name(node) == "add" and len(node.all_input_nodes) == 2 and len(node.users) == 1


def _shrinks(node: fx.Node) -> bool:
    """Whether a product or a reduction makes ``node``, for one reader only, of more bytes than it has."""
    if node.op != "call_function" or not ops.is_tensor(node) or len(node.users) != 1 or ops.is_getitem(node):
        return False
    makes = ops.is_reduction(node) or not ops.is_cheap(node)
    return makes and sum(nbytes(n) for n in node.all_input_nodes if ops.is_tensor(n)) > nbytes(node)


def _behind_views(node: fx.Node, reader: fx.Node) -> fx.Node | None:
    """What ``node`` is a view of; None if anybody but ``reader`` reads it on the way."""
    while set(node.users) == {reader} and ops.is_view(node) and isinstance(node.args[0], fx.Node):
        node, reader = node.args[0], node
    return node if set(node.users) == {reader} and node.op == "call_function" and ops.is_tensor(node) else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads ``node``.

    An element of a tuple counts the readers of all elements, so that tuple and elements share one home.
    """
    if ops.is_getitem(node) and isinstance(node.args[0], fx.Node):
        return [reader for element in node.args[0].users for reader in element.users]
    return list(node.users)


def _must_stay(node: fx.Node) -> bool:
    """Effects, random numbers, symbols and what reads a number made of them stay in the main graph."""
    schema = getattr(node.target, "_schema", None)
    reads_number = any(_is_symbolic_number(i) for i in node.all_input_nodes)
    return ops.is_symbol(node) or ops.is_random(node) or reads_number or (schema is not None and schema.is_mutable)


def _is_symbolic_number(node: fx.Node) -> bool:
    """``1 / batch`` of a BatchNorm, for one: ``cond`` takes tensors and integers only."""
    return isinstance(node.meta.get("val"), (torch.SymFloat, torch.SymBool))


def tangent_fed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tangent; all others could run as soon as backward starts."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if "tangents" in str(node.target):
                fed.add(node)
        elif any(i in fed for i in node.all_input_nodes):
            fed.add(node)
    return fed


def _is_worth_a_branch(members: Sequence[fx.Node], root: fx.Node) -> bool:
    inside = set(members)
    return (
        root in inside
        and any(not ops.is_view(n) and not ops.is_getitem(n) for n in members)
        and ops.view_base(root) in inside
    )


def _operands(members: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return list(dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in inside))


def _plan_stashes(plan: ConePlan, graph: fx.Graph, saved: Sequence[fx.Node], min_bytes: int) -> None:
    """A saved tensor read by cones only is dropped in forward when all their gates are closed."""
    readers: dict[fx.Node, set[int]] = {}
    for cone in plan.cones:
        for operand in cone.operands:
            readers.setdefault(operand, set()).update(cone.gates)
    gone = _nodes_only_in_cones(plan, graph)
    for node in saved:
        unread = all(u in gone or ops.reads_shape_only(u) for u in node.users)
        if node in readers and nbytes(node) >= min_bytes and unread:
            plan.stashes[node] = frozenset(readers[node])


def _nodes_only_in_cones(plan: ConePlan, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that vanish from the main graph once the cones are built: nobody outside the cones reads them."""
    roots = {result for c in plan.cones for result in c.results}
    inside = {n for c in plan.cones for n in c.nodes}
    gone: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in roots or all(u in gone for u in node.users)):
            gone.add(node)
    return gone
