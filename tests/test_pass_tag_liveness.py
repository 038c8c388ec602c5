"""tag_liveness: which gradients does each value still serve?"""

from __future__ import annotations

from graphs import ATEN, Chain, Sketch, chain_input, stopped_after
from torch import fx

from slimfit_fx.graph.joint import STATIC, GateLayout, JointGraph
from slimfit_fx.passes.liveness import SERVES, is_dynamic, served_gates, tag_liveness

MM, NEG, PERMUTE = ATEN.mm.default, ATEN.neg.default, ATEN.permute.default


def two_layers() -> tuple[JointGraph, dict[str, fx.Node]]:
    """y = (x @ w1) @ w2 with the gradients of x (static), w1 (gate 0) and w2 (gate 1)."""
    s = Sketch()
    x, w1, w2 = s.input("x", 4, 8), s.input("w1", 8, 6), s.input("w2", 6, 5)
    hidden = s.call(MM, x, w1)
    y = s.call(MM, hidden, w2)
    g = s.input("tangents_1", 4, 5)
    dw2 = s.call(MM, s.call(PERMUTE, hidden, [1, 0]), g)
    dh = s.call(MM, g, s.call(PERMUTE, w2, [1, 0]))
    dw1 = s.call(MM, s.call(PERMUTE, x, [1, 0]), dh)
    dx = s.call(MM, dh, s.call(PERMUTE, w1, [1, 0]))
    module = s.returns(y, dx, dw1, dw2)
    joint = JointGraph(module, 1, GateLayout(3, ((1,), (2,))), {}, [STATIC, 0, 1])
    return joint, {"x": x, "w1": w1, "w2": w2, "hidden": hidden, "y": y, "g": g, "dh": dh, "dw1": dw1, "dx": dx}


def tags(nodes: dict[str, fx.Node]) -> dict[str, set[int]]:
    return {name: set(node.meta[SERVES]) for name, node in nodes.items()}


def test_a_value_serves_the_gradients_that_depend_on_its_backward_readers():
    joint, nodes = two_layers()
    tag_liveness(joint)
    assert tags(nodes) == {
        "x": {0},
        "hidden": {1},
        "w1": {STATIC},
        "w2": {STATIC, 0},
        "g": {STATIC, 0, 1},
        "dh": {STATIC, 0},
        "dw1": {0},
        "dx": {STATIC},
        "y": set(),
    }


def test_every_node_but_the_output_is_tagged_and_the_graph_is_as_it_was():
    joint, _ = two_layers()
    before = str(joint.graph)
    count = tag_liveness(joint)
    assert count == len(joint.graph.nodes) - 1 and all(SERVES in n.meta for n in joint.graph.nodes if n.op != "output")
    assert str(joint.graph) == before


def test_a_second_run_says_the_same():
    joint, nodes = two_layers()
    tag_liveness(joint)
    first = tags(nodes)
    tag_liveness(joint)
    assert tags(nodes) == first


def test_without_gradients_nothing_serves_anything():
    joint, nodes = two_layers()
    joint.graph.output_node().args = ((nodes["y"], None, None, None),)
    tag_liveness(joint)
    assert set(map(frozenset, tags(nodes).values())) == {frozenset()}


def test_one_gradient_may_be_that_of_two_units():
    joint, nodes = two_layers()
    serves = served_gates(joint.graph, [(nodes["dh"], 4), (nodes["dh"], STATIC), (nodes["dw1"], 0)])
    assert serves[nodes["dh"]] == {4, STATIC, 0} and serves[nodes["x"]] == {0} and serves[nodes["dx"]] == set()


def test_a_real_graph_knows_its_dynamic_activations():
    """What enters the second layer of the chain serves its weight only; the input of the GELU is always needed."""
    joint = stopped_after("tag_liveness", Chain(), chain_input()).work.joint
    tagged = {n.name: n.meta[SERVES] for n in joint.graph.nodes if n.op != "output"}
    assert tagged["addmm"] == {1} and is_dynamic(tagged["addmm"])
    assert STATIC in tagged["addmm_1"] and not is_dynamic(tagged["addmm_1"])
    assert not is_dynamic(frozenset()), "what serves nothing is not kept for a gate"
