"""insert_gates: cones behind their gates, ghosts for what only closed cones would read."""

from __future__ import annotations

import itertools

import pytest
import torch
from graphs import (
    ATEN,
    Bench,
    Chain,
    Fork,
    Sketch,
    calls,
    chain_input,
    names,
    run_pair,
    stopped_after,
    texts,
    unequal,
    values,
)
from reference import compile_reference, differences, equal_bits, loss_of, optimized, step
from small_models import Tiny, tokens
from torch import Tensor, nn

from bench.measure import step_peak
from slimfit_fx.passes.find_cones import CONE, ConePlan, find_cones
from slimfit_fx.passes.insert_codecs import ENCODED
from slimfit_fx.passes.insert_gates import ANY_OPEN, GATE, GATES, LAID_OUT, RELEASE, insert_gates
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.verify import COND, GHOST, STASH
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.ghosts import is_ghost


def compressed(model, batch, **settings) -> Bench:
    return stopped_after("insert_codecs", model, batch, **settings)


@pytest.fixture
def chain() -> Bench:
    """Three linear layers: the gates of their weights are 0, 1 and 2."""
    return compressed(Chain(), chain_input())


def gate_name(bench: Bench, gate: int) -> str:
    return bench.work.joint.gates[gate].name


def weight_grads(bench: Bench) -> dict[int, int]:
    """Gate -> place of its gradient among the outputs of backward."""
    return {gate: place for place, gate in enumerate(bench.work.joint.grads) if gate >= 0}


# ---- it rewrites


def test_every_unit_gets_its_branch_and_its_gate_crosses_over(chain):
    assert chain.run("insert_gates") == 3
    seam = chain.work.pair()
    branches = calls(seam.backward.graph, COND)
    assert {b.meta[CONE] for b in branches} == {frozenset([0]), frozenset([1]), frozenset([2])}
    assert all({b.args[0].meta[GATE]} == b.meta[CONE] for b in branches)
    crossed = [v for v, _ in seam.saved()][:3]
    assert [v.name for v in crossed] == [gate_name(chain, gate) for gate in range(3)], "ahead of all saved tensors"


def test_the_products_of_a_unit_are_in_its_branch_only(chain):
    chain.run("insert_gates")
    backward = chain.work.pair().backward
    assert len(calls(backward.graph, ATEN.mm.default)) == 2, "the input gradients of layers two and three"
    opened = [module for name, module in backward.named_children() if name.endswith("_open")]
    closed = [module for name, module in backward.named_children() if name.endswith("_closed")]
    assert [len(calls(m.graph, ATEN.mm.default)) for m in opened] == [1, 1, 1]
    assert [[n.target for n in m.graph.nodes if n.op == "call_function"] for m in closed] == [[GHOST]] * 3


def test_a_dynamic_activation_is_stashed_behind_the_node_that_makes_it(chain):
    chain.run("insert_gates")
    graph = chain.work.pair().forward.graph
    (stash,) = calls(graph, STASH)
    value, gates, debug = stash.args
    assert (value.name, names(gates), debug) == ("addmm", {gate_name(chain, 1)}, False)
    assert stash.prev is value and list(stash.users) == [graph.output_node()]
    (ghost,) = [p for p in chain.work.pair().backward.graph.find_nodes(op="placeholder") if GATES in p.meta]
    assert ghost.meta[GATES] == frozenset([1]) and "addmm" not in names(chain.work.pair().backward.graph.nodes)


def test_a_branch_lets_its_operands_go(chain):
    chain.run("insert_gates")
    for branch in calls(chain.work.pair().backward.graph, COND):
        (result,) = branch.users
        (released,) = result.users
        assert released.target is RELEASE and set(released.args[1]) == set(branch.args[3])
        assert [u.op for u in released.users] == ["output"]


def test_only_what_pointwise_kernels_write_is_laid_out(chain):
    chain.run("insert_gates")
    pinned = [n.args[0] for n in calls(chain.work.pair().backward.graph, LAID_OUT)]
    assert [n.target for n in pinned] == [ATEN.mul.Tensor], "not the products, not the inputs"


