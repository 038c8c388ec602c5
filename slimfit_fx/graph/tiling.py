"""What an operator does when only a part of the batch is there: whether a block may run tile by tile.

How values stand is said in tile_states.py, what each operator makes of it in tile_rules.py.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.tile_rules import RULES, attention, elementwise, first_argument, sum_of_tiles
from slimfit_fx.graph.tile_states import EACH, SAME, SUM, Flow, StateOf, States

_PASS_ON = {"hold", "release", "laid_out"}
"""Ours: the first argument, as it is."""
_SIZED = {"view", "reshape", "_unsafe_view", "expand"}
"""Operators whose second argument is the size of the result."""


def follow(node: fx.Node, state_of: StateOf) -> Flow | None:
    """What ``node`` gives if its arguments are as ``state_of`` says; None if it must see the whole batch.

    At least one argument is not whole. Branches are the caller's business.
    """
    name = ops.op_name(node)
    states = [state_of(argument) for argument in node.all_input_nodes]
    if ops.is_getitem(node):
        (several,) = states
        return Flow(several[int(node.args[1])]) if isinstance(several, tuple) else None  # type: ignore[arg-type]
    if any(isinstance(state, tuple) or state == SAME for state in states):
        return None
    if name in _PASS_ON:
        passed = state_of(first_argument(node))
        return None if passed is None else Flow(passed)
    if SUM in states:
        return sum_of_tiles(node, name, state_of)
    rule = RULES.get(name)
    if EACH in states and rule is not attention:
        return None
    if rule is not None:
        return rule(node, state_of)
    pointwise = ops.is_pointwise(node) and ops.is_tensor(node) and not ops.is_random(node)
    return elementwise(node, state_of) if pointwise else None


def tile_arguments(node: fx.Node, state: States, tiles: int) -> tuple[Any, ...]:
    """The arguments of ``node`` with the sizes that it has in a tile; ``state``: that of its result."""
    place = 0 if is_constant(node) else 1
    if (place and ops.op_name(node) not in _SIZED) or not isinstance(state, int) or state < 0:
        return tuple(node.args)
    sizes = list(node.args[place])  # type: ignore[arg-type]
    if sizes[state] != -1:
        sizes[state] //= tiles
    return (*node.args[:place], sizes, *node.args[place + 1 :])


def is_constant(node: fx.Node) -> bool:
    """Whether all elements are one number: ``full(size, number)``."""
    return ops.op_name(node) == "full" and not node.all_input_nodes
