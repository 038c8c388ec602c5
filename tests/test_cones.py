"""Cones of small backward graphs written by hand: what moves behind a gate, what stays, and why."""

from __future__ import annotations

from operator import getitem

import pytest
import torch
from effort import first
from graphs import ATEN, Sketch, names
from torch import fx

from slimfit_fx.graph.joint import STATIC
from slimfit_fx.passes.find_cones import CONE, Cone, ConePlan, early_parts, find_cones
from slimfit_fx.planning.chances import MAX_GATES_PER_CONE

MM, NEG, MUL, PERMUTE, SUM = (
    ATEN.mm.default,
    ATEN.neg.default,
    ATEN.mul.Tensor,
    ATEN.permute.default,
    ATEN.sum.dim_IntList,
)


def cones(sketch: Sketch, outputs, gates, saved=(), *, min_bytes: int = 0) -> ConePlan:
    """The plan of a graph that returns ``outputs``; ``gates`` in the same order."""
    sketch.returns(*outputs)
    before = str(sketch.graph)
    plan = find_cones(sketch.graph, gates, list(saved), min_bytes=min_bytes)
    assert str(sketch.graph) == before, "an analysis changes nothing"
    return plan


def only(plan: ConePlan, gate: int):
    (cone,) = [c for c in plan.cones if c.output is not None and c.gates == {gate}]
    return cone


def linear(sketch: Sketch, x: fx.Node, g: fx.Node) -> fx.Node:
    """The weight gradient g.t() @ x."""
    return sketch.call(MM, sketch.call(PERMUTE, g, [1, 0]), x)


# ---- homes


def test_one_gate_takes_what_serves_it_alone():
    s = Sketch()
    x, w, g = s.input("x", 4, 8), s.input("w", 6, 8), s.input("tangents_1", 4, 6)
    dw, dx = linear(s, x, g), s.call(MM, g, w)
    plan = cones(s, [dx, dw], [STATIC, 3], [x, w])
    cone = only(plan, 3)
    assert (cone.output, cone.results) == (1, (dw,))
    assert names(cone.nodes) == {"permute_default", "mm_default"} and names(cone.operands) == {"x", "tangents_1"}
    assert plan.stashes == {x: frozenset([3])} and plan.refusals == []


def test_nodes_of_a_cone_stand_in_graph_order():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    late = s.call(NEG, g)
    dw = s.call(MM, s.call(PERMUTE, s.call(NEG, late), [1, 0]), s.call(NEG, x))
    cone = only(cones(s, [dw], [0], [x]), 0)
    assert cone.nodes == [n for n in s.graph.nodes if n.op == "call_function"] and len(cone.nodes) == 5


def test_without_gates_there_is_nothing_to_do():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    plan = cones(s, [linear(s, x, g), None], [STATIC, 0], [x])
    assert (plan.cones, plan.stashes, plan.refusals) == ([], {}, [])


def test_a_cheap_node_that_two_cones_read_is_cloned_into_both():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    decoded = s.call(NEG, x)
    first, second = linear(s, decoded, g), linear(s, s.call(MUL, decoded, decoded), g)
    plan = cones(s, [first, second], [0, 1], [x])
    assert decoded in only(plan, 0).nodes and decoded in only(plan, 1).nodes
    assert plan.stashes == {x: frozenset([0, 1])} and plan.refusals == []


def test_a_cheap_node_without_a_tangent_that_main_reads_too_is_cloned():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    decoded = s.call(NEG, x)
    dx, dw = s.call(MUL, g, decoded), linear(s, decoded, g)
    plan = cones(s, [dx, dw], [STATIC, 0], [x])
    assert decoded in only(plan, 0).nodes and names(only(plan, 0).operands) == {"x", "tangents_1"}
    assert plan.stashes == {}, "the main graph reads x whatever is closed"


def test_a_cheap_node_of_a_tangent_that_main_reads_too_is_an_operand():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    scaled = s.call(MUL, g, 2.0)
    plan = cones(s, [s.call(NEG, scaled), linear(s, x, scaled)], [STATIC, 0], [x])
    assert scaled not in only(plan, 0).nodes and scaled in only(plan, 0).operands


