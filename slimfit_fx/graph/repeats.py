"""Find the stretch of a graph that comes again and again: the identical blocks of a transformer.

Nothing in a graph says which layer a node belongs to, so repeats are found from the operators alone: nodes in order,
one number for each kind of node (graph/canonical.py), and a stretch of ``period`` nodes that is followed by its like.
Two stretches are alike if every argument of every node is either the node at the same place of its own stretch, or
comes from outside of it in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.canonical import node_text
from slimfit_fx.graph.joint import nbytes

Window = tuple[fx.Node, ...]
_PERIODS_TRIED = 12


@dataclass(frozen=True)
class Run:
    """Nodes ``start ... stop - 1``, in which the node ``period`` places on is of the same kind."""

    start: int
    stop: int
    period: int

    @property
    def saved(self) -> int:
        """How many nodes need not be compiled if each repeat is compiled once."""
        return (self.stop - self.start) // self.period * self.period - self.period


def find_run(nodes: Sequence[fx.Node], *, fewest_saved: int) -> Run | None:
    """The run of ``nodes`` that saves the most, or None if none saves ``fewest_saved`` nodes."""
    kinds = _kinds(nodes)
    runs = [run for period in _likely_periods(kinds) for run in _runs(kinds, period)]
    best = max(runs, key=lambda run: (run.saved, -run.period), default=None)
    return best if best is not None and best.saved >= fewest_saved else None


def cuts(nodes: Sequence[fx.Node], run: Run, *, spare_kernels: bool = False) -> Iterator[list[Window]]:
    """All ways to cut ``run`` into windows of one period, the one that cuts through the fewest bytes first.

    Windows that are not wired like the others are left out; what is given is the longest row of alike neighbours.
    ``spare_kernels``: bytes that cross within a kernel, which a compiler would fuse of both sides, count before all.
    """
    crossing = _crossing_bytes(nodes, lambda *_: True)
    within = _crossing_bytes(nodes, _fused(nodes)) if spare_kernels else [0] * len(crossing)
    middle = (run.start + run.stop) // 2 // run.period * run.period
    count = (run.stop - run.start) // run.period

    def price(offset: int) -> tuple[int, int, int]:
        place = min(max(run.start, middle + (run.start + offset) % run.period), run.stop)
        return within[place], crossing[place], offset

    for offset in sorted(range(run.period), key=price):
        starts = range(run.start + offset, run.stop - run.period + 1, run.period)
        windows = [tuple(nodes[s : s + run.period]) for s in starts]
        alike = _alike_neighbours(windows)
        if len(alike) >= max(2, count - 2):
            yield alike


def crossing(nodes: Sequence[fx.Node], windows: Sequence[Window]) -> set[fx.Node]:
    """Values that are made before a window begins, or before the last one ends, and read behind that place."""
    position = {node: index for index, node in enumerate(nodes)}
    borders = [position[window[0]] for window in windows] + [position[windows[-1][-1]] + 1] if windows else []
    last = {n: max((position[user] for user in n.users if user in position), default=-1) for n in nodes}
    return {n for border in borders for n in nodes[:border] if last[n] >= border}


def _kinds(nodes: Sequence[fx.Node]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(node_text(node, _get_attr_name), len(numbers)) for node in nodes]


def _get_attr_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else "%"


def _likely_periods(kinds: Sequence[int]) -> list[int]:
    """The commonest distances between a node and the next of its kind, and sums of them."""
    last: dict[int, int] = {}
    votes: Counter[int] = Counter()
    rare = {kind for kind, count in Counter(kinds).items() if count <= 256}
    for index, kind in enumerate(kinds):
        if kind in rare and kind in last:
            votes[index - last[kind]] += 1
        last[kind] = index
    return [distance for distance, _ in votes.most_common(_PERIODS_TRIED)]


def _runs(kinds: Sequence[int], period: int) -> Iterator[Run]:
    start = None
    for index in range(len(kinds) - period + 1):
        same = index + period < len(kinds) and kinds[index] == kinds[index + period]
        if same and start is None:
            start = index
        elif not same and start is not None:
            if index - start >= period:
                yield Run(start, index + period, period)
            start = None


def _crossing_bytes(nodes: Sequence[fx.Node], counts: Callable[[fx.Node, fx.Node], bool]) -> list[int]:
    """For each place, the bytes of values that are made before it and read at it or behind it, by users that count."""
    position = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        last = max((position[user] for user in node.users if user in position and counts(node, user)), default=index)
        if last > index:
            size = max(1, nbytes(node))
            change[index + 1] += size
            change[last + 1] -= size
    crossing, alive = [], 0
    for step in change:
        alive += step
        crossing.append(alive)
    return crossing


def _fused(nodes: Sequence[fx.Node]) -> Callable[[fx.Node, fx.Node], bool]:
    """Whether a compiler may make one kernel of a node and one that reads it.

    It may if both are cheap, and no product lies on another way from the one to the other.
    """
    is_cheap: dict[fx.Node, bool] = {}
    depth: dict[fx.Node, int] = {}  # products on the longest way to the node
    for node in nodes:
        sources = [argument for argument in arguments_of(node) if argument in depth]
        if sources and (ops.is_view(node) or ops.is_getitem(node)):
            is_cheap[node], depth[node] = is_cheap[sources[0]], depth[sources[0]]
            continue
        is_cheap[node] = ops.is_cheap(node) or ops.is_random(node)
        depth[node] = max((depth[s] + (not (is_cheap[node] and is_cheap[s])) for s in sources), default=0)
    return lambda node, user: is_cheap[node] and is_cheap[user] and depth[node] == depth[user]


def _alike_neighbours(windows: list[Window]) -> list[Window]:
    """The longest row of neighbours that are wired alike."""
    best: list[Window] = []
    row: list[Window] = []
    shape: object = None
    for window in windows:
        wiring = _wiring(window)
        row = [*row, window] if wiring == shape else [window]
        shape = wiring
        best = max(best, row, key=len)
    return best


def _wiring(window: Window) -> tuple[tuple[int, ...], ...]:
    """For each node the places of its arguments within the window, -1 for what comes from outside."""
    place = {node: index for index, node in enumerate(window)}
    return tuple(tuple(place.get(argument, -1) for argument in arguments_of(node)) for node in window)


def arguments_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, each as often as it occurs, in order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), found.append)
    return [n for n in found if n.op != "get_attr"]