class Shared(nn.Module):
    """Two layers read one hidden value: it is needed if either of them trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.left(hidden) * 2.0 + self.right(hidden)


def test_a_value_that_two_units_read_looks_at_both_gates():
    bench = compressed(Shared(), (torch.randn(16, 8),))
    bench.run("insert_gates")
    (stash,) = calls(bench.work.pair().forward.graph, STASH)
    assert stash.meta[GATES] == frozenset([1, 2]) and len(stash.args[1]) == 2


@pytest.fixture
def fork() -> Bench:
    """Every matrix has a gate, and the scale."""
    return compressed(Fork(), chain_input(), units=["*weight", "scale"])


def test_a_value_that_two_cones_read_is_behind_both_gates(fork):
    fork.run("insert_gates")
    graph = fork.work.pair().backward.graph
    (switch,) = calls(graph, ANY_OPEN)
    (outer,) = [c for c in calls(graph, COND) if c.args[0] is switch]
    assert len(outer.meta[CONE]) == 2 and switch.meta[GATES] == outer.meta[CONE]
    inside = getattr(fork.work.pair().backward, str(outer.args[1].target)).graph
    assert len(calls(inside, ATEN.mm.default)) == 2, "the gradients of the inputs of left and right"
    (result,) = outer.users
    (released,) = result.users
    inner = [user for user in released.users if user.target is COND]
    assert len(inner) == 2 and frozenset().union(*(c.meta[CONE] for c in inner)) == outer.meta[CONE]
    assert len(calls(graph, ATEN.mm.default)) == 1, "the gradient of the input of last"


def test_gates_and_switches_are_on_the_cpu_whatever_the_default_device():
    """A branch on a tensor elsewhere would wait for that device."""
    gates = [torch.tensor(False), torch.tensor(True)]
    param = nn.Parameter(torch.ones(2))
    with torch.device("meta"):
        table = GateTable({"w": [param]})
        assert table.gate_of(param).device.type == table.always_open.device.type == "cpu"
        table.set_open([], 1)
        assert table.gate_of(param).device.type == "cpu" and not bool(table.gate_of(param))
        assert ANY_OPEN(gates).device.type == "cpu" and bool(ANY_OPEN(gates)) and not bool(ANY_OPEN(gates[:1]))


@pytest.mark.parametrize("debug", [False, True], ids=["ghosts", "nan"])
def test_inner_branches_get_the_same_bits_whoever_else_is_closed(debug):
    bench = compressed(Fork(), chain_input(), units="*", debug=debug)
    outputs, expected = run_pair(bench.work.pair())
    bench.run("insert_gates")
    places = weight_grads(bench)
    for count in range(len(places) + 1):
        for opened in itertools.combinations(places, count):
            again, grads = run_pair(bench.work.pair(), closed={gate_name(bench, g) for g in places if g not in opened})
            assert unequal(outputs, again) == []
            assert unequal([expected[places[g]] for g in opened], [grads[places[g]] for g in opened]) == []


class Rows(nn.Module):
    """What enters ``two`` serves the gradient of its weight only; the number of rows may be a symbol."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_a_branch_receives_the_symbols_of_its_operands():
    bench = compressed(Rows(), (torch.randn(12, 8),), dynamic=True)
    bench.run("insert_gates")
    branches = calls(bench.work.pair().backward.graph, COND)
    symbols = [[o for o in b.args[3] if isinstance(o.meta["val"], torch.SymInt)] for b in branches]
    assert len(branches) == 2 and all(len(found) == 1 and found[0].op == "placeholder" for found in symbols)


def stashed(*, dynamic: bool) -> list[bool]:
    """For each part of the encoded input of the second layer: is it dropped when its gate is closed?"""
    bench = compressed(Rows(), (torch.randn(12, 8),), dynamic=dynamic, preset="balanced")
    bench.run("insert_gates")
    return [v.target is STASH for v, _ in bench.work.pair().saved() if ENCODED in v.meta]


def test_all_parts_of_an_encoded_value_are_dropped():
    assert stashed(dynamic=False) == [True, True]


def test_all_parts_of_an_encoded_value_with_a_symbolic_size_are_dropped():
    assert stashed(dynamic=True) == [True, True]


# ---- it leaves alone


def test_without_cones_nothing_changes(chain):
    before = texts(chain.work)
    assert insert_gates(chain.work.pair(), ConePlan(), {}, debug=False) == 0
    assert texts(chain.work) == before


def test_a_second_run_changes_nothing(chain):
    chain.run("insert_gates")
    before = texts(chain.work)
    assert chain.run("insert_gates") == 0
    assert texts(chain.work) == before
    assert {why for _, why in chain.work.cones.refusals} == {"its gradient is behind its gate already"}


def test_without_units_nothing_changes(chain):
    chain.work.joint.grads[:] = [-1 for _ in chain.work.joint.grads]
    before = texts(chain.work)
    assert chain.run("insert_gates") == 0
    assert texts(chain.work) == before


