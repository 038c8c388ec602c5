"""sink_backward: decode and recompute run as late as they can."""

from __future__ import annotations

import pytest
import torch
from effort import first
from graphs import ATEN, Bench, Chain, Sketch, chain_input, order, run_pair, stopped_after, unequal, values
from small_models import Tiny, tokens
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.find_cones import tangent_fed
from slimfit_fx.passes.sink_backward import sink_backward

NEG, MUL, MM, EXP = ATEN.neg.default, ATEN.mul.Tensor, ATEN.mm.default, ATEN.exp.default


def early() -> fx.GraphModule:
    """Two decodes at the top, each read by one product further down."""
    s = Sketch()
    q, r, g = s.input("q", 4, 4), s.input("r", 4, 4), s.input("tangents_1", 4, 4)
    x, y = s.call(NEG, q), s.call(EXP, r)
    y2 = s.call(MUL, y, y)
    first = s.call(MM, g, x)
    return s.returns(s.call(MM, first, y2))


def test_each_decode_comes_just_before_its_first_reader():
    module = early()
    assert order(module) == ["neg_default", "exp_default", "mul_tensor", "mm_default", "mm_default_1"]
    assert sink_backward(module) == 2
    assert order(module) == ["neg_default", "mm_default", "exp_default", "mul_tensor", "mm_default_1"]


def test_a_value_with_two_readers_comes_before_the_first():
    s = Sketch()
    q, g = s.input("q", 4, 4), s.input("tangents_1", 4, 4)
    x = s.call(NEG, q)
    a = s.call(EXP, g)
    b = s.call(MUL, a, x)
    module = s.returns(b, s.call(MUL, x, b))
    assert sink_backward(module) == 1
    assert order(module) == ["exp_default", "neg_default", "mul_tensor", "mul_tensor_1"]


def test_what_only_the_output_reads_comes_last():
    s = Sketch()
    q, g = s.input("q", 4, 4), s.input("tangents_1", 4, 4)
    x = s.call(NEG, q)
    module = s.returns(x, s.call(EXP, g))
    sink_backward(module)
    assert order(module) == ["exp_default", "neg_default"]


def test_what_a_tangent_reaches_keeps_its_order():
    s = Sketch()
    q, g, h = s.input("q", 4, 4), s.input("tangents_1", 4, 4), s.input("tangents_2", 4, 4)
    b, a = s.call(NEG, h), s.call(EXP, g)
    x = s.call(EXP, q)
    module = s.returns(s.call(MUL, a, x), b)
    before = order(module)
    assert sink_backward(module) == 0 and order(module) == before


def test_a_graph_that_writes_to_its_inputs_is_left_alone():
    s = Sketch()
    q, g = s.input("q", 4, 4), s.input("tangents_1", 4, 4)
    x = s.call(NEG, q)
    s.call(ATEN.copy_.default, q, g)
    module = s.returns(s.call(MUL, g, x))
    before = str(module.graph)
    assert sink_backward(module) == 0 and str(module.graph) == before


def test_random_numbers_keep_their_order():
    s = Sketch()
    q, g = s.input("q", 4, 4), s.input("tangents_1", 4, 4)
    noise, more = s.call(ATEN.rand_like.default, q), s.call(ATEN.bernoulli.p, q, 0.5)
    module = s.returns(s.call(MUL, s.call(EXP, g), more), noise)
    before = order(module)
    assert sink_backward(module) == 0 and order(module) == before


def gated(model, batch, **settings) -> Bench:
    return stopped_after("insert_gates", model, batch, **settings)


def test_a_second_run_leaves_the_graph_as_it_is():
    for module in (early(), gated(Chain(), chain_input(), preset="balanced").work.pair().backward):
        assert sink_backward(module) > 0
        before = str(module.graph)
        assert sink_backward(module) == 0 and str(module.graph) == before


def test_only_the_order_of_backward_changes():
    bench = gated(Chain(), chain_input(), preset="balanced")
    forward, backward = (sorted(str(bench.work.pair().forward.graph).split("\n")), bench.work.pair().backward)
    lines = sorted(str(backward.graph).split("\n"))
    assert bench.run("sink_backward") > 0
    assert sorted(str(bench.work.pair().forward.graph).split("\n")) == forward
    assert sorted(str(backward.graph).split("\n")) == lines


def peak_of_waiting(graph: fx.Graph) -> int:
    """Most values that no tangent reaches and that wait for a reader at one time."""
    fed, position = tangent_fed(graph), {n: i for i, n in enumerate(graph.nodes)}
    waiting = [
        (position[n], max(position[u] for u in n.users))
        for n in graph.nodes
        if n.op == "call_function" and n not in fed and n.users and ops.is_tensor(n)
    ]
    return max(sum(made <= i < last for made, last in waiting) for i in range(len(position)))


def test_fewer_values_wait_in_a_transformer():
    bench = gated(Tiny(depth=2), tokens(), preset="balanced")
    graph = bench.work.pair().backward.graph
    before = peak_of_waiting(graph)
    bench.run("sink_backward")
    assert peak_of_waiting(graph) < before


@pytest.mark.parametrize("closed", first([True, False]))
def test_the_numbers_do_not_change(closed):
    bench = gated(Tiny(depth=1), tokens(), preset="balanced", debug=True)
    shut = {node.name for gate, node in bench.work.joint.gates.items() if closed and gate % 2}
    outputs, expected = run_pair(bench.work.pair(), closed=shut)
    assert bench.run("sink_backward") > 0
    again, grads = run_pair(bench.work.pair(), closed=shut)
    assert unequal(outputs, again) == [] and unequal(expected, grads) == []


def test_the_numbers_of_the_graph_by_hand():
    module, expected = early(), early()
    inputs = values(module.graph)
    sink_backward(module)
    assert torch.equal(module(*inputs)[0], expected(*inputs)[0])
