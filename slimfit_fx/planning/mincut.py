"""Which values cross from forward to backward: a minimum cut over the part of the joint graph that can run in either.

Every value becomes an edge in -> out whose capacity is what saving it costs; an edge from the source prices running its
operator again in backward. The cheapest cut is the cheapest mix of saving and recomputing (the formulation of
torch/_functorch/partitioners.py, with a price on recompute and the *encoded* size as capacity).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx


@dataclass(frozen=True)
class Cut:
    """``saved`` cross over as they are (or encoded); ``recomputed`` are run again in backward, from the saved ones."""

    saved: frozenset[fx.Node]
    recomputed: frozenset[fx.Node]


def minimum_cut(
    graph: fx.Graph,
    backward: set[fx.Node],
    needed: set[fx.Node],
    save_cost: Callable[[fx.Node], float],
    recompute_price: Callable[[fx.Node], float],
) -> Cut | None:
    """The cheapest (saved, recomputed) split, or None when no finite one exists.

    ``backward``: nodes that can only run in backward. ``needed``: backward nodes that some gradient depends on.
    Costs are in bytes; ``math.inf`` forbids.
    """
    candidates = _ancestors_read_by(graph, backward, needed)
    saves = {n: save_cost(n) for n in candidates}
    again = {n: math.inf if n.op == "placeholder" else recompute_price(n) for n in candidates}
    through = {n for n in candidates if saves[n] == math.inf and again[n] == 0 and len(n.all_input_nodes) == 1}
    ends = _ends(candidates, needed, through, again)
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    for node in candidates:
        if node in through:
            continue
        outward = (node, "out")
        inward: Any = (node, "in")
        if again[node] == math.inf:
            inward = "source"
        elif again[node] > 0:
            network.add_edge("source", inward, **_capacity(again[node]))
        network.add_edge(inward, outward, **_capacity(saves[node]))
        network.add_edges_from((outward, end) for end in ends[node])
    try:
        _, (_, sink_side) = nx.minimum_cut(network, "source", "sink", flow_func=nx.algorithms.flow.preflow_push)
    except nx.NetworkXUnbounded:
        return None
    recomputed = {n for n in candidates if (n, "in") in sink_side}
    for node in reversed(candidates):
        if node in through and any(u in recomputed or u in needed for u in node.users):
            recomputed.add(node)
    saved = {n for n in candidates if n not in recomputed and (n, "out") in sink_side}
    return Cut(frozenset(saved), frozenset(recomputed))


def _ends(
    candidates: dict[fx.Node, None], needed: set[fx.Node], through: set[fx.Node], again: dict[fx.Node, float]
) -> dict[fx.Node, dict[Any, None]]:
    """Where the edges that leave a value end: at readers in backward, and at values that may be computed again.

    Readers behind a view that costs nothing (``through``) are readers of the value itself; what never runs again needs
    nothing for it. Without both the network is half as large.
    """
    ends: dict[fx.Node, dict[Any, None]] = {}
    for node in reversed(candidates):
        found = ends[node] = {}
        for user in node.users:
            if user in through:
                found.update(ends[user])
            elif user not in candidates:
                found.update({"sink": None} if user in needed else {})
            elif again[user] < math.inf:
                found[(user, "in")] = None
    return ends


def _capacity(cost: float) -> dict[str, int]:
    """The capacity of an edge, none if unlimited (so networkx reads it); whole numbers keep its arithmetic exact."""
    return {} if math.isinf(cost) else {"capacity": round(cost * 16)}


def _ancestors_read_by(graph: fx.Graph, backward: set[fx.Node], needed: set[fx.Node]) -> dict[fx.Node, None]:
    """Values outside ``backward`` that a needed backward node depends on, in graph order."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op not in ("output",) and node not in backward and any(u in needed or u in wanted for u in node.users):
            wanted.add(node)
    return {n: None for n in graph.nodes if n in wanted}
