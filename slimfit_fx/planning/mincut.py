"""Which values cross from forward to backward: a minimum cut over the part of the joint graph that can run in either.

Every value becomes an edge in -> out whose capacity is what saving it costs; an edge from the source prices running its
operator again in backward. The cheapest cut is the cheapest mix of saving and recomputing (the formulation of
torch/_functorch/partitioners.py, with a price on recompute and the *encoded* size as capacity).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    network = nx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    for node in candidates:
        inward, outward = (node, "in"), (node, "out")
        network.add_edge(inward, outward, **_capacity(save_cost(node)))
        price = math.inf if node.op == "placeholder" else recompute_price(node)
        if price > 0:
            network.add_edge("source", inward, **_capacity(price))
        for user in node.users:
            if user in candidates:
                network.add_edge(outward, (user, "in"))
            elif user in needed:
                network.add_edge(outward, "sink")
    try:
        _, (_, sink_side) = nx.minimum_cut(network, "source", "sink", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        return None
    recomputed = {n for n in candidates if (n, "in") in sink_side}
    saved = {n for n in candidates if (n, "in") not in sink_side and (n, "out") in sink_side}
    return Cut(frozenset(saved), frozenset(recomputed))


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
