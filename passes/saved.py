"""The seam between a forward and a backward graph: which forward output is which backward input.

AOTAutograd's convention (torch/_functorch/partitioners.py, _extract_fwd_bwd_modules): the forward returns user outputs,
saved tensors, saved symbols; the backward takes saved symbols, saved tensors, tangents. Saved values are matched by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from slimfit_fx.graph import ops


@dataclass
class Seam:
    """A forward/backward pair and the edits that keep both sides of their seam in step."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int
    names: dict[fx.Node, str] = field(default_factory=dict)
    """Placeholder of a saved value whose own name was taken in the backward graph."""

    def saved(self) -> list[tuple[fx.Node, fx.Node]]:
        """(forward node, backward placeholder) of every saved tensor, in order; symbols are left out."""
        placeholders = {str(n.target): n for n in self.backward.graph.find_nodes(op="placeholder")}
        pairs = []
        for node in self._forward_outputs()[self.num_fwd_outputs :]:
            if isinstance(node, fx.Node) and ops.is_tensor(node):
                pairs.append((node, placeholders[self.names.get(node, node.name)]))
        return pairs

    def saved_in_order(self) -> dict[fx.Node, fx.Node]:
        """The same where blocks stand in the forward graph, whose results have names of their own.

        What is saved twice, or returned to the caller as well, is left out.
        """
        outputs = self._forward_outputs()
        saved = [n for n in outputs[self.num_fwd_outputs :] if isinstance(n, fx.Node) and ops.is_tensor(n)]
        placeholders = filter(ops.is_tensor, self.backward.graph.find_nodes(op="placeholder"))
        return {n: placeholder for n, placeholder in zip(saved, placeholders) if outputs.count(n) == 1}  # noqa: B905

    def saved_names(self, *, symbols: bool = False) -> list[str]:
        """The placeholders' names of the saved tensors (or symbols), in the order in which forward returns them."""
        saved = [n for n in self._forward_outputs()[self.num_fwd_outputs :] if isinstance(n, fx.Node)]
        return [self.names.get(n, n.name) for n in saved if (ops.is_symbol if symbols else ops.is_tensor)(n)]

    def symbol_before_a_tensor(self) -> str | None:
        """The first saved symbol that forward returns before a saved tensor: it must come behind all of them."""
        saved = [n for n in self._forward_outputs()[self.num_fwd_outputs :] if isinstance(n, fx.Node)]
        last = max((i for i, n in enumerate(saved) if ops.is_tensor(n)), default=-1)
        return next((n.name for n in saved[: last + 1] if ops.is_symbol(n)), None)

    def user_outputs(self) -> list[fx.Node]:
        """What the forward returns to its caller (and writes back into its inputs)."""
        return [n for n in self._forward_outputs()[: self.num_fwd_outputs] if isinstance(n, fx.Node)]

    def replace(self, value: fx.Node, placeholder: fx.Node, new: Sequence[fx.Node]) -> list[fx.Node]:
        """Save the forward nodes ``new`` in place of ``value``; returns their placeholders.

        They stand before ``placeholder``, which is still there: the caller replaces its uses and erases it.
        """
        outputs = self._forward_outputs()
        index = self._place_of(value)
        self._set_outputs(outputs[:index] + list(new) + outputs[index + 1 :])
        return [self._add_placeholder(node, placeholder) for node in new]

    def insert(self, value: fx.Node, placeholder: fx.Node, new: Sequence[fx.Node]) -> list[fx.Node]:
        """Save the forward nodes ``new`` ahead of ``value``, which stays; returns their placeholders."""
        outputs = self._forward_outputs()
        index = self._place_of(value)
        self._set_outputs(outputs[:index] + list(new) + outputs[index:])
        return [self._add_placeholder(node, placeholder) for node in new]

    def prepend(self, values: Sequence[fx.Node]) -> list[fx.Node]:
        """Save ``values`` ahead of all saved tensors; returns their placeholders."""
        if not values:
            return []
        outputs = self._forward_outputs()
        at = self.num_fwd_outputs
        first = self._first_tensor_placeholder()
        self._set_outputs(outputs[:at] + list(values) + outputs[at:])
        return [self._add_placeholder(node, first) for node in values]

    def _place_of(self, value: fx.Node) -> int:
        """Where ``value`` is returned as one of the saved values."""
        return next(i for i, n in enumerate(self._forward_outputs()) if n is value and i >= self.num_fwd_outputs)

    def _first_tensor_placeholder(self) -> fx.Node:
        placeholders = self.backward.graph.find_nodes(op="placeholder")
        return next(n for n in placeholders if not ops.is_symbol(n))

    def _add_placeholder(self, node: fx.Node, before: fx.Node) -> fx.Node:
        with self.backward.graph.inserting_before(before):
            placeholder = self.backward.graph.placeholder(node.name)
        placeholder.target = placeholder.name  # the name may be taken: two inputs must never share one
        placeholder.meta = {
            k: v
            for k, v in node.meta.items()
            if k in ("val", "tensor_meta", "saved_tensor_with_no_vc_check", "nn_module_stack")
        }
        self.names[node] = str(placeholder.target)
        return placeholder

    def _forward_outputs(self) -> list[fx.Node | None]:
        return list(self.forward.graph.output_node().args[0])  # type: ignore[arg-type]

    def _set_outputs(self, outputs: list[fx.Node | None]) -> None:
        node = self.forward.graph.output_node()
        grown = len(outputs) - len(node.args[0])  # type: ignore[arg-type]
        node.args = (tuple(outputs),)
        descs = node.meta.get("desc")
        if descs is not None:
            node.meta = {**node.meta, "desc": _grow(list(descs), grown)}


def _grow(descs: list[object], count: int) -> list[object]:
    """Repeat the descriptor of the last saved value: they only number the saved values."""
    if count <= 0 or not descs:
        return descs[: len(descs) + count]
    from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

    return descs + [SavedForBackwardsAOTOutput(len(descs) + i) for i in range(count)]
