"""Find the cones of a backward graph: what runs only for the gradient of one unit and may be skipped when it is closed.

Every node gets a *home*: the main graph, or the cones that need it. From the gradients backward:

- needed by the main graph              -> main; a cheap one that no tangent reaches (decode, recompute) is cloned into
                                           the cones that read it too, so that it stays fused there
- needed by one cone only               -> that cone, whatever it costs
- needed by several cones, cheap        -> cloned into each of them, into four at most if a tangent reaches it (a cone
                                           on the OR of their gates, without a barrier)
- needed by several, expensive or many  -> main, with the reason

Analysis only: returns a ``ConePlan``; insert_gates.py acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC
from slimfit_fx.planning.planner import MAX_GATES_PER_CONE

MAIN = -1
CONE = "slimfit_cone"
"""Marks a branch and the gradient that comes out of it, with its gate."""


@dataclass
class Cone:
    """One conditional region: gradient output ``output`` of gate ``gate``.

    ``nodes`` in graph order; ``operands`` come from outside.
    """

    output: int
    gate: int
    root: fx.Node
    nodes: list[fx.Node]
    operands: list[fx.Node]


@dataclass
class ConePlan:
    """What to do to a pair of graphs.

    ``cones`` to build; ``stashes``: saved placeholder -> gates that need it; ``refusals``: (what, why it stays in the
    main graph); ``ungated``: gate -> why a gradient of it is in no cone.
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
    homes, clones = _assign_homes(backward, outputs, roots, plan)
    for index, root in roots.items():
        members = [n for n in backward.nodes if index in homes.get(n, ()) or index in clones.get(n, ())]
        if not ops.is_getitem(root) and any(_has_any_layout(n) for n in (*members, *_operands(members))):
            reason = "it is made from the gradient of a convolution, whose layout the compiler picks"
            plan.refuse_root(root, gates[index], reason)
            continue
        if _is_worth_a_branch(members, root):
            plan.cones.append(Cone(index, gates[index], root, members, _operands(members)))
        else:
            reason = "its gradient costs nothing of its own: only views of values that are needed anyway"
            plan.refuse_root(root, gates[index], reason)
    _plan_stashes(plan, backward, saved, min_bytes)
    return plan


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


Homes = dict[fx.Node, frozenset[int]]


def _assign_homes(
    graph: fx.Graph, outputs: Sequence[fx.Node | None], roots: dict[int, fx.Node], plan: ConePlan
) -> tuple[Homes, Homes]:
    """(home of every node, cones that hold a clone of a node whose home is the main graph)."""
    fed = tangent_fed(graph)
    root_of = {node: index for index, node in roots.items()}
    homes: Homes = {}
    clones: Homes = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            continue
        if node in root_of:
            homes[node] = frozenset([root_of[node]])
            continue
        wanted = set().union(*(homes.get(u, frozenset([MAIN])) | clones.get(u, frozenset()) for u in _readers(node)))
        homes[node], clones[node] = _home(node, frozenset(wanted), node in fed, plan)
    return homes, clones


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads ``node``.

    An element of a tuple counts the readers of all elements, so that tuple and elements share one home.
    """
    if ops.is_getitem(node) and isinstance(node.args[0], fx.Node):
        return [reader for element in node.args[0].users for reader in element.users]
    return list(node.users)


def _home(
    node: fx.Node, wanted: frozenset[int], tangent_fed: bool, plan: ConePlan
) -> tuple[frozenset[int], frozenset[int]]:
    cones = wanted - {MAIN}
    if node.op != "call_function" or not wanted:
        return frozenset([MAIN]), frozenset()
    maker = node.args[0] if ops.is_getitem(node) and isinstance(node.args[0], fx.Node) else node
    cheap = ops.is_cheap(maker)
    if MAIN in wanted:
        movable = cheap and (ops.is_view(maker) or not tangent_fed)
        return frozenset([MAIN]), cones if movable and not _must_stay(node) else frozenset()
    if _must_stay(node):
        return frozenset([MAIN]), frozenset()
    if len(cones) == 1:
        return cones, frozenset()
    if cheap and (not tangent_fed or len(cones) <= MAX_GATES_PER_CONE):
        return cones, frozenset()
    why = "an expensive operator" if not cheap else f"more than {MAX_GATES_PER_CONE} units"
    plan.refusals.append((node.name, f"serves {len(cones)} units at once and is {why}: always computed"))
    return frozenset([MAIN]), frozenset(cones) if ops.is_view(node) else frozenset()


def _must_stay(node: fx.Node) -> bool:
    """Effects, random numbers and symbols stay in the main graph."""
    schema = getattr(node.target, "_schema", None)
    return ops.is_symbol(node) or ops.is_random(node) or (schema is not None and schema.is_mutable)


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
    from slimfit_fx.graph.joint import nbytes

    readers: dict[fx.Node, set[int]] = {}
    in_cone: dict[fx.Node, set[int]] = {}
    for cone in plan.cones:
        for operand in cone.operands:
            readers.setdefault(operand, set()).add(cone.gate)
        for node in cone.nodes:
            in_cone.setdefault(node, set()).add(cone.output)
    gone = _nodes_only_in_cones(plan, graph)
    for node in saved:
        unread = all(u in gone or ops.reads_shape_only(u) for u in node.users)
        if node in readers and nbytes(node) >= min_bytes and unread:
            plan.stashes[node] = frozenset(readers[node])


def _nodes_only_in_cones(plan: ConePlan, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that vanish from the main graph once the cones are built: nobody outside the cones reads them."""
    roots = {c.root for c in plan.cones}
    inside = {n for c in plan.cones for n in c.nodes}
    gone: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in roots or all(u in gone for u in node.users)):
            gone.add(node)
    return gone