def by_hand(kind: str) -> Seam:
    """A weight gradient that reads a saved value which is an input, a view of one, or returned to the user."""
    forward, backward = Sketch(), Sketch()
    backward.mode = forward.mode
    x, w, gate = forward.input("x", 4, 8), forward.input("w", 8, 6), forward.input("gate", dtype=torch.bool)
    value = {
        "input": lambda: x,
        "view of an input": lambda: forward.call(ATEN.view.default, x, [4, 8]),
        "user output": lambda: forward.call(ATEN.neg.default, x),
        "base of a user output": lambda: forward.call(ATEN.neg.default, x),
        "computed": lambda: forward.call(ATEN.neg.default, x),
    }[kind]()
    y = forward.call(ATEN.mm.default, value, w)
    user = {
        "user output": lambda: value,
        "base of a user output": lambda: forward.call(ATEN.permute.default, value, [1, 0]),
    }.get(kind, lambda: y)()
    seen = backward.graph.placeholder(value.name)
    seen.meta["val"] = value.meta["val"]
    g = backward.input("tangents_1", 4, 6)
    grad = backward.call(ATEN.mm.default, backward.call(ATEN.permute.default, seen, [1, 0]), g)
    seam = Seam(forward.returns(y, user, value), backward.returns(grad), 2)
    plan = find_cones(seam.backward.graph, [0], [seen], min_bytes=0)
    assert plan.stashes == {seen: frozenset([0])}
    assert insert_gates(seam, plan, {0: gate}, debug=False) == 1
    return seam


@pytest.mark.parametrize("kind", ["input", "view of an input", "user output", "base of a user output"])
def test_what_is_alive_anyway_is_not_stashed(kind):
    assert calls(by_hand(kind).forward.graph, STASH) == []


def test_what_is_computed_is_stashed():
    assert len(calls(by_hand("computed").forward.graph, STASH)) == 1


def test_refused_gradients_say_why_in_the_plan():
    """A parameter that is added twice has one gradient for two places; a bias that is added to all is a view."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.first + self.second

    model, session = optimized(Sum(), scheduler="none", preset="exact", units=lambda name, param: True)
    step(model, model, (torch.randn(8, 8),))
    reasons = {unit.name: unit.reason for unit in session.plan.units}
    assert reasons.pop("weight") == ""
    assert all("its gradient is an input of the backward graph" in why for why in reasons.values())


# ---- the numbers hold


@pytest.mark.parametrize("debug", [False, True], ids=["ghosts", "nan"])
@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_open_units_get_the_same_bits_and_closed_ones_a_ghost(closed, debug):
    bench = compressed(Chain(), chain_input(), debug=debug)
    outputs, expected = run_pair(bench.work.pair())
    bench.run("insert_gates")
    again, grads = run_pair(bench.work.pair(), closed={gate_name(bench, gate) for gate in closed})
    assert unequal(outputs, again) == []
    for gate in closed:  # nobody may read a ghost, so not the comparison below either
        ghost, expected[weight_grads(bench)[gate]] = grads[weight_grads(bench)[gate]], None
        assert ghost.isnan().all() if debug else is_ghost(ghost)
        grads[weight_grads(bench)[gate]] = None
    assert unequal(expected, grads) == []


@pytest.mark.parametrize("closed", [False, True])
def test_a_stash_holds_no_byte_when_its_gates_are_closed(chain, closed):
    chain.run("insert_gates")
    seam = chain.work.pair()
    place = [v.target is STASH for v, _ in seam.saved()].index(True)
    inputs = values(seam.forward.graph, closed=[gate_name(chain, 1)] if closed else [])
    kept = seam.forward(*inputs)[seam.num_fwd_outputs + place]
    assert is_ghost(kept) is closed and kept.shape == (16, 16)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_transformer_has_the_same_bits(preset):
    bench = compressed(Tiny(depth=1), tokens(), preset=preset)
    outputs, expected = run_pair(bench.work.pair())
    assert bench.run("insert_gates") > 5
    again, grads = run_pair(bench.work.pair())
    assert unequal(outputs, again) == [] and unequal(expected, grads) == []


@pytest.mark.inductor
def test_compiled_inner_branches_get_the_same_bits_and_the_predicted_peak():
    """The compiler's own branches, nested: the open ones are those of torch.compile, whoever else is closed."""
    reference = Fork()
    batch = (torch.randn(512, 8, generator=torch.Generator().manual_seed(1)),)
    expected_loss, expected = step(compile_reference(reference, executor="inductor"), reference, batch)
    model, session = optimized(Fork(), scheduler="none", preset="exact", units="*", executor="inductor", min_bytes=0)
    for closed in ((), ("first.weight",), ("scale",), ("first.weight", "scale"), session.gates.names):
        session.unfreeze()
        session.freeze(list(closed)) if closed else None
        loss, grads = step(model, model, batch)
        assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=set(closed)) == []
        model.zero_grad(set_to_none=True)
        measured = step_peak(lambda: loss_of(model(*batch)), backward=lambda loss: loss.backward()).peak_bytes
        assert session.predict_peak().peak_bytes == pytest.approx(measured, rel=0.01), closed
    assert session.recompiles == 0
