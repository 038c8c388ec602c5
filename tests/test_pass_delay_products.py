"""delay_products: a product runs as late as its first reader allows, where that makes room."""

from __future__ import annotations

import pytest
import torch
from effort import examples, first
from graphs import ATEN, Sketch, order, run_pair, stopped_after, unequal, watching
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from small_models import Tiny, tokens
from strategies import build, inputs, specs
from torch import fx

from slimfit_fx.passes.delay_products import delay_products
from slimfit_fx.passes.insert_gates import GATE
from slimfit_fx.planning import stand_ins
from slimfit_fx.planning.blocks import Meter, TensorSpec, storage_bytes
from slimfit_fx.planning.graph_run import run_graph
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.stand_ins import DryRun
from slimfit_fx.presets import RECOMPUTE

NEG, MUL, MM, EXP, T = ATEN.neg.default, ATEN.mul.Tensor, ATEN.mm.default, ATEN.exp.default, ATEN.t.default


def feed_forward(*, wide: int = 64, view: bool = False) -> fx.GraphModule:
    """The gradient of a layer's input (8, wide), then that of its weight from what is recomputed, then a reader."""
    s = Sketch()
    w, x, g = s.input("primals_1", 4, wide), s.input("x", 8, wide), s.input("tangents_1", 8, 4)
    grad = s.call(MM, g, w)
    seen = s.call(ATEN.view.default, grad, [2, 4, wide]) if view else grad
    hidden = s.call(EXP, x)
    weight = s.call(MM, s.call(T, g), hidden)
    other = s.call(ATEN.view.default, x, [2, 4, wide]) if view else x
    return s.returns(s.call(MUL, seen, other), weight)


@pytest.mark.parametrize("view", [False, True])
def test_the_gradient_of_the_weight_comes_first(view):
    module = feed_forward(view=view)
    first = ["mm_default", "view_default"] if view else ["mm_default"]
    assert order(module)[: len(first)] == first
    assert delay_products(module) == 1
    found = order(module)
    assert found[-1 - len(first) : -1] == first and found[-1] == "mul_tensor"
    assert found.index("mm_default_1") < found.index("mm_default")


def test_a_second_run_leaves_the_graph_as_it_is():
    module = feed_forward()
    delay_products(module)
    before = str(module.graph)
    assert delay_products(module) == 0 and str(module.graph) == before


def test_two_products_that_wait_for_one_reader_stay_in_their_order():
    s = Sketch()
    w, x, g = s.input("primals_1", 4, 64), s.input("x", 8, 64), s.input("tangents_1", 8, 4)
    one, two = s.call(MM, g, w), s.call(MM, g, s.call(NEG, w))
    kept = s.call(MM, s.call(T, g), x)
    module = s.returns(s.call(MUL, one, two), kept)
    assert delay_products(module) == 2
    assert [n for n in order(module) if n.startswith("mm")] == ["mm_default_2", "mm_default", "mm_default_1"]
    assert delay_products(module) == 0


def test_a_product_that_frees_more_than_it_makes_stays():
    s = Sketch()
    w, g = s.input("primals_1", 64, 4), s.input("tangents_1", 8, 64)
    grad = s.call(MM, g, w)  # (8, 4), the last to read a gradient of (8, 64)
    other = s.call(EXP, s.input("x", 8, 4))
    module = s.returns(s.call(MUL, grad, other))
    before = order(module)
    assert delay_products(module) == 0 and order(module) == before


def test_a_product_whose_reader_makes_nothing_stays():
    s = Sketch()
    w, g = s.input("primals_1", 4, 64), s.input("tangents_1", 8, 4)
    h = s.call(NEG, g)
    grad = s.call(MM, h, w)  # the last to read h
    other = s.call(EXP, s.input("x", 8, 64))
    module = s.returns(s.call(ATEN.sum.default, s.call(T, grad)), other)
    assert delay_products(module) == 0, "h would stay while x is read, and the sum makes next to nothing"


def test_nothing_moves_in_a_graph_that_writes_to_its_inputs():
    s = Sketch()
    w, x, g = s.input("primals_1", 4, 64), s.input("x", 8, 64), s.input("tangents_1", 8, 4)
    grad = s.call(MM, g, w)
    s.call(ATEN.copy_.default, x, s.call(EXP, x))
    module = s.returns(s.call(MUL, grad, x))
    assert delay_products(module) == 0


@pytest.mark.parametrize("closed", first([True, False]))
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_numbers_do_not_change(closed, recompute):
    bench = stopped_after("sink_backward", Tiny(depth=1), tokens(), preset="balanced", debug=True, recompute=recompute)
    shut = {node.name for gate, node in bench.work.joint.gates.items() if closed and gate % 2}
    outputs, expected = run_pair(bench.work.pair(), closed=shut)
    assert bench.run("delay_products") > 0
    again, grads = run_pair(bench.work.pair(), closed=shut)
    assert unequal(outputs, again) == [] and unequal(expected, grads) == []


def backward_trace(module: fx.GraphModule, num_gates: int) -> StepTrace:
    """The memory of backward as the interpreter runs it; what forward saved is given back when it was read last.

    Results only: what operators take for themselves is left out.
    """
    meter = Meter()
    run = DryRun(meter)
    arguments = []
    for node in module.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor):
            arguments.append(int(val))
            continue
        spec = TensorSpec.of(val)
        held = "primals" in str(node.target) or GATE in node.meta
        size = storage_bytes(spec.shape, spec.strides, spec.dtype.itemsize)
        block = None if held else meter.allocate(size, node.name)
        arguments.append(run.of(spec, block, frozenset([node.meta[GATE]] if GATE in node.meta else [])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "call_memory", lambda *_: None)
        patch.setattr(stand_ins, "workspace_bytes", lambda *_: 0)
        results = run_graph(module, arguments, run)
    trace = StepTrace(tuple(meter.events), 0, dict(meter.labels), num_gates)
    del results
    return trace


@pytest.mark.thorough
@settings(max_examples=examples(30))
@given(
    spec=specs(sizes=("static",)), recompute=st.sampled_from(RECOMPUTE), preset=st.sampled_from(("exact", "balanced"))
)
def test_no_moment_takes_more_than_before(spec, recompute, preset):
    """For any model, with all gates closed, all open, and some."""
    torch._dynamo.reset()
    found: list[tuple[StepTrace, int]] = []

    def watch(step, work):
        if step.name in ("sink_backward", "delay_products"):
            gates = len(work.joint.gates)
            found.append((backward_trace(work.pair().backward, gates), gates))

    settings_ = {"scheduler": "none", "preset": preset, "min_bytes": 0, "units": spec.is_unit, "recompute": recompute}
    with watching(watch), spec.context():
        model, _ = optimized(build(spec), **settings_)
        model(*inputs(spec))
    for (before, gates), (after, _) in zip(found[::2], found[1::2], strict=True):
        for pattern in ((), range(gates), range(0, gates, 2), range(gates // 2)):
            assert after.peak(pattern).peak_bytes <= before.peak(pattern).peak_bytes
