"""plan_saved_values: what is decided about each value, why, and the tags that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from graphs import ATEN, Bench, Chain, Sketch, chain_input, names, run_pair, stopped_after, texts, unequal
from reference import optimized, step
from small_models import Tiny, tokens
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from slimfit_fx.codecs import Codec, Int8
from slimfit_fx.config import Config
from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC, GateLayout, JointGraph
from slimfit_fx.passes.partition import DECISION, tag_cut
from slimfit_fx.planning.chances import chance_open, effective_gates
from slimfit_fx.planning.decisions import dense_order
from slimfit_fx.planning.planner import Planner, Planning

MM, NEG, EXP, MUL, PERMUTE = ATEN.mm.default, ATEN.neg.default, ATEN.exp.default, ATEN.mul.Tensor, ATEN.permute.default


BALANCED = Config("balanced").codec_for


def planner(
    s: Sketch, outputs: list[fx.Node], *, codec_for: Callable[[str], Codec | None] = BALANCED, min_bytes: int = 0
) -> Planner:
    """A planner of a graph with these user outputs; every value serves a static gradient."""
    joint = JointGraph(s.returns(*outputs), len(outputs), GateLayout(0, ()))
    serves = frozenset([STATIC])
    return Planner(joint, lambda node: serves, codec_for=codec_for, freeze_rate=0.9, min_bytes=min_bytes)


# ---- decisions and their reasons


def decided(make, **settings) -> tuple[str, str | None, str]:
    """(kind, codec, reason) of the node that ``make(sketch, x)`` returns; x is a float input of (8, 32)."""
    s = Sketch()
    x = s.input("x", 8, 32)
    node = make(s, x)
    last = s.call(ATEN.sum.default, x)
    decision = planner(s, [last], **settings).decide(node)
    return decision.kind, decision.codec and decision.codec.name, decision.reason


def product(s: Sketch, x: fx.Node) -> fx.Node:
    """A plain float value of (8, 8)."""
    return s.call(MM, x, s.call(PERMUTE, s.input("w", 8, 32), [1, 0]))


def masked(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(ATEN.add.Tensor, x, -math.inf)


class Drawing(Int8):
    """A codec of somebody who calls ``torch.rand_like``."""

    random = True


def exponentiated(s: Sketch, x: fx.Node) -> fx.Node:
    node = s.call(NEG, x)
    s.call(EXP, node)
    return node


DECISIONS = {
    "an input": (lambda s, x: x, {}, "input", "an input or parameter: alive anyway"),
    "a view of an input": (lambda s, x: s.call(PERMUTE, x, [1, 0]), {}, "input", "a view of an input: alive anyway"),
    "a number": (lambda s, x: s.call(ATEN.sym_size.int, s.input("y", 4, symbolic=True), 0), {}, "symbol", "a number"),
    "a small value": (product, {"min_bytes": 257}, "small", "smaller than 257 bytes"),
    "random numbers": (lambda s, x: s.call(ATEN.rand_like.default, x), {}, "exact", "random numbers"),
    "integers": (
        lambda s, x: s.call(ATEN.argmax.default, x, 1, True),
        {},
        "exact",
        "must stay exact: integers, or read by exp in backward",
    ),
    "what exp reads": (exponentiated, {}, "exact", "must stay exact: integers, or read by exp in backward"),
    "a kind the preset keeps": (
        product,
        {"codec_for": Config("exact").codec_for},
        "float",
        "the preset keeps values of kind float",
    ),
    "mask constants": (masked, {}, "float", "may hold mask constants such as -inf"),
    "gaps in memory": (
        lambda s, x: s.call(ATEN.slice.Tensor, s.call(NEG, x), 1, 0, 16),
        {},
        "float",
        "its memory has gaps or overlaps",
    ),
    "an innermost size that is symbolic": (
        lambda s, x: s.call(NEG, s.input("y", 8, symbolic=True)),
        {},
        "float",
        r"int8: the innermost dimension is symbolic \(s\d+\): its layout must be known when compiling",
    ),
    "a type the codec does not take": (
        lambda s, x: s.call(ATEN._to_copy.default, x, dtype=torch.float64),
        {},
        "float",
        "int8: dtype float64 is not one of float32, bfloat16, float16",
    ),
    "what would not shrink": (
        lambda s, x: s.call(ATEN.sum.dim_IntList, x, [1], True),
        {},
        "float",
        r"int8: it would not make the value smaller \(\d+ bytes, 32 as it is\)",
    ),
    "a codec that draws random numbers": (
        product,
        {"codec_for": lambda kind: Drawing()},
        "float",
        "int8: it draws random numbers, which cannot be inserted into a graph whose own are already numbered",
    ),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_what_is_kept_says_why(case):
    make, settings, kind, reason = DECISIONS[case]
    found_kind, codec, found_reason = decided(make, **settings)
    assert (found_kind, codec) == (kind, None)
    assert re.fullmatch(reason, found_reason)


def test_what_is_encoded_names_its_kind_and_codec():
    assert decided(product) == ("float", "int8", "float: int8")
    mask = decided(lambda s, x: s.call(ATEN.gt.Scalar, x, 0.5), codec_for=Config("exact").codec_for)
    assert mask == ("mask", "bits", "mask: bits")


def test_mask_constants_do_not_keep_out_a_lossless_codec():
    assert decided(lambda s, x: s.call(ATEN.gt.Scalar, masked(s, x), 0.5))[1:] == ("bits", "mask: bits")


def test_an_exponential_bounds_mask_constants():
    assert decided(lambda s, x: s.call(EXP, masked(s, x)))[1] == "int8"


@pytest.mark.parametrize("returned", [0, 1], ids=["itself", "its view"])
@pytest.mark.parametrize("asked", [0, 1], ids=["itself", "its view"])
def test_a_user_output_and_its_views_are_alive_anyway(returned, asked):
    s = Sketch()
    y = s.call(NEG, s.input("x", 8, 32))
    pair = [y, s.call(PERMUTE, y, [1, 0])]
    decision = planner(s, [pair[returned]]).decide(pair[asked])
    assert (decision.codec, decision.reason) == (None, "a user output: alive anyway")


def test_a_decision_is_made_once():
    s = Sketch()
    y = s.call(MUL, s.input("x", 8, 32), 2.0)
    chooser = planner(s, [s.call(NEG, y)])
    assert chooser.decide(y) is chooser.decide(y)


@pytest.mark.parametrize(
    ("permutation", "order"), [((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (1, 2, 0)), ((0, 2, 1), (0, 2, 1))]
)
def test_the_order_of_memory_of_a_permuted_value(permutation, order):
    val = torch.empty(3, 4, 5).permute(permutation)
    assert dense_order(val) == order and val.permute(order).is_contiguous()
    assert dense_order(torch.empty(3, 1, 5).expand(3, 4, 5)) is None


def test_the_chance_that_a_value_is_needed():
    assert chance_open(frozenset([STATIC, 1]), 0.9) == 1.0 and effective_gates(frozenset([STATIC, 1])) == frozenset()
    assert chance_open(frozenset([1, 2]), 0.9) == pytest.approx(1 - 0.9**2)
    assert chance_open(frozenset(range(4)), 0.5) == pytest.approx(1 - 0.5**4)
    assert chance_open(frozenset(range(5)), 0.5) == 1.0, "more than four gates: kept like a static value"


# ---- what may run again


def again(make) -> float:
    s = Sketch()
    node = make(s, s.input("x", 8, 32))
    return planner(s, [s.call(ATEN.clone.default, node)])._recompute_price(node)


def test_what_never_runs_again():
    assert again(product) == math.inf, "a product with a parameter"
    assert again(lambda s, x: s.call(ATEN.rand_like.default, x)) == math.inf
    assert again(lambda s, x: s.call(ATEN.gt.Scalar, x, 0.5)) == math.inf, "a decoded value may be answered otherwise"
    assert again(lambda s, x: s.call(ATEN.convolution.default, *_image(s))) == math.inf


def _image(s: Sketch) -> tuple:
    return (s.input("i", 1, 2, 8, 8), s.input("k", 2, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def test_views_and_constants_run_again_for_nothing():
    assert again(lambda s, x: s.call(PERMUTE, s.call(NEG, x), [1, 0])) == 0.0
    assert again(lambda s, x: s.call(ATEN.full.default, [8, 32], 1.0)) == 0.0


def test_prices_follow_the_bytes_that_move():
    plain, exp = again(lambda s, x: s.call(MUL, x, x)), again(lambda s, x: s.call(EXP, x))
    total = again(lambda s, x: s.call(ATEN.sum.dim_IntList, x, [1]))
    assert 0 < plain < exp < 8 * 32 * 4 and plain == pytest.approx(total), "a reduction reads its whole input"


def test_a_product_of_two_activations_may_run_again():
    def scores(s: Sketch, x: fx.Node) -> fx.Node:
        q = s.call(NEG, s.call(ATEN.view.default, x, [2, 4, 32]))
        return s.call(ATEN.bmm.default, q, s.call(PERMUTE, q, [0, 2, 1]))

    assert 0 < again(scores) < math.inf


# ---- tags


def test_tags_say_what_the_plan_says_and_the_graph_is_as_it_was():
    bench = stopped_after("tag_liveness", Chain(), chain_input(), preset="balanced")
    before = texts(bench.work)
    count = bench.run("plan_saved_values")
    graph, planning = bench.work.joint.graph, bench.work.planning
    saved = [n for n in graph.nodes if n.meta.get("recompute") is CheckpointPolicy.MUST_SAVE]
    recomputed = [n for n in graph.nodes if n.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE]
    assert names(saved) == {"addmm", "addmm_1"} and count == len(saved) + len(recomputed)
    assert all(n in planning.cut.recomputed and ops.is_cheap(n) for n in recomputed)
    assert {n: n.meta[DECISION].reason for n in saved} == {
        saved[0]: "linear_input: int8",
        saved[1]: "gelu_input: int8",
    }
    assert texts(bench.work) == before


def test_without_a_cut_nothing_is_tagged():
    module = stopped_after("tag_liveness", Chain(), chain_input()).work.joint.module
    assert tag_cut(module, Planning(None, refusal="no gradient is computed in this graph")) == 0
    assert not any("recompute" in n.meta or DECISION in n.meta for n in module.graph.nodes)


def test_a_graph_without_gradients_is_refused():
    s = Sketch()
    planning = planner(s, [s.call(NEG, s.input("x", 8, 32))]).plan()
    assert (planning.cut, planning.refusal) == (None, "no gradient is computed in this graph")


class Sorted(nn.Linear):
    """An operator that is neither cheap nor known: saved, not repeated."""

    def forward(self, x):
        return super().forward(x).cumsum(-1).square()


def test_every_reason_reaches_the_plan():
    model, session = optimized(Sorted(32, 32), preset="balanced", scheduler="none", min_bytes=0)
    step(model, model, (torch.randn(8, 32),))
    (row,) = session.plan.rows
    assert (row.op, row.decision, row.codec, row.reason) == ("cumsum", "codec", "int8", "float: int8")
    small, session = optimized(Sorted(32, 32), preset="balanced", scheduler="none", min_bytes=2048)
    step(small, small, (torch.randn(8, 32),))
    (row,) = session.plan.rows
    assert (row.decision, row.reason) == ("keep", "smaller than 2048 bytes")


def test_the_numbers_do_not_depend_on_the_plan():
    def gradients(*, planned: bool):
        bench: Bench = stopped_after("tag_liveness", Tiny(depth=1), tokens())
        bench.run(*(["plan_saved_values"] if planned else []), "split_joint")
        return run_pair(bench.work.pair()), len(bench.work.pair().saved())

    ((outputs, grads), saved), ((others, expected), more) = gradients(planned=True), gradients(planned=False)
    assert unequal(others, outputs) == [] and unequal(expected, grads) == []
    assert saved < more


# ---- values in two parts


EIGHT_FOR_UNITS = {"gelu_input_units": "int8", "normalised_units": "int8"}


def parts_of(preset: str, freeze_rate: float) -> set[tuple[str, str | None, str | None]]:
    """(kind, codec, what is stored beside) of the rows of kinds that have parts, for one block."""
    torch._dynamo.reset()
    settings = {"preset": preset, "freeze_rate": freeze_rate, "scheduler": "random", "min_bytes": 0}
    settings |= {"codecs": EIGHT_FOR_UNITS} if preset == "max" else {}
    model, session = optimized(Tiny(depth=1), **settings)
    model(*tokens()).backward()
    rows = session.plan.rows
    assert all(r.bytes_closed < r.bytes_open and r.gates and r.decision == "codec+gate" for r in rows if r.beside)
    return {(r.kind, r.codec, r.beside) for r in rows if r.kind.startswith(("normalised", "gelu_input"))}


def test_few_units_pay_for_a_part_of_their_own():
    assert ("gelu_input_static", "int4", "int8") in parts_of("max", 0.9)
    assert {("normalised_static", "topk", "whole"), ("gelu_input", "fixed_gelu4", None)} <= parts_of("paper", 0.9)


@pytest.mark.parametrize(("preset", "codec"), [("max", "int4"), ("paper", "fixed_gelu4")])
def test_where_most_units_train_a_value_has_one_form(preset, codec):
    """A second one would be there in nearly every step."""
    found = parts_of(preset, 0.1)
    assert ("gelu_input", codec, None) in found and not any(beside for _, _, beside in found)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_preset_of_one_form_has_no_parts(preset):
    assert not any(kind.endswith("_static") for kind, _, _ in parts_of(preset, 0.9))