def shared(plan: ConePlan) -> list[Cone]:
    """The cones of values that other cones read."""
    return [c for c in plan.cones if c.output is None]


def test_an_expensive_node_that_two_cones_read_gets_a_cone_on_the_or_of_their_gates():
    s = Sketch()
    x, w, g = s.input("x", 4, 8), s.input("w", 6, 6), s.input("tangents_1", 4, 6)
    product = s.call(MM, g, w)
    plan = cones(s, [linear(s, x, product), s.call(SUM, product, [0])], [0, 1], [x, w])
    (cone,) = shared(plan)
    assert (cone.results, cone.gates, cone.nodes) == ((product,), {0, 1}, [product])
    assert names(cone.operands) == {"w", "tangents_1"} and plan.cones[0] is cone and plan.refusals == []
    for gate in (0, 1):
        assert product in only(plan, gate).operands and product not in only(plan, gate).nodes
    assert plan.stashes == {w: frozenset([0, 1]), x: frozenset([0])}


def test_what_main_reads_too_stays_in_main():
    s = Sketch()
    x, w, g = s.input("x", 4, 8), s.input("w", 6, 6), s.input("tangents_1", 4, 6)
    product = s.call(MM, g, w)
    plan = cones(s, [product, linear(s, x, product), s.call(SUM, product, [0])], [STATIC, 0, 1], [x, w])
    assert shared(plan) == [] and w not in plan.stashes


def test_gradients_of_one_unit_share_a_cone_on_its_gate():
    s = Sketch()
    x, w, g = s.input("x", 4, 8), s.input("w", 6, 6), s.input("tangents_1", 4, 6)
    product = s.call(MM, g, w)
    plan = cones(s, [linear(s, x, product), s.call(SUM, product, [0])], [2, 2], [x, w])
    assert [(c.output, c.gates) for c in plan.cones] == [(None, {2}), (0, {2}), (1, {2})]


def test_cones_nest():
    """The inner product serves two of the three units that the outer one serves."""
    s = Sketch()
    w, g = s.input("w", 6, 6), s.input("tangents_1", 6, 6)
    outer = s.call(MM, g, w)
    inner = s.call(MM, outer, w)
    roots = [s.call(SUM, outer, [0]), s.call(SUM, inner, [0]), s.call(SUM, s.call(MUL, inner, inner), [1])]
    plan = cones(s, roots, [0, 1, 2], [w])
    assert [(c.results, c.gates) for c in shared(plan)] == [((outer,), {0, 1, 2}), ((inner,), {1, 2})]
    assert outer in shared(plan)[1].operands and outer not in shared(plan)[1].nodes


def test_a_sum_of_products_is_handed_on_and_not_each_of_them():
    """As the gradients of q, k and v come together at the norm before them."""
    s = Sketch()
    x, w, g = s.input("x", 4, 6), s.input("w", 6, 6), s.input("tangents_1", 4, 6)
    q, k, v = (s.call(MM, s.call(MUL, g, float(i)), w) for i in range(3))
    total = s.call(ATEN.add.Tensor, s.call(ATEN.add.Tensor, q, k), s.call(ATEN.view.default, v, [4, 6]))
    scale, embedding = s.call(SUM, s.call(MUL, total, x), [0]), s.call(MM, s.call(MUL, total, 3.0), w)
    plan = cones(s, [scale, embedding], [0, 1], [x, w])
    (cone,) = shared(plan)
    assert cone.results == (total,) and {q, k, v} < set(cone.nodes) and cone.operands == [g, w]
    assert plan.stashes == {x: frozenset([0]), w: frozenset([0, 1])} and plan.refusals == []


def test_a_product_that_is_spread_out_is_handed_on_as_it_is():
    s = Sketch()
    w, g = s.input("w", 6, 1), s.input("tangents_1", 4, 6)
    column = s.call(MM, g, w)
    wide = s.call(MUL, column, g)
    plan = cones(s, [s.call(SUM, wide, [0]), s.call(SUM, s.call(NEG, wide), [1])], [0, 1], [w])
    assert [c.results for c in shared(plan)] == [(column,)] and all(wide in only(plan, gate).nodes for gate in (0, 1))


