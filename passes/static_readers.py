"""Tell apart who reads a saved value in backward: what runs whatever is frozen, and what runs for units that train.

::

    v = saved                       static: dx (the gradient of all that lies before), through d
    d = 2 * v; y = exp(v)           units:  dW (the gradient of one unit), through y
    dx = g * d; dW = g.t() @ y

Readers are tangent-fed: what is computed again from the value alone (``d``, ``y``) stands between. Each node of it that
both groups need is copied, so that the two can read the value from different places::

    d = 2 * decode(parts)           the cheap, lossy one
    y = exp(v)                      the one that insert_gates.py drops while no unit trains that reads it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.find_cones import tangent_fed
from slimfit_fx.passes.liveness import served_gates
from slimfit_fx.planning.chances import effective_gates


@dataclass(frozen=True)
class ReaderGroups:
    """The readers of one saved value; ``between``: what is computed again from it, in graph order."""

    static: tuple[fx.Node, ...]
    units: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]


class StaticReaders:
    """Looks at the readers of saved values in one backward graph.

    ``gates[j]`` is the gate of its output ``j`` or STATIC, ``grads_of[j]`` the forward input whose gradient it is.
    Parting readers makes no other readers, so one look at a graph serves for all values.
    """

    def __init__(self, backward: fx.Graph, gates: Sequence[int], grads_of: Sequence[str | None]) -> None:
        outputs: Sequence[fx.Node | None] = backward.output_node().args[0]  # type: ignore[assignment]
        grads = [(node, index) for index, node in enumerate(outputs) if node is not None]
        self._gates, self._grads_of = gates, grads_of
        self._reached, self._fed = served_gates(backward, grads), tangent_fed(backward)

    def find(self, value: fx.Node, placeholder: fx.Node) -> ReaderGroups | str:
        """The two groups of readers of ``value``, or why it must be one and the same for both.

        Static readers can do with less if what they make is the gradient of all that ``value`` is made from. What
        always trains and lies elsewhere (a layer behind it, what a scale is computed from) must have it as it is, and
        so must the gradient of one parameter; what is computed again by more than pointwise operators is another
        value, of whose error nothing is known.
        """
        between, readers = self._walk(placeholder)
        if placeholder.graph.output_node() in readers:
            return "returned by backward"
        static = [r for r in readers if not self._serves_units(r)]
        if not static:
            return "read only for units that may be frozen"
        before = _inputs_of(value)
        for reader in static:
            reached = self._reached.get(reader, frozenset())
            if reader not in self._fed or len(reached) < 2 or any(self._grads_of[i] not in before for i in reached):
                return f"read by {reader.name} for what always trains"
        needed = set(static)
        for node in reversed(between):
            if any(user in needed for user in node.users):
                needed.add(node)
                if not (ops.is_pointwise(node) or ops.is_view(node)):
                    return f"read through {node.name} whatever is frozen"
            elif not ops.is_cheap(node):
                return f"read through {node.name}"
        return ReaderGroups(tuple(static), tuple(r for r in readers if r not in needed), tuple(between))

    def _serves_units(self, node: fx.Node) -> bool:
        reached = self._reached.get(node, frozenset())
        return bool(effective_gates(frozenset(self._gates[index] for index in reached)))

    def _walk(self, placeholder: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """What is computed again from the value, and who reads that or the value itself; both in graph order."""
        between, readers = dict[fx.Node, None](), dict[fx.Node, None]()
        for node in placeholder.graph.nodes:
            if ops.reads_shape_only(node) or not any(i is placeholder or i in between for i in node.all_input_nodes):
                continue
            again = node not in self._fed and node.op == "call_function" and not ops.is_random(node)
            (between if again else readers)[node] = None
        return list(between), list(readers)


def _inputs_of(value: fx.Node) -> set[str]:
    """The names of the inputs of the forward graph that ``value`` is made from."""
    seen, stack = {value}, [value]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return {node.name for node in seen if node.op == "placeholder"}


def part_readers(groups: ReaderGroups, placeholder: fx.Node, decoded: fx.Node) -> None:
    """Let the static readers see ``decoded``, and those for units ``placeholder`` as before. May leave dead nodes."""
    inside, copies = set(groups.between), dict[fx.Node, fx.Node]()

    def copy(node: fx.Node) -> fx.Node:
        if node not in inside:
            return node
        if node not in copies:
            with node.graph.inserting_after(node):
                copies[node] = node.graph.node_copy(node, copy)
        return copies[node]

    for reader in groups.units:
        for value in reader.all_input_nodes:
            if value in inside:
                reader.replace_input_with(value, copy(value))
    for user in list(placeholder.users):
        if user in inside or user in groups.static:
            user.replace_input_with(placeholder, decoded)
