"""The minimum cut: the cheapest mix of saving and recomputing, held against all mixes there are."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
from graphs import ATEN, Sketch, names
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from slimfit_fx.planning.mincut import Cut, minimum_cut

NEG, MUL = ATEN.neg.default, ATEN.mul.Tensor


class Costs:
    """A graph written by hand, with what it costs to save a value or to compute it again."""

    def __init__(self) -> None:
        self.sketch = Sketch()
        self.save: dict[fx.Node, float] = {}
        self.again: dict[fx.Node, float] = {}
        self.backward: set[fx.Node] = set()

    def input(self, name: str, save: float = 0.0) -> fx.Node:
        node = self.sketch.input(name, 2)
        self.save[node] = save
        return node

    def value(self, *inputs: fx.Node, save: float, again: float) -> fx.Node:
        node = self.sketch.call(*((NEG, inputs[0]) if len(inputs) == 1 else (MUL, *inputs[:2])))
        self.save[node], self.again[node] = save, again
        return node

    def reader(self, *inputs: fx.Node) -> fx.Node:
        """A node that only backward can run."""
        node = self.sketch.call(*((NEG, inputs[0]) if len(inputs) == 1 else (MUL, *inputs[:2])))
        self.backward.add(node)
        return node

    def cut(self, needed: set[fx.Node] | None = None) -> Cut | None:
        self.sketch.returns(*(needed or self.backward))
        return minimum_cut(
            self.sketch.graph,
            self.backward,
            self.backward if needed is None else needed,
            lambda n: self.save[n],
            lambda n: self.again[n],
        )


def chain(*, save: float, again: float) -> tuple[Cut | None, fx.Node, fx.Node]:
    """x -> a (8 bytes) -> b (``save`` bytes, ``again`` to compute), and backward reads b."""
    costs = Costs()
    a = costs.value(costs.input("x", save=100.0), save=8.0, again=math.inf)
    b = costs.value(a, save=save, again=again)
    costs.reader(b)
    return costs.cut(), a, b


def test_saves_what_is_smaller():
    cut, _, b = chain(save=4.0, again=1.0)
    assert cut == Cut(frozenset([b]), frozenset())


def test_recomputes_what_is_cheaper():
    cut, a, b = chain(save=16.0, again=1.0)
    assert cut == Cut(frozenset([a]), frozenset([b]))


def test_the_price_of_running_again_counts():
    cut, _, b = chain(save=16.0, again=8.5)
    assert cut == Cut(frozenset([b]), frozenset())


def test_infinity_forbids():
    cut, a, b = chain(save=math.inf, again=1e6)
    assert cut == Cut(frozenset([a]), frozenset([b]))
    cut, a, b = chain(save=1e6, again=math.inf)
    assert cut == Cut(frozenset([b]), frozenset())


def test_no_cut_when_a_value_can_neither_be_saved_nor_computed():
    assert chain(save=math.inf, again=math.inf)[0] is None


def test_a_value_with_two_readers_is_saved_once():
    """Saving a (8) beats saving its two readers (5 each); with readers of 3 each it is the other way round."""
    for size, saved in ((5.0, {"neg_default"}), (3.0, {"neg_default_1", "mul_tensor"})):
        costs = Costs()
        x = costs.input("x", save=math.inf)
        a = costs.value(x, save=8.0, again=math.inf)
        left, right = costs.value(a, save=size, again=0.0), costs.value(a, a, save=size, again=0.0)
        costs.reader(left, right)
        assert names(costs.cut().saved) == saved


def test_what_no_gradient_needs_is_neither_saved_nor_computed():
    costs = Costs()
    x = costs.input("x", save=1.0)
    wanted, idle = costs.value(x, save=4.0, again=1.0), costs.value(x, x, save=4.0, again=1.0)
    reader = costs.reader(wanted)
    costs.reader(idle)
    cut = costs.cut({reader})
    assert idle not in cut.saved | cut.recomputed and wanted in cut.saved | cut.recomputed


def test_readers_that_no_gradient_needs_do_not_count():
    costs = Costs()
    a = costs.value(costs.input("x", save=math.inf), save=100.0, again=math.inf)
    b = costs.value(a, save=4.0, again=1.0)
    reader = costs.reader(b)
    costs.reader(a)
    assert costs.cut({reader}) == Cut(frozenset([b]), frozenset())


def price(costs: Costs, saved: set[fx.Node]) -> float:
    """What it costs to save ``saved`` and to compute all else that backward reads from it: inf if impossible."""
    total, seen = sum(costs.save[n] for n in saved), set(saved)
    stack = [i for r in costs.backward for i in r.all_input_nodes if i not in costs.backward]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            total += math.inf if node.op == "placeholder" else costs.again[node]
            stack += node.all_input_nodes
    return total


@st.composite
def graphs(draw) -> Costs:
    costs = Costs()
    sizes = st.sampled_from((0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, math.inf))
    nodes = [costs.input(f"x{i}", save=draw(st.sampled_from((0.0, 2.0, math.inf)))) for i in range(2)]
    for _ in range(draw(st.integers(1, 5))):
        inputs = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2))
        nodes.append(costs.value(*inputs, save=draw(sizes), again=draw(sizes)))
    for _ in range(draw(st.integers(1, 3))):
        costs.reader(*draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2)))
    return costs


@given(graphs())
def test_no_other_choice_is_cheaper(costs):
    values = list(costs.save)
    best = min(price(costs, set(some)) for r in range(len(values) + 1) for some in itertools.combinations(values, r))
    cut = costs.cut()
    if cut is None:
        assert best == math.inf
    else:
        assert not cut.saved & cut.recomputed
        assert price(costs, set(cut.saved)) == best
        assert sum(costs.save[n] for n in cut.saved) + sum(costs.again[n] for n in cut.recomputed) == best


_PLAN = """
import sys

import torch
from graphs import stopped_after, texts
from small_models import Tiny, tokens
import slimfit_fx

torch.set_num_threads(1)
for preset, recompute in zip(sys.argv[2::2], sys.argv[3::2]):
    settings = {"preset": preset, "recompute": recompute, "min_bytes": 0, "freeze_rate": 0.9}
    bench = stopped_after("outline_repeats", Tiny(depth=2), tokens(), executor="inductor", **settings)
    print(*texts(bench.work), sep="\\n")
if sys.argv[1] == "plan":
    print(slimfit_fx.plan(Tiny(depth=3), *tokens(), config=slimfit_fx.Config(**settings)).to_json())
"""


@pytest.mark.parametrize(
    "asked",
    [
        ("graphs", "max", "blocks"),
        pytest.param(("plan", "balanced", "cheap", "max", "blocks"), marks=pytest.mark.thorough),
    ],
    ids=lambda asked: asked[0],
)
def test_the_plan_is_the_same_in_every_process(asked):
    """Sets of nodes are walked in another order in each: neither the plan nor a graph may show it."""
    found = {}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-c", _PLAN, *asked],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        found[seed] = ran.stdout
    assert len(found["1"]) > 10_000 and found["1"] == found["2"]