ADD = ATEN.add.Tensor


def uses(count: int, *, rows: int = 64, last: bool = False):
    """(sketch, products, sums, operands) of a weight (6, 8) that is used ``count`` times; ``last``: from there on."""
    s = Sketch()
    pairs = [(s.input(f"x{i}", rows, 8), s.input(f"tangents_{i}", rows, 6)) for i in range(count)]
    products = [linear(s, x, g) for x, g in pairs]
    order = products[::-1] if last else products
    sums = [order[0]]
    for product in order[1:]:
        sums.append(s.call(ADD, sums[-1], product))
    return s, products, sums[1:], pairs


def test_an_early_part_of_a_sum_does_not_wait_for_the_last():
    """The factors of the first product are not held until the second is known: a tied embedding and its head."""
    s, (first, second), (total,), (early, late) = uses(2)
    plan = cones(s, [total], [3], [early[0], late[0]])
    part, cone = plan.cones
    assert (part.output, part.gates, part.results) == (None, {3}, (first,)) and names(part.operands) == names(early)
    assert (cone.output, cone.gates, cone.results) == (0, {3}, (total,))
    assert {second, total} < set(cone.nodes) and first not in cone.nodes
    assert names(cone.operands) == {first.name, *names(late)}
    assert plan.stashes == {early[0]: frozenset([3]), late[0]: frozenset([3])}


def test_a_sum_of_many_parts_grows_as_they_come():
    """A weight that all layers share: each layer's product is added to those before it."""
    s, products, sums, pairs = uses(4)
    plan = cones(s, [sums[-1]], [0], [x for x, _ in pairs])
    assert [c.results for c in plan.cones] == [(products[0],), (sums[0],), (sums[1],), (sums[2],)]
    for number, cone in enumerate(plan.cones[1:], 1):
        before = plan.cones[number - 1].results[0]
        assert names(cone.operands) == {before.name, *names(pairs[number])}


def test_a_sum_from_the_last_part_on_waits_for_it():
    s, products, sums, _ = uses(3, last=True)
    plan = cones(s, [sums[-1]], [0])
    assert [c.results for c in shared(plan)] == [(products[0],), (products[1],)]


@pytest.mark.parametrize("count", [2, 4])
def test_a_part_that_is_larger_than_its_factors_waits(count):
    s, _, sums, _ = uses(count, rows=2)
    plan = cones(s, [sums[-1]], [3])
    assert [c.results for c in plan.cones] == [(sums[-1],)]


@pytest.mark.parametrize("last", first([True, False]))
def test_a_sum_of_very_many_parts_has_few_branches(last):
    """A weight that is used for each of two thousand tokens: no stack overflows, and not every part is a branch."""
    s, products, sums, _ = uses(2000, last=last)
    found = early_parts(sums[-1], {node: place for place, node in enumerate(s.graph.nodes)})
    assert 16 < len(found) <= 32
    order = products if last else [products[0], *sums]
    places = sorted(order.index(part) for part in found)
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= 2000 // 16


def test_reductions_are_parts_too():
    """The weight of a norm that all layers share: no layer's gradients are held until the last one is done."""
    s = Sketch()
    pairs = [(s.input(f"x{i}", 64, 8), s.input(f"tangents_{i}", 64, 8)) for i in range(3)]
    first, second, third = (s.call(SUM, s.call(MUL, x, g), [0]) for x, g in pairs)
    some = s.call(ADD, first, second)
    plan = cones(s, [s.call(ADD, some, third)], [0])
    assert [c.results for c in shared(plan)] == [(first,), (some,)]
    assert names(plan.cones[0].operands) == names(pairs[0])


