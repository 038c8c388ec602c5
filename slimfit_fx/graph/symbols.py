"""Symbolic sizes: which symbols the shapes of a graph's values hold, and which inputs of the graph bring them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from slimfit_fx.graph import ops


def free_symbols(node: fx.Node) -> set[object]:
    """Symbols in the sizes, strides and offset of a tensor; none for what is no tensor."""
    val = node.meta.get("val")
    return symbols_of_layout(val) if isinstance(val, torch.Tensor) else set()


def symbols_of_layout(val: torch.Tensor) -> set[object]:
    """Symbols in the sizes, strides and offset of a tensor."""
    return set().union(*(_symbols_of(s) for s in (*val.shape, *val.stride(), val.storage_offset())))


def symbol_inputs(graph: fx.Graph) -> dict[object, fx.Node]:
    """The placeholder that brings each symbol."""
    return {
        next(iter(_symbols_of(n.meta["val"]))): n
        for n in graph.find_nodes(op="placeholder")
        if ops.is_symbol(n) and isinstance(n.meta["val"], torch.SymInt) and n.meta["val"].node.expr.is_symbol
    }


def missing_symbols(
    graph: fx.Graph, operands: Iterable[fx.Node], values: Iterable[fx.Node]
) -> tuple[list[fx.Node], set[object]]:
    """What a subgraph that computes ``values`` from ``operands`` must be given besides.

    Returns the placeholders of symbols that are not among the operands, and the symbols that no placeholder brings.
    """
    wanted = set().union(*(free_symbols(node) for node in values))
    known = symbol_inputs(graph) if wanted else {}
    given = set(operands)
    extra = [known[s] for s in sorted(wanted, key=str) if s in known and known[s] not in given]
    return extra, wanted - set(known)


def _symbols_of(value: torch.SymInt | int) -> set[object]:
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()
