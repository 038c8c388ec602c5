"""hold_recompute: every product gets a decode of its own, which waits for the gradient before it."""

from __future__ import annotations

import pytest
from effort import first
from graphs import ATEN, Bench, Sketch, calls, run_pair, stopped_after, unequal, values
from small_models import Tiny, tokens
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.passes.find_cones import tangent_fed
from slimfit_fx.passes.hold_recompute import HOLD, LONGEST_CHAIN, hold_recompute
from slimfit_fx.passes.pipeline import holdable_placeholders

NEG, MUL, MM, EXP = ATEN.neg.default, ATEN.mul.Tensor, ATEN.mm.default, ATEN.exp.default


def attention() -> tuple[fx.GraphModule, list[fx.Node]]:
    """A first product makes the token; then two products read one decode of q, the second one further down."""
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    decoded = s.call(NEG, q)
    token = s.call(MM, g, w)
    first = s.call(MM, token, decoded)
    second = s.call(MM, s.call(EXP, first), decoded)
    return s.returns(second), [q]


# ---- it rewrites


def test_each_product_gets_a_decode_of_its_own():
    module, saved = attention()
    assert hold_recompute(module, saved) == 2
    token, first, second = calls(module.graph, MM)
    decodes = calls(module.graph, NEG)
    assert len(decodes) == 2 and [first.args[1], second.args[1]] == decodes
    assert [d.args[0].target for d in decodes] == [HOLD, HOLD]


def test_a_decode_waits_for_the_last_product_before_its_reader():
    module, saved = attention()
    hold_recompute(module, saved)
    token, first, _ = calls(module.graph, MM)
    assert [h.args for h in calls(module.graph, HOLD)] == [(saved[0], token), (saved[0], first)]


def test_a_decode_stands_just_before_its_reader():
    module, saved = attention()
    hold_recompute(module, saved)
    for product in calls(module.graph, MM)[1:]:
        assert product.prev is product.args[1] and product.prev.prev.target is HOLD


def test_a_decode_that_nobody_else_reads_is_moved_and_not_cloned():
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    decoded = s.call(NEG, q)
    module = s.returns(s.call(MM, s.call(MM, g, w), decoded))
    assert hold_recompute(module, [q]) == 1
    assert calls(module.graph, NEG) == [decoded] and decoded.args[0].target is HOLD


def test_a_product_that_reads_a_saved_value_itself_waits_too():
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    module = s.returns(s.call(MM, s.call(MM, g, w), q))
    assert hold_recompute(module, [q]) == 1
    assert calls(module.graph, MM)[1].args[1].target is HOLD


def test_every_saved_part_of_a_decode_is_held():
    s = Sketch()
    q, scale, w, g = (s.input(name, 4, 4) for name in ("q", "scale", "w", "tangents_1"))
    module = s.returns(s.call(MM, s.call(MM, g, w), s.call(MUL, q, scale)))
    assert hold_recompute(module, [q, scale]) == 2
    assert [h.args[0] for h in calls(module.graph, HOLD)] == [q, scale]


# ---- it leaves alone


def untouched(module: fx.GraphModule, saved: list[fx.Node]) -> None:
    before = str(module.graph)
    assert hold_recompute(module, saved) == 0
    assert str(module.graph) == before


def test_the_first_product_has_nothing_to_wait_for():
    s = Sketch()
    q, g = s.input("q", 4, 4), s.input("tangents_1", 4, 4)
    untouched(s.returns(s.call(MM, g, s.call(NEG, q))), [q])


def test_inputs_of_the_model_are_not_held():
    module, _ = attention()
    untouched(module, [])


def test_a_product_without_a_tangent_is_no_token():
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    scores = s.call(MM, w, w)
    untouched(s.returns(s.call(MM, g, s.call(NEG, q)), scores), [q])


def test_what_is_not_materialised_is_left_to_the_compiler():
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    untouched(s.returns(s.call(MUL, s.call(MM, g, w), s.call(NEG, q))), [q])


def long_chain(length: int) -> tuple[fx.GraphModule, fx.Node]:
    s = Sketch()
    q, w, g = s.input("q", 4, 4), s.input("w", 4, 4), s.input("tangents_1", 4, 4)
    value = q
    for _ in range(length):
        value = s.call(NEG, value)
    return s.returns(s.call(MM, s.call(MM, g, w), value)), q


def test_a_long_recompute_is_not_cloned():
    module, q = long_chain(LONGEST_CHAIN + 1)
    untouched(module, [q])
    module, q = long_chain(LONGEST_CHAIN)
    assert hold_recompute(module, [q]) == 1


def test_a_second_run_changes_nothing():
    module, saved = attention()
    hold_recompute(module, saved)
    untouched(module, saved)


# ---- a real graph


def sunk(**settings) -> Bench:
    return stopped_after("sink_backward", Tiny(depth=1), tokens(), **settings)


def test_gated_values_and_inputs_are_not_held():
    bench = sunk(preset="balanced")
    assert bench.run("hold_recompute") > 0
    seam = bench.work.pair()
    held = {h.args[0] for h in calls(seam.backward.graph, HOLD)}
    assert held <= set(holdable_placeholders(seam)) and held
    inputs = {p for v, p in seam.saved() if v.op == "placeholder"}
    assert not held & inputs


def decoded_for(product: fx.Node, saved: set[fx.Node]) -> set[fx.Node]:
    """The ``saved`` values that a product reads itself or through cheap operators that no tangent reaches."""
    found: set[fx.Node] = set()
    stack, fed = list(product.all_input_nodes), tangent_fed(product.graph)
    while stack:
        node = stack.pop()
        if node in saved:
            found.add(node)
        elif ops.is_cheap(node) and node not in fed:
            stack += node.all_input_nodes
    return found


def test_no_product_of_a_transformer_reads_a_saved_value_past_its_hold():
    bench = sunk(preset="balanced")
    seam = bench.work.pair()
    saved = set(holdable_placeholders(seam))
    products = [n for n in seam.backward.graph.nodes if ops.is_matrix_product(n)][1:]
    assert any(decoded_for(product, saved) for product in products)
    bench.run("hold_recompute")
    assert not any(decoded_for(product, saved) for product in products)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
@pytest.mark.parametrize("closed", first([True, False]))
def test_the_numbers_do_not_change(preset, closed):
    bench = sunk(preset=preset, debug=True)
    shut = {node.name for gate, node in bench.work.joint.gates.items() if closed and gate % 2}
    outputs, expected = run_pair(bench.work.pair(), closed=shut)
    assert bench.run("hold_recompute") > 0
    again, grads = run_pair(bench.work.pair(), closed=shut)
    assert unequal(outputs, again) == [] and unequal(expected, grads) == []


def test_the_numbers_of_the_graph_by_hand():
    (module, saved), (expected, _) = attention(), attention()
    inputs = values(module.graph)
    hold_recompute(module, saved)
    assert unequal(expected(*inputs), module(*inputs)) == []