def test_a_part_is_found_behind_casts_and_views_and_not_where_something_else_reads_it():
    for read_elsewhere in (False, True):
        s = Sketch()
        pairs = [(s.input(f"x{i}", 64, 8), s.input(f"tangents_{i}", 64, 6)) for i in range(2)]
        first, second = (linear(s, x, g) for x, g in pairs)
        cast = s.call(torch.ops.prims.convert_element_type.default, s.call(PERMUTE, first, [1, 0]), torch.float64)
        total = s.call(ADD, cast, s.call(PERMUTE, second, [1, 0]))
        others = [s.call(SUM, first, [0])] if read_elsewhere else []
        plan = cones(s, [total, *others], [0, STATIC][: 1 + len(others)])
        assert [c.results for c in shared(plan)] == ([] if read_elsewhere else [(first,)])


def test_a_shared_value_of_a_symbolic_shape_is_always_computed():
    s = Sketch()
    g, w = s.input("tangents_1", 4, 6, symbolic=True), s.input("w", 6, 6)
    product = s.call(MM, g, w)
    plan = cones(s, [s.call(SUM, product, [0]), s.call(SUM, s.call(NEG, product), [0])], [0, 1], [w])
    assert [c.output for c in plan.cones] == [0, 1] and w not in plan.stashes
    assert plan.refusals == [
        (
            product.name,
            "serves 2 units at once: it has a symbolic shape",
        )
    ]


def test_an_element_that_alone_is_read_of_an_operator_is_shared():
    s = Sketch()
    g = s.input("tangents_1", 4, 6)
    both = s.call(ATEN.native_layer_norm.default, g, [6], None, None, 1e-5)
    value = s.call(getitem, both, 0)
    plan = cones(s, [s.call(SUM, value, [0]), s.call(SUM, s.call(NEG, value), [1])], [0, 1])
    assert [(c.results, c.nodes) for c in shared(plan)] == [((value,), [both, value])]


def test_what_a_convolution_made_is_never_shared():
    """The compiler picks its layout; both gradients, and what they read, are then where they were."""
    s = Sketch()
    both, dx = convolution(s, 0)
    product = s.call(MM, s.call(ATEN.view.default, dx, [96, 4]), s.input("w2", 4, 4))
    plan = cones(s, [s.call(SUM, product, [0]), s.call(SUM, s.call(NEG, product), [1])], [0, 1])
    assert all(both not in c.nodes and dx not in c.nodes for c in plan.cones)
    assert any("it can end no branch" in why for _, why in plan.refusals)


def test_an_expensive_node_of_one_cone_moves_into_it():
    s = Sketch()
    x, w, g = s.input("x", 4, 8), s.input("w", 6, 6), s.input("tangents_1", 4, 6)
    product = s.call(MM, g, w)
    plan = cones(s, [linear(s, x, product)], [0], [x, w])
    assert product in only(plan, 0).nodes and set(plan.stashes) == {x, w}


def gated_by_many(count: int, *, tangent: bool) -> tuple[ConePlan, fx.Node]:
    """``count`` units that read one cheap node, which depends on a tangent or on a saved value only."""
    s = Sketch()
    x, g = s.input("x", 4, 4), s.input("tangents_1", 4, 4)
    node = s.call(NEG, g if tangent else x)
    roots = [s.call(MM, node, s.call(MUL, x, float(i + 1))) for i in range(count)]
    return cones(s, roots, range(count), [x]), node


def test_a_cheap_node_of_a_tangent_is_cloned_into_few_cones_only():
    few, node = gated_by_many(MAX_GATES_PER_CONE, tangent=True)
    assert all(node in cone.nodes for cone in few.cones) and few.refusals == []
    many, node = gated_by_many(MAX_GATES_PER_CONE + 1, tangent=True)
    assert all(node in cone.operands for cone in many.cones) and shared(many) == []
    assert many.refusals == [("neg_default", "serves 5 units at once: more than 4 are hardly ever all closed")]


def test_a_cheap_node_that_more_cones_of_few_units_read_gets_a_cone_of_its_own():
    s = Sketch()
    x, g = s.input("x", 4, 4), s.input("tangents_1", 4, 4)
    node = s.call(NEG, g)
    roots = [s.call(MM, node, s.call(MUL, x, float(i + 1))) for i in range(6)]
    plan = cones(s, roots, [0, 0, 0, 1, 1, 1], [x])
    assert [(c.results, c.gates) for c in shared(plan)] == [((node,), {0, 1})]


