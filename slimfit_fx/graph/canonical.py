"""What an operator, or a whole graph, is apart from its name: two that have the same text do the same work.

The text of a node holds its operator, its constant arguments and the shape, strides, dtype and device of its result,
but neither its name nor where its arguments come from. The text of a graph also holds which argument is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx


def node_text(node: fx.Node, place_of: Callable[[fx.Node], str] = lambda _: "%") -> str:
    """Operator, constants and result of ``node``; ``place_of`` says how an argument that is a node is written."""

    def written(argument: fx.Node) -> Any:
        return _Written(place_of(argument))

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), written)
    return f"{node.op} {node.target} {args!r} {kwargs!r} -> {value_text(node.meta.get('val'))}"


def value_text(value: Any) -> str:
    """Shape, strides, dtype and device of a tensor (symbolic sizes as their expressions); of several, each."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset()
        return f"{tuple(value.shape)}{value.stride()}{offset}{value.dtype}{value.device}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return f"{type(value).__name__} {value}" if value is not None else "none"


def graph_text(nodes: Iterable[fx.Node]) -> str:
    """The text of a whole graph, given its nodes in order; each argument is written as the place of its node."""
    place: dict[fx.Node, str] = {}
    lines = []
    for index, node in enumerate(nodes):
        place[node] = f"%{index}"
        named = node.op == "get_attr"
        text = node_text(node, lambda n: place[n])
        lines.append(text if named or node.op == "call_function" else text.replace(str(node.target), "", 1))
    return "\n".join(lines)


class _Written:
    """Stands in for a node within arguments; ``repr`` is what is written."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
