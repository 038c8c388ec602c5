"""insert_codecs: encode in forward, decode in backward; what has no codec is not touched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from effort import first
from graphs import ATEN, Bench, Chain, Sketch, chain_input, names, run_pair, stopped_after, texts, unequal
from reference import cosine
from small_models import Tiny, tokens
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table

from slimfit_fx.codecs import Codec, codec_names, get_codec
from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC
from slimfit_fx.passes.insert_codecs import ENCODED, STATIC_STORED, insert_codecs
from slimfit_fx.passes.partition import DECISION
from slimfit_fx.passes.saved import Seam
from slimfit_fx.planning.decisions import Decision
from slimfit_fx.presets import FALLBACK


def split(model, batch, **settings) -> Bench:
    return stopped_after("split_joint", model, batch, **settings)


def crossing(codec: Codec | None, *permutation: int) -> Seam:
    """forward: v = 2 * x, permuted in memory. backward: v, read twice: g * v and v + v."""
    forward, backward = Sketch(), Sketch()
    backward.mode = forward.mode
    order = permutation or (0, 1)
    x = forward.input("x", *(16 * (d + 1) for d in range(len(order))))
    with_strides = forward.call(ATEN.permute.default, x, list(order))
    value = forward.call(ATEN.mul.Tensor, with_strides, 2.0)
    value.meta[DECISION] = Decision("float", codec, "because")
    seen = backward.graph.placeholder(value.name)
    seen.meta["val"] = value.meta["val"]
    g = backward.graph.placeholder("tangents_1")
    g.meta["val"] = value.meta["val"]
    results = backward.call(ATEN.mul.Tensor, g, seen), backward.call(ATEN.add.Tensor, seen, seen)
    user = forward.call(ATEN.sum.default, value)
    return Seam(forward.returns(user, value), backward.returns(*results), 1)


def insert(seam: Seam, gates: Sequence[int] = ()) -> int:
    """All outputs of ``norm_like`` but those for units are the gradients of what its value is made from."""
    gates = gates or (STATIC, STATIC)
    grads_of = ["w" if gate == 0 else "x" for gate in gates]
    return insert_codecs(seam, gates, grads_of, decompositions=select_decomp_table())


def saved(seam: Seam) -> list[fx.Node]:
    return [value for value, _ in seam.saved()]


# ---- it rewrites


def test_a_value_crosses_in_its_encoded_parts():
    seam = crossing(get_codec("int8"))
    assert insert(seam) == 1
    codes, scales = saved(seam)
    assert [v.meta[ENCODED] for v in (codes, scales)] == [("mul_tensor", "part", 0), ("mul_tensor", "part", 1)]
    assert (codes.meta["val"].dtype, codes.meta["val"].shape) == (torch.int8, (16, 32))
    assert [p.meta[ENCODED] for _, p in seam.saved()] == [("mul_tensor", "part", 0), ("mul_tensor", "part", 1)]
    assert "mul_tensor" not in names(seam.backward.graph.find_nodes(op="placeholder"))


def test_a_value_with_two_readers_is_encoded_and_decoded_once():
    seam = crossing(get_codec("int8"))
    insert(seam)
    one = len(seam.backward.graph.nodes)
    several = crossing(get_codec("int8"))
    placeholder = several.saved()[0][1]
    with several.backward.graph.inserting_before(several.backward.graph.output_node()):
        several.backward.graph.call_function(ATEN.neg.default, (placeholder,)).meta["val"] = placeholder.meta["val"]
    insert(several)
    assert len(several.backward.graph.nodes) == one + 1


def test_the_value_itself_stays_what_forward_reads():
    seam = crossing(get_codec("int8"))
    insert(seam)
    (user,) = seam.user_outputs()
    assert user.args[0].name == "mul_tensor" and ENCODED not in user.args[0].meta


@pytest.mark.parametrize("permutation", [(1, 0), (2, 0, 1), (0, 2, 1)])
def test_a_permuted_value_comes_back_in_its_own_strides(permutation):
    seam = crossing(get_codec("int8"), *permutation)
    value, _ = seam.saved()[0]
    val = value.meta["val"]
    assert not val.is_contiguous()
    insert(seam)
    x = torch.randn(tuple(seam.forward.graph.find_nodes(op="placeholder")[0].meta["val"].shape))
    exact = 2.0 * x.permute(permutation)  # in memory it is 2 * x, and that is what groups are made of
    _, *parts = seam.forward(x)
    product, _ = seam.backward(*parts, torch.ones_like(exact))
    (decoded,) = {n for n in seam.backward.graph.output_node().args[0][1].all_input_nodes}
    assert decoded.meta["val"].stride() == val.stride() == exact.stride()
    assert product.shape == exact.shape
    within_bound(get_codec("int8"), 2.0 * x, product.permute([permutation.index(d) for d in range(x.dim())]))


# ---- static parts


def norm_like(gates_of_upstream: Sequence[int], *, dynamic: bool = True, again: bool = False) -> tuple[Seam, list[int]]:
    """forward: v = 2 * x. backward: g * v for all that lies before, and v itself for the gradient of unit 0.

    Before it lie parameters with these gates. ``again``: v is also read for what always trains.
    """
    forward, backward = Sketch(), Sketch()
    backward.mode = forward.mode
    value = forward.call(ATEN.mul.Tensor, forward.input("x", 16, 32), 2.0)
    value.meta[DECISION] = Decision("normalised", None, "because", parts=(get_codec("topk"), None))
    seen, g = backward.graph.placeholder(value.name), backward.graph.placeholder("tangents_1")
    seen.meta["val"] = g.meta["val"] = value.meta["val"]
    onward = backward.call(ATEN.mul.Tensor, g, seen)
    results = [backward.call(ATEN.mul.Tensor, onward, float(k)) for k, _ in enumerate(gates_of_upstream)]
    if dynamic:
        results.append(backward.call(ATEN.mul.Tensor, seen, g))
    if again:
        results.append(backward.call(ATEN.sub.Tensor, seen, g))
    gates = [*gates_of_upstream, *[0] * dynamic, *[STATIC] * again]
    return Seam(forward.returns(forward.call(ATEN.sum.default, value), value), backward.returns(*results), 1), gates


def test_what_runs_whatever_is_frozen_reads_the_static_part_and_units_the_whole():
    seam, gates = norm_like([STATIC, 1, 2])
    assert insert(seam, gates) == 1
    values, places, whole = saved(seam)
    assert [v.meta[ENCODED][1:] for v in (values, places)] == [(STATIC_STORED, 0), (STATIC_STORED, 1)]
    assert ENCODED not in whole.meta
    x = torch.randn(16, 32)
    _, *stored = seam.forward(x)
    *before, own = seam.backward(*stored, torch.ones(16, 32))
    assert torch.equal(own, 2 * x)
    few = get_codec("topk").decode(get_codec("topk").encode(2 * x), torch.float32, 32)
    assert all(torch.equal(found, few * k) for k, found in enumerate(before)) and not torch.equal(few, 2 * x)
    assert insert(seam, gates) == 0, "once"


def test_many_gates_are_as_good_as_static():
    """More of them than may share a branch: what they read is there whatever is frozen."""
    seam, gates = norm_like([1, 2, 3, 4, 5])
    assert insert(seam, gates) == 1 and len(saved(seam)) == 3


def test_a_value_without_other_readers_is_stored_by_its_static_codec_only():
    seam, gates = norm_like([STATIC, 1], dynamic=False)
    assert insert(seam, gates) == 1
    assert [v.meta[ENCODED][1] for v in saved(seam)] == [STATIC_STORED] * 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([STATIC],), "mul_tensor_1 for what always trains"),  # the gradient of one parameter: maybe the norm's own
        (([STATIC, 1], True, True), "sub_tensor for what always trains"),
        (([1, 2],), "only for units that may be frozen"),
    ],
)
def test_a_value_that_must_be_whole_stays_whole_and_the_plan_says_why(arguments, reason):
    given, *flags = arguments
    seam, gates = norm_like(given, **dict(zip(("dynamic", "again"), flags, strict=False)))
    before = [str(seam.forward.graph), str(seam.backward.graph)]
    assert insert(seam, gates) == 0
    assert [str(seam.forward.graph), str(seam.backward.graph)] == before
    assert reason in saved(seam)[0].meta[DECISION].reason


# ---- it leaves alone


def test_a_value_without_a_codec_is_not_touched():
    seam = crossing(None)
    before = [str(seam.forward.graph), str(seam.backward.graph)]
    assert insert(seam) == 0
    assert [str(seam.forward.graph), str(seam.backward.graph)] == before


def test_a_value_without_a_decision_is_not_touched():
    seam = crossing(get_codec("int8"))
    del saved(seam)[0].meta[DECISION]
    before = [str(seam.forward.graph), str(seam.backward.graph)]
    assert insert(seam) == 0
    assert [str(seam.forward.graph), str(seam.backward.graph)] == before


def test_a_model_without_masks_is_as_it_was_in_preset_exact():
    bench = split(Chain(), chain_input(), preset="exact")
    before = texts(bench.work)
    assert bench.run("insert_codecs") == 0
    assert texts(bench.work) == before


def test_a_second_run_changes_nothing():
    bench = split(Chain(), chain_input(), preset="balanced")
    assert bench.run("insert_codecs") == 2
    before = texts(bench.work)
    assert bench.run("insert_codecs") == 0
    assert texts(bench.work) == before


# ---- the numbers hold


def within_bound(codec: Codec, exact: Tensor, found: Tensor) -> None:
    assert bool(((found - exact).abs() <= codec.error_bound(exact)).all())
    assert not torch.equal(found, exact), "a lossy codec that loses nothing was not there"


@pytest.mark.parametrize("name", sorted(set(codec_names()) - {"bits"}))
def test_what_comes_back_is_within_the_bound_of_its_codec(name):
    seam = crossing(get_codec(name))
    insert(seam)
    x = torch.rand(16, 32)
    _, *parts = seam.forward(x)
    product, double = seam.backward(*parts, torch.ones(16, 32))
    within_bound(get_codec(name), 2.0 * x, product)
    assert torch.equal(double, product + product)


class Views(nn.Module):
    """Two products read one hidden value (24, 8), each as another view of it; both views are read in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.left, self.right = nn.Linear(16, 8), nn.Linear(24, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        return self.left(hidden.t()).square().mean() + self.right(hidden.view(48, 4)).square().mean()


def test_two_views_of_one_storage_are_stored_once():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    bench = split(Views(), (x,), preset="balanced")
    backward = bench.work.pair().backward.graph
    crossing = [v for v in saved(bench.work.pair()) if v.op != "placeholder"]
    (hidden,) = (v for v in crossing if v.meta["val"].numel() == 24 * 8)
    assert sum(ops.view_base(v) is ops.view_base(hidden) for v in crossing) == 1
    views = {n for n in backward.nodes if n.op == "call_function" and ops.view_base(n).name == hidden.name}
    assert {tuple(n.meta["val"].shape) for n in views} >= {(48, 4), (8, 24)}
    expected = run_pair(bench.work.pair())
    assert bench.run("insert_codecs") > 0
    stored = [v.meta[ENCODED] for v in saved(bench.work.pair()) if ENCODED in v.meta]
    assert stored.count((hidden.name, "part", 0)) == 1 and len(set(stored)) == len(stored)
    assert not any(v.meta["val"].numel() == 24 * 8 and ENCODED not in v.meta for v in saved(bench.work.pair()))
    outputs, grads = run_pair(bench.work.pair())
    assert unequal(expected[0], outputs) == [] and cosine(dict(enumerate(expected[1])), dict(enumerate(grads))) > 0.999


class Masks(nn.Module):
    """Dropout and a ReLU between matrix products: masks cross over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(nn.functional.dropout(self.one(x).relu(), 0.3))


def test_masks_cross_as_bits_and_lose_nothing():
    bench = split(Masks(), (torch.randn(8, 16),), preset="exact")
    before, expected = sizes(bench), run_pair(bench.work.pair())
    assert bench.run("insert_codecs") > 0
    outputs, grads = run_pair(bench.work.pair())
    assert unequal(expected[0], outputs) == [] and unequal(expected[1], grads) == []
    assert sizes(bench) < before


def sizes(bench: Bench) -> int:
    values = (v.meta["val"] for v, _ in bench.work.pair().saved() if v.op != "placeholder")
    return sum(val.numel() * val.element_size() for val in values)


@pytest.mark.parametrize(
    ("preset", "codecs", "least"),
    first(
        [
            ("max", {}, 0.98),
            ("paper", {}, 0.98),
            ("balanced", dict.fromkeys(FALLBACK.keys() - {"mask"}, "int2-sr"), 0.9),
            ("balanced", {}, 0.999),
            ("balanced", dict.fromkeys(FALLBACK.keys() - {"mask"}, "int8-sr"), 0.999),
            ("balanced", dict.fromkeys(FALLBACK.keys() - {"mask"}, "int4-sr"), 0.98),
            ("balanced", {"float": "topk", "normalised": "topk"}, 0.7),
            ("balanced", {"gelu_input": "fixed_gelu4"}, 0.98),
        ],
        3,
    ),
    ids=["max", "paper", "int2-sr", "balanced", "int8-sr", "int4-sr", "topk", "fixed_gelu4"],
)
def test_forward_is_untouched_and_gradients_are_close(preset, codecs, least):
    bench = split(Tiny(depth=1), tokens(), preset=preset, codecs=codecs)
    before, (expected_outputs, expected) = sizes(bench), run_pair(bench.work.pair())
    assert bench.run("insert_codecs") > 3
    outputs, grads = run_pair(bench.work.pair())
    assert unequal(expected_outputs, outputs) == []
    assert cosine(dict(enumerate(expected)), dict(enumerate(grads))) > least
    assert sizes(bench) < before and unequal(expected, grads) != []