def test_a_decode_is_cloned_into_any_number_of_cones():
    plan, node = gated_by_many(MAX_GATES_PER_CONE + 3, tangent=False)
    assert all(node in cone.nodes for cone in plan.cones) and plan.refusals == []


def test_an_operator_with_several_results_stays_whole_in_one_cone():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    both = s.call(ATEN.native_layer_norm.default, s.call(NEG, g), [8], None, None, 1e-5)
    value, mean = s.call(getitem, both, 0), s.call(getitem, both, 1)
    plan = cones(s, [linear(s, x, value), s.call(MUL, mean, mean)], [0, 1], [x])
    (cone,) = shared(plan)
    assert cone.results == (value, mean) and {both, value, mean} < set(cone.nodes) and cone.gates == {0, 1}
    assert value in only(plan, 0).operands and mean in only(plan, 1).operands and plan.refusals == []


def test_an_operator_with_a_result_of_a_symbolic_shape_is_always_computed():
    s = Sketch()
    g = s.input("tangents_1", 4, 8, symbolic=True)
    both = s.call(ATEN.native_layer_norm.default, g, [8], None, None, 1e-5)
    value, mean = s.call(getitem, both, 0), s.call(getitem, both, 1)
    plan = cones(s, [s.call(SUM, value, [0]), s.call(SUM, mean, [0])], [0, 1])
    assert {both, value, mean}.isdisjoint(n for cone in plan.cones for n in cone.nodes)
    assert {why for _, why in plan.refusals} == {"serves 2 units at once: it has a symbolic shape"}


def test_a_cheap_operator_with_several_results_is_cloned_whole():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    both = s.call(ATEN.var_mean.correction, x, [1], keepdim=True)
    variance, mean = s.call(getitem, both, 0), s.call(getitem, both, 1)
    plan = cones(s, [linear(s, s.call(MUL, x, variance), g), s.call(MUL, mean, g)], [0, 1], [x])
    for gate in (0, 1):
        inside = set(only(plan, gate).nodes)
        assert both in inside and {variance, mean} <= inside


def convolution(s: Sketch, *wanted: int) -> list[fx.Node]:
    """The operator that makes the gradients of input, weight and bias at once, and those ``wanted``."""
    x, w, g = s.input("x", 2, 3, 8, 8), s.input("w", 4, 3, 3, 3), s.input("tangents_1", 2, 4, 6, 6)
    settings = ([4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True])
    both = s.call(ATEN.convolution_backward.default, g, x, w, *settings)
    return [both, *(s.call(getitem, both, index) for index in wanted)]


def test_a_gradient_that_comes_with_a_needed_one_is_refused():
    s = Sketch()
    both, dx, dw, db = convolution(s, 0, 1, 2)
    plan = cones(s, [dx, dw, db], [STATIC, 0, STATIC], both.all_input_nodes)
    assert plan.cones == [] and plan.stashes == {}
    assert reason(plan, dw.name) == "one operator makes it together with a gradient that is always needed"


def test_an_operator_of_which_one_result_is_wanted_moves_into_the_cone():
    s = Sketch()
    both, dw = convolution(s, 1)
    cone = only(cones(s, [None, dw], [STATIC, 0], both.all_input_nodes), 0)
    assert both in cone.nodes and dw in cone.nodes


# ---- roots that cannot end in a branch


def reason(plan: ConePlan, name: str) -> str:
    (found,) = [why for what, why in plan.refusals if what == name]
    return found


def test_a_gradient_with_a_symbolic_shape_is_refused():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6, symbolic=True)
    root = s.call(MUL, g, g)
    plan = cones(s, [root], [0], [x])
    assert plan.cones == [] and reason(plan, root.name) == "its gradient has a symbolic shape"


