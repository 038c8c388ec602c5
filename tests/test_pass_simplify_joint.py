"""simplify_joint: one name for equal values, no dead code, nothing else."""

from __future__ import annotations

import torch
from graphs import ATEN, Sketch, calls, names, run_joint, stopped_after, unequal
from small_models import Tiny, tokens
from torch import fx

from slimfit_fx.passes.partition import simplify_joint


def repetitive() -> fx.GraphModule:
    """x*2 and x*3 are written down twice, x*5 is read by nobody."""
    s = Sketch()
    x = s.input("x", 4, 8)
    twice, again, thrice, thrice_again = (s.call(ATEN.mul.Tensor, x, by) for by in (2.0, 2.0, 3.0, 3.0))
    s.call(ATEN.mul.Tensor, x, 5.0)
    first, second = s.call(ATEN.add.Tensor, twice, thrice), s.call(ATEN.add.Tensor, again, thrice_again)
    return s.returns(s.call(ATEN.mm.default, first, s.call(ATEN.permute.default, second, [1, 0])))


def unsimplified(model):
    """The joint graph as AOTAutograd traced it."""
    return stopped_after("tag_liveness", model, tokens(), disabled_passes=("simplify_joint",))


def test_merges_equal_values_and_drops_dead_ones():
    module = repetitive()
    assert simplify_joint(module) == 4
    assert [n.args[1] for n in calls(module.graph, ATEN.mul.Tensor)] == [2.0, 3.0]
    assert len(calls(module.graph, ATEN.add.Tensor)) == 1


def test_random_numbers_are_drawn_as_often_as_before():
    s = Sketch()
    x = s.input("x", 4, 8)
    drawn = [s.call(ATEN.rand_like.default, x) for _ in range(2)]
    module = s.returns(s.call(ATEN.sub.Tensor, *drawn))
    assert simplify_joint(module) == 0
    assert len(calls(module.graph, ATEN.rand_like.default)) == 2


def test_values_that_differ_in_an_argument_or_its_type_stay_apart():
    s = Sketch()
    x, n = s.input("x", 4, 8), s.input("n", 4, 8, dtype=torch.int64)
    kept, dropped = s.call(ATEN.sum.dim_IntList, x, [1], True), s.call(ATEN.sum.dim_IntList, x, [1], False)
    whole, real = s.call(ATEN.mul.Tensor, n, 1), s.call(ATEN.mul.Tensor, n, 1.0)
    module = s.returns(*(s.call(ATEN.neg.default, value) for value in (kept, dropped, whole, real)))
    before = str(module.graph)
    assert simplify_joint(module) == 0
    assert str(module.graph) == before


def test_a_second_run_leaves_the_graph_as_it_is():
    module = repetitive()
    simplify_joint(module)
    before = str(module.graph)
    assert simplify_joint(module) == 0
    assert str(module.graph) == before


def test_inputs_outputs_and_what_is_known_of_them_stay():
    def known(joint):
        inputs = [n.name for n in joint.graph.find_nodes(op="placeholder")]
        return inputs, {g: n.name for g, n in joint.gates.items()}, joint.grads, names(joint.param_inputs)

    bench = unsimplified(Tiny(depth=1))
    before = known(bench.work.joint)
    assert bench.run("simplify_joint") > 0
    assert known(bench.work.joint) == before
    assert len(before[1]) == len({g for g in before[2] if g in before[1]}) > 1


def test_the_numbers_are_those_of_the_graph_before():
    bench = unsimplified(Tiny(depth=1, dropout=0.1))
    size, expected = len(bench.work.joint.graph.nodes), run_joint(bench.work.joint)
    bench.run("simplify_joint")
    assert len(bench.work.joint.graph.nodes) < size
    assert unequal(expected, run_joint(bench.work.joint)) == []
    assert sum(result is not None for result in expected) > 10