def test_symbols_inside_a_cone_are_no_obstacle():
    s = Sketch()
    x, g = s.input("x", 5, 8, symbolic=True), s.input("tangents_1", 5, 6, symbolic=True)
    root = s.call(SUM, s.call(MUL, g, g), [0])
    plan = cones(s, [root], [0], [x])
    assert names(only(plan, 0).nodes) == {"mul_tensor", "sum_dim_int_list"} and plan.refusals == []


def test_a_gradient_of_two_parameters_is_refused():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    root = linear(s, x, g)
    plan = cones(s, [root, root], [0, 1], [x])
    assert plan.cones == [] and plan.stashes == {}
    assert {why for _, why in plan.refusals} == {"its gradient is shared with another parameter"}


def test_a_gradient_that_is_an_input_is_refused():
    s = Sketch()
    g = s.input("tangents_1", 4, 6)
    plan = cones(s, [g], [0])
    assert plan.cones == [] and reason(plan, "tangents_1") == "its gradient is an input of the backward graph"


def test_a_gradient_that_something_else_reads_is_refused():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    root = linear(s, x, g)
    plan = cones(s, [root, s.call(NEG, root)], [0, STATIC], [x])
    assert plan.cones == [] and reason(plan, root.name) == "its gradient is read by another computation"


def test_a_gradient_behind_its_gate_is_left_alone():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    root = linear(s, x, g)
    root.meta[CONE] = frozenset([0])
    plan = cones(s, [root], [0], [x])
    assert plan.cones == [] and reason(plan, root.name) == "its gradient is behind its gate already"


def test_a_gradient_that_is_not_one_tensor_is_refused():
    s = Sketch()
    g = s.input("tangents_1", 4, 8)
    root = s.call(ATEN.native_layer_norm.default, g, [8], None, None, 1e-5)
    plan = cones(s, [root], [0])
    assert plan.cones == [] and reason(plan, root.name) == "its gradient is not one tensor"


def test_a_view_of_what_is_there_anyway_is_no_cone():
    s = Sketch()
    g = s.input("tangents_1", 4, 6)
    root = s.call(PERMUTE, g, [1, 0])
    plan = cones(s, [root], [0])
    assert plan.cones == []
    assert reason(plan, root.name).startswith("its gradient costs nothing of its own: only views")


# ---- what must stay


def test_a_random_operator_stays_in_main():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    noise = s.call(ATEN.rand_like.default, g)
    dw = linear(s, x, s.call(MUL, g, noise))
    cone = only(cones(s, [dw], [0], [x]), 0)
    assert noise not in cone.nodes and noise in cone.operands


def test_an_operator_that_writes_stays_in_main():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    written = s.call(ATEN.add_.Tensor, g, 1.0)
    cone = only(cones(s, [linear(s, x, written)], [0], [x]), 0)
    assert written not in cone.nodes and written in cone.operands


# ---- stashes


def test_a_saved_value_that_main_reads_too_is_not_dropped():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    plan = cones(s, [s.call(MUL, g, x), linear(s, x, g)], [STATIC, 0], [x])
    assert x in only(plan, 0).operands and plan.stashes == {}


def test_a_saved_value_that_leaves_backward_is_not_dropped():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    plan = cones(s, [x, linear(s, x, g)], [STATIC, 0], [x])
    assert x in only(plan, 0).operands and plan.stashes == {}


def test_a_saved_value_that_feeds_a_refused_root_is_not_dropped():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 8)
    shared = linear(s, x, g)
    plan = cones(s, [linear(s, s.call(NEG, x), g), shared, shared], [0, 1, 2], [x])
    assert x in only(plan, 0).operands and plan.stashes == {}


def test_small_saved_values_are_not_dropped():
    for min_bytes, stashed in ((4 * 8 * 4, True), (4 * 8 * 4 + 1, False)):
        s = Sketch()
        x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
        plan = cones(s, [linear(s, x, g)], [0], [x], min_bytes=min_bytes)
        assert (x in plan.stashes) is stashed and len(plan.cones) == 1


def test_only_saved_values_are_dropped():
    s = Sketch()
    x, g = s.input("x", 4, 8), s.input("tangents_1", 4, 6)
    assert cones(s, [linear(s, x, g)], [0], []).stashes == {}
