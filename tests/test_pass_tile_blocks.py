"""tile_blocks: blocks run on a part of the batch after the other, and compute the same but for rounding."""

from __future__ import annotations

import dataclasses
import functools
import operator
import random

import pytest
import torch
from effort import examples
from graphs import ATEN, Sketch, calls, copy_seam, module_texts, run_pair, stopped_after, unequal, value_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from small_models import Tiny, tokens
from strategies import build, inputs, specs
from torch import fx, nn

import slimfit_fx
from slimfit_fx.graph import batch as batch_
from slimfit_fx.graph import ops
from slimfit_fx.graph.tile_states import SUM, Flow
from slimfit_fx.graph.tiling import follow
from slimfit_fx.passes import outline_repeats as outlined_
from slimfit_fx.passes import tile_bodies, tile_stretches
from slimfit_fx.passes.hand_over_parts import hand_over_parts
from slimfit_fx.passes.insert_gates import RELEASE
from slimfit_fx.passes.outline_repeats import INVOKE, outline_repeats
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.tile_blocks import Tiled, tile_blocks
from slimfit_fx.passes.tile_bodies import ADD_PART, PUT_PART
from slimfit_fx.passes.tile_choices import blocks_of, choose
from slimfit_fx.passes.verify import verify_seam
from slimfit_fx.runtime.ghosts import is_ghost
from slimfit_fx.runtime.measure import step_memory

COND = torch.ops.higher_order.cond


@pytest.fixture(autouse=True)
def whatever_it_is_worth(monkeypatch):
    """The models here are small: what tiles make of memory is another test's business."""
    monkeypatch.setattr(outlined_, "FEWEST_SAVED", 4)
    monkeypatch.setattr(tile_stretches, "WORTH", 1e9)


def pair_of(model: nn.Module, batch, **config):
    """The graphs of ``model`` with its blocks outlined, and what is known of the batch."""
    config = {"executor": "inductor", "scheduler": "ils", "freeze_rate": 0.5, "preset": "balanced", **config}
    return stopped_after("outline_repeats", model, batch, **config).work.pair()


@functools.cache
def plain_pair(batch: int = 8):
    """That of four layers without dropout; nobody writes to it."""
    return pair_of(Tiny(depth=4, dropout=0.0), tokens(batch=batch), recompute="blocks")


def tiled(seam, least_flops: float = 0, *, in_parts: bool = False):
    """A copy of the pair in tiles, and how many calls of them it makes. ``in_parts``: blocks hand parts on."""
    copied = copy_seam(seam)
    count = tile_blocks(copied, least_flops).calls
    if in_parts:
        for module in (copied.forward, copied.backward):
            hand_over_parts(module)
    verify_seam("outlined", copied)
    return copied, count


def alone(module: fx.GraphModule, least_flops: float = 0) -> Tiled:
    """Tile the blocks of a forward graph behind which there is no backward."""
    nothing = fx.GraphModule({}, fx.Graph())
    nothing.graph.output(())
    return tile_blocks(Seam(module, nothing, len(module.graph.output_node().args[0])), least_flops)


def part_of(value: torch.Tensor, *where: int) -> torch.Tensor:
    """A slice; of a ghost a ghost, as in the code that Inductor writes. torch itself looks at the storage."""
    shape = ATEN.slice.Tensor(torch.empty_strided(value.shape, value.stride(), device="meta"), *where).shape
    if not is_ghost(value):
        return ATEN.slice.Tensor(value, *where)
    return torch.ops.slimfit_fx.ghost(shape, value.stride(), value.dtype, value.device, False)


def run_tiles(seam, **how):
    """``run_pair`` of a pair in tiles."""
    for module in (*seam.forward.modules(), *seam.backward.modules()):
        if isinstance(module, fx.GraphModule) and calls(module.graph, INVOKE):
            for node in calls(module.graph, ATEN.slice.Tensor):
                node.target = part_of
            module.recompile()
    return run_pair(seam, **how)


def tiles_of(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [part for name, part in module.named_modules() if name.rsplit(".")[-1].startswith("tile_")]


def gates_of(seam) -> list[str]:
    return [n.name for n in seam.forward.graph.find_nodes(op="placeholder") if n.meta["val"].dtype is torch.bool]


def nearly_equal(expected, found) -> bool:
    """But for rounding: of the largest element, since what is summed may cancel."""
    for a, b in zip(expected, found, strict=True):
        if (a is None) != (b is None):
            return False
        if a is None or a.untyped_storage().nbytes() == 0:
            assert b is None or b.untyped_storage().nbytes() == 0, "a ghost is a ghost in tiles"
            continue
        if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
            return False
        scale = float(a.double().nan_to_num().abs().max()) if a.numel() else 0.0
        if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5 * max(scale, 1.0), equal_nan=True):
            return False
    return True


# ---- it rewrites


def test_a_block_runs_in_tiles_and_gives_the_same():
    seam = plain_pair()
    copied, count = tiled(seam)
    assert count and all(tiles_of(module) for module in (copied.forward, copied.backward))
    user, grads = run_pair(seam)
    user_tiled, grads_tiled = run_tiles(copied)
    assert nearly_equal(user, user_tiled) and nearly_equal(grads, grads_tiled)


def test_whole_blocks_without_dropout_are_one_stretch():
    """Nothing of a transformer's block needs the whole batch: attention, norms, decode, gradients of weights."""
    copied, _ = tiled(pair_of(Tiny(depth=4, dropout=0.0), tokens(batch=8), recompute="blocks"))
    for module in (copied.forward, copied.backward):
        body = max((part for _, part in module.named_children()), key=lambda part: len(part.graph.nodes))
        outside = [n for n in body.graph.nodes if n.op == "call_function" and str(n.target).startswith("aten.")]
        products = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
        assert calls(body.graph, INVOKE)
        assert not [n for n in outside if str(n.target).split(".")[1] in products]


def test_gradients_of_weights_add_up_behind_their_gates():
    """Closed in every tile: a ghost; open in every tile: the sum."""
    seam = plain_pair()
    copied, _ = tiled(seam)
    body = next(part for name, part in copied.backward.named_children() if calls(part.graph, INVOKE))
    assert calls(body.graph, COND), "sums behind gates"
    names = gates_of(seam)
    for closed in ([], names[::2], names[1::2], names):
        expected, found = run_pair(seam, closed=closed)[1], run_tiles(copied, closed=closed)[1]
        assert nearly_equal(expected, found)


def test_large_sums_that_no_gate_closes_are_added_in_place(monkeypatch):
    """Else what every tile gave waits for the last one: a compiler makes one kernel of all additions."""
    monkeypatch.setattr(tile_bodies, "ADDED_AT_ONCE", 0)
    seam = pair_of(Tiny(depth=4, dropout=0.0), tokens(batch=8), units=["*up*"], recompute="blocks")
    copied, _ = tiled(seam)
    body = max((part for _, part in copied.backward.named_children()), key=lambda part: len(part.graph.nodes))
    (tile,) = tiles_of(body)
    (adds,) = {len(body.graph.find_nodes(op="call_function", target=ADD_PART))}
    count = len(calls(body.graph, INVOKE))
    assert adds and adds % (count - 1) == 0 and len(tile.graph.output_node().args[0]) > adds // (count - 1)
    user, grads = run_pair(seam)
    user_tiled, grads_tiled = run_tiles(copied)
    assert nearly_equal(user, user_tiled) and nearly_equal(grads, grads_tiled)


def test_results_that_share_what_may_be_a_ghost_do_not_both_leave_a_tile():
    """One of the two would have to be copied, and there may be nothing to copy."""
    module = copy_seam(pair_of(Tiny(depth=4, dropout=0.0), tokens(batch=8), recompute="blocks")).backward
    cut = batch_.cut_batch([getattr(module, name).graph for name in blocks_of(module)], 1)
    gated = []
    for name in blocks_of(module):
        graph = getattr(module, name).graph
        output = graph.output_node()
        gated += (mine := [n for n in output.args[0] if n.target is RELEASE])
        with graph.inserting_before(output):
            views = [graph.call_function(ATEN.view.default, (n, [-1])) for n in mine]
        for view in views:
            view.meta["val"] = view.args[0].meta["val"].view(-1)
        output.args = ((*output.args[0], *views),)
    assert gated
    for choice in choose(module, cut, set(), set())[0]:
        leaving = [outlined_.owner(n) for n in choice.stretch.results if choice.found.gate(n) is not None]
        assert len(leaving) == len({*leaving})


def test_no_ghost_is_read_in_tiles():
    seam = pair_of(Tiny(depth=4, dropout=0.0), tokens(batch=8), debug=True)
    copied, _ = tiled(seam)
    names = gates_of(seam)
    expected, found = run_pair(seam, closed=names[::2])[1], run_tiles(copied, closed=names[::2])[1]
    assert any(g is not None and bool(g.isnan().any()) for g in expected), "closed gradients are full of NaN"
    assert nearly_equal(expected, found)


def test_dropout_is_drawn_for_the_whole_batch():
    """Random numbers are those of the whole batch, in whatever tiles they are read."""
    copied, count = tiled(pair_of(Tiny(depth=4, dropout=0.1), tokens(batch=8)))
    assert count and tiles_of(copied.backward)
    drawn = [n for part in tiles_of(copied.forward) for n in part.graph.nodes if "random" in str(n.target)]
    assert not drawn


def test_a_second_run_changes_nothing():
    copied, _ = tiled(plain_pair())
    before = [module_texts(module) for module in (copied.forward, copied.backward)]
    assert not any(alone(module).calls for module in (copied.forward, copied.backward))
    assert [module_texts(module) for module in (copied.forward, copied.backward)] == before


# ---- it leaves alone


@pytest.mark.parametrize(
    ("batch", "rows", "count"), [(8, 64, 0), (8, 32, 2), (8, 16, 4), (8, 1, 8), (7, 1, 0), (6, 1, 2)]
)
def test_how_many_tiles(batch, rows, count):
    """As many as leave enough to do (eight rows an example; the mean product has 745 weights) and are of one size."""
    copied, _ = tiled(plain_pair(batch), 2 * 16 * 40 * rows)
    bodies = [part for _, part in copied.backward.named_children() if calls(part.graph, INVOKE)]
    assert {len(calls(body.graph, INVOKE)) for body in bodies} == ({count} if count else set())


@pytest.mark.thorough
def test_symbolic_sizes_stay_whole():
    seam = pair_of(Tiny(depth=3, dropout=0.0), tokens(batch=8), dynamic=True)
    assert tiled(seam)[1] == 0
    assert {alone(m).left for m in (seam.forward, seam.backward)} <= {"sizes are symbolic", ""}


def test_what_gains_nothing_stays_whole(monkeypatch):
    monkeypatch.setattr(tile_stretches, "WORTH", 0.0)
    seam = copy_seam(plain_pair())
    assert [alone(module) for module in (seam.forward, seam.backward)] == [
        Tiled(0, "it would hold no less"),
        Tiled(0, "it would hold no less"),
    ]


def _signs(s: Sketch, *sizes: int) -> fx.Node:
    """-1 or 1 for each element: made of one number for each token, which are inputs."""
    name = f"primals_{100 + len(s.graph.nodes)}"
    with s.graph.inserting_after(next(iter(s.graph.nodes))):
        token, place = s.input(name, 8, 4, 1), s.input(f"{name}_places", sizes[-1])
    hit = s.call(ATEN.lt.Tensor, s.call(ATEN.expand.default, token, sizes), place)
    return s.call(ATEN.where.self, hit, s.call(ATEN.full.default, [], -1.0), s.call(ATEN.full.default, [], 1.0))


def _done(mix) -> Tiled:
    module = layers(mix)
    assert outline_repeats(module)
    return alone(module)


def test_a_tile_makes_its_part_of_what_is_made_of_inputs(monkeypatch):
    """Which class each token has: a kernel makes that as it goes, and a tile its part, with all that is made of it."""
    monkeypatch.setattr(tile_stretches, "WORTH", 0.9)

    def mix(s: Sketch, x: fx.Node) -> fx.Node:
        signs = _signs(s, 8, 4, 24)
        share = s.call(ATEN.sum.dim_IntList, signs, [-1], True)
        return s.call(ATEN.add.Tensor, s.call(ATEN.gelu.default, s.call(ATEN.mul.Tensor, x, signs)), share)

    plain, module = layers(mix), layers(mix)
    assert outline_repeats(module) and alone(module).calls > 0
    body = getattr(module, next(iter(blocks_of(module))))
    made = [n.meta["val"] for n in body.graph.nodes if n.op == "call_function" and ops.is_tensor(n)]
    assert not [val for val in made if val.shape == (8, 4, 24)], "none of it is made for the whole batch"
    values = [torch.randn(*n.meta["val"].shape) for n in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*values), module(*values))


def test_what_is_read_as_a_whole_as_well_is_cut_for_what_a_tile_makes_of_it(monkeypatch):
    """It stands in memory anyway; what is made of it does not."""
    monkeypatch.setattr(tile_stretches.Stretches, "_unfused", lambda *_: 0)

    def mix(s: Sketch, x: fx.Node) -> fx.Node:
        token = _signs(s, 8, 4, 1)
        wide = s.call(ATEN.neg.default, s.call(ATEN.expand.default, token, [8, 4, 24]))
        mean = s.call(ATEN.mean.dim, wide, [0, 1, 2])
        made = s.call(ATEN.exp.default, s.call(ATEN.mul.Tensor, wide, token))
        return s.call(ATEN.gelu.default, s.call(ATEN.mul.Tensor, s.call(ATEN.mul.Tensor, x, made), mean))

    plain, module = layers(mix), layers(mix)
    assert outline_repeats(module) and alone(module).calls > 0
    (tile,) = tiles_of(getattr(module, next(iter(blocks_of(module)))))
    assert calls(tile.graph, ATEN.exp.default) and not calls(tile.graph, ATEN.neg.default)
    values = [torch.randn(*n.meta["val"].shape) for n in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*values), module(*values))


def test_what_would_stand_in_memory_only_for_tiles_counts(monkeypatch):
    """What something reads that is not in tiles is made before them, and tiles do not pay if it is large."""
    monkeypatch.setattr(tile_stretches, "WORTH", 0.9)

    def mix(s: Sketch, x: fx.Node, width: int) -> fx.Node:
        signs = _signs(s, 8, 4, width)
        mean = s.call(ATEN.mean.dim, signs, [0, 1, 2])
        return s.call(ATEN.gelu.default, s.call(ATEN.mul.Tensor, s.call(ATEN.mul.Tensor, x, signs), mean))

    assert _done(lambda s, x: mix(s, x, 1)).calls > 0
    assert _done(lambda s, x: mix(s, x, 24)) == Tiled(0, "it would hold no less")


def test_why_a_block_stays_whole():
    """The operator that needs the whole batch is named, in the plan too; a small batch is no reason to say anything."""
    module = layers(OVER_THE_BATCH["softmax"])
    assert outline_repeats(module)
    assert alone(module) == Tiled(0, "_softmax needs the whole batch")
    assert alone(module, 1e9) == Tiled()


def layers(mix) -> fx.GraphModule:
    """Four layers on (8, 4, 6), in each of which ``mix`` is done to what a wide product gives."""
    s = Sketch()
    x = s.input("x", 8, 4, 6)
    for index in range(4):
        up, down = s.input(f"primals_{2 * index}", 6, 24), s.input(f"primals_{2 * index + 1}", 24, 6)
        wide = s.call(ATEN.mm.default, s.call(ATEN.view.default, x, [32, 6]), up)
        wide = mix(s, s.call(ATEN.view.default, wide, [8, 4, 24]))
        narrow = s.call(ATEN.mm.default, s.call(ATEN.view.default, wide, [32, 24]), down)
        x = s.call(ATEN.add.Tensor, s.call(ATEN.view.default, narrow, [8, 4, 6]), x)
    return s.returns(x)


MIXES = {
    "pointwise": lambda s, x: s.call(ATEN.gelu.default, x),
    "over the tokens": lambda s, x: s.call(ATEN.sub.Tensor, x, s.call(ATEN.mean.dim, x, [1], True)),
    "softmax": lambda s, x: s.call(ATEN._softmax.default, x, -1, False),
    "cumulative": lambda s, x: s.call(ATEN.cumsum.default, x, 1),
    "heads": lambda s, x: s.call(
        ATEN.clone.default,
        s.call(ATEN.permute.default, s.call(ATEN.view.default, x, [8, 4, 3, 8]), [0, 2, 1, 3]),
        memory_format=torch.contiguous_format,
    ),
    "halves": lambda s, x: s.call(
        ATEN.cat.default, [s.call(ATEN.slice.Tensor, x, 2, 12, 24), s.call(ATEN.slice.Tensor, x, 2, 0, 12)], 2
    ),
    "the place of the largest": lambda s, x: s.call(ATEN.add.Tensor, x, s.call(ATEN.argmax.default, x, -1, True)),
    "a constant": lambda s, x: s.call(ATEN.add.Tensor, x, s.call(ATEN.full.default, [8, 1, 24], 2.0)),
}


def _square(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(ATEN.mul.Tensor, x, x)


OVER_THE_BATCH = {
    "mean": lambda s, x: s.call(ATEN.sub.Tensor, x, s.call(ATEN.mean.dim, x, [0], True)),
    "softmax": lambda s, x: s.call(ATEN._softmax.default, x, 0, False),
    "the place of the largest": lambda s, x: s.call(ATEN.add.Tensor, x, s.call(ATEN.argmax.default, x, 0, True)),
    "the place of the largest of all": lambda s, x: s.call(ATEN.add.Tensor, x, s.call(ATEN.argmax.default, x)),
    "cumulative": lambda s, x: s.call(ATEN.cumsum.default, x, 0),
    "rolled": lambda s, x: s.call(
        ATEN.cat.default, [s.call(ATEN.slice.Tensor, x, 0, 4, 8), s.call(ATEN.slice.Tensor, x, 0, 0, 4)], 0
    ),
    "the square of a sum": lambda s, x: s.call(ATEN.add.Tensor, x, _square(s, s.call(ATEN.sum.dim_IntList, x, [0]))),
    "a sum that is no sum of parts": lambda s, x: s.call(
        ATEN.mul.Tensor, x, s.call(ATEN.tanh.default, s.call(ATEN.sum.dim_IntList, x, [0], True))
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_of_one_example_at_a_time(name):
    plain, module = layers(MIXES[name]), layers(MIXES[name])
    assert outline_repeats(module) and alone(module).calls
    (body,) = {getattr(module, call.args[0].target) for call in calls(module.graph, INVOKE)}
    assert not calls(body.graph, ATEN.mm.default), "both products are in the tile"
    given_ = [value_of(node) for node in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*given_), module(*given_))


@pytest.mark.parametrize("name", OVER_THE_BATCH)
def test_over_the_batch(name):
    """What needs the whole batch gets it."""
    plain, module = layers(OVER_THE_BATCH[name]), layers(OVER_THE_BATCH[name])
    assert outline_repeats(module)
    done = alone(module)
    assert done.calls or done.left.endswith("needs the whole batch")
    given_ = [value_of(node) for node in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*given_), module(*given_))
    wide = [
        n
        for part in tiles_of(module)
        for n in part.graph.nodes
        if str(n.target) in ("aten.tanh.default", "aten.cumsum.default")
    ]
    assert not wide


def test_each_part_is_written_once():
    module = layers(MIXES["pointwise"])
    assert outline_repeats(module) and alone(module, 2 * 8 * 6 * 24).calls
    (body,) = {getattr(module, call.args[0].target) for call in calls(module.graph, INVOKE)}
    puts = calls(body.graph, PUT_PART)
    assert [put.args[2:] for put in puts] == [(0, 0), (0, 2), (0, 4), (0, 6)]
    assert all(put.args[1].target is operator.getitem for put in puts)


def test_views_that_overlap_in_memory_are_made_again():
    """An expanded value that is read by what needs the whole batch: what it is a view of is put together."""

    def make() -> fx.GraphModule:
        s = Sketch()
        x, kept = s.input("x", 8, 4, 6), []
        for index in range(4):
            up, down = s.input(f"primals_{2 * index}", 6, 96), s.input(f"primals_{2 * index + 1}", 96, 6)
            wide = s.call(ATEN.gelu.default, s.call(ATEN.mm.default, s.call(ATEN.view.default, x, [32, 6]), up))
            means = s.call(ATEN.view.default, s.call(ATEN.mean.dim, wide, [1], True), [8, 4, 1])
            kept.append(s.call(ATEN.cumsum.default, s.call(ATEN.expand.default, means, [8, 4, 2]), 0))
            x = s.call(ATEN.view.default, s.call(ATEN.mm.default, wide, down), [8, 4, 6])
        return s.returns(x, *kept)

    plain, module = make(), make()
    assert outline_repeats(module) and alone(module).calls
    bodies = {getattr(module, call.args[0].target) for call in calls(module.graph, INVOKE)}
    tiles = [part for body in bodies for part in tiles_of(body)]
    assert any(calls(body.graph, ATEN.expand.default) for body in bodies)
    assert tiles and not any(0 in n.meta["val"].stride() for tile in tiles for n in tile.graph.output_node().args[0])
    values = [value_of(node) for node in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*values), module(*values))


def states(**known):
    """What arguments are, by the names of their nodes; others are whole."""
    return lambda node: known.get(node.name)


OF_SUMS = {
    "scaled": (lambda s, x, w: s.call(ATEN.mul.Tensor, x, w), True),
    "doubled": (lambda s, x, w: s.call(ATEN.add.Tensor, x, x), True),
    "divided": (lambda s, x, w: s.call(ATEN.div.Tensor, x, 3.0), True),
    "divided and not rounded": (lambda s, x, w: s.call(ATEN.div.Tensor_mode, x, 3.0, rounding_mode=None), True),
    "turned": (lambda s, x, w: s.call(ATEN.neg.default, x), True),
    "divided and rounded": (lambda s, x, w: s.call(ATEN.div.Tensor_mode, x, 3.0, rounding_mode="floor"), False),
    "squared": (lambda s, x, w: s.call(ATEN.mul.Tensor, x, x), False),
    "divided by itself": (lambda s, x, w: s.call(ATEN.div.Tensor, x, x), False),
    "divisor": (lambda s, x, w: s.call(ATEN.div.Tensor, w, x), False),
    "moved": (lambda s, x, w: s.call(ATEN.add.Tensor, x, w), False),
    "moved by a number": (lambda s, x, w: s.call(ATEN.add.Tensor, x, 1.0), False),
    "made positive": (lambda s, x, w: s.call(ATEN.abs.default, x), False),
    "cut off": (lambda s, x, w: s.call(ATEN._to_copy.default, x, dtype=torch.int64), False),
}


@pytest.mark.parametrize("name", OF_SUMS)
def test_what_adds_up_over_tiles(name):
    """Of sums over tiles linear work only: what it makes of the parts adds up to what it makes of the whole."""
    make, linear = OF_SUMS[name]
    s = Sketch()
    node = make(s, s.input("total", 4), s.input("weight", 4))
    assert follow(node, states(total=SUM)) == (Flow(SUM) if linear else None)


@pytest.mark.parametrize(
    ("bias", "gradient", "tiled_"), [(8, True, True), (1, True, False), (1, False, True), (8, False, True)]
)
def test_the_gradient_of_one_mask_for_all_examples_needs_all_of_them(bias, gradient, tiled_):
    s = Sketch()
    inputs = {name: s.input(name, 8, 2, 4, 4) for name in ("grad", "q", "k", "v", "out")}
    extra = [s.input("bias", bias, 2, 4, 4), inputs["out"], s.input("lse", 8, 2, 4)]
    seeds = [s.input(name, 1, dtype=torch.int64) for name in ("seed", "offset")]
    node = s.graph.call_function(
        ATEN._scaled_dot_product_efficient_attention_backward.default,
        (*(inputs[name] for name in ("grad", "q", "k", "v")), *extra, *seeds, 0.0, [True, True, True, gradient]),
    )
    vals = [inputs[name].meta["val"] for name in ("q", "k", "v")]
    node.meta["val"] = (*vals, extra[0].meta["val"] if gradient else None)
    for place in range(3 + gradient):
        s.call(operator.getitem, node, place)
    flow = follow(node, states(grad=0, q=0, k=0, v=0, out=0, lse=0))
    assert (flow is not None) is tiled_
    assert flow is None or flow.result[:3] == (0, 0, 0)


@pytest.mark.parametrize("mask", [(8, 8), (1, 1, 8, 8), (8, 1, 8, 8), None])
def test_masks_of_attention(mask):
    """As many tokens as examples: one mask for all examples is not one for each."""

    def make() -> fx.GraphModule:
        s = Sketch()
        x = s.input("x", 8, 8, 12)
        given_ = None if mask is None else s.input("mask", *mask)
        for _ in range(4):
            heads = s.call(ATEN.permute.default, s.call(ATEN.view.default, x, [8, 8, 3, 4]), [0, 2, 1, 3])
            attend = ATEN._scaled_dot_product_flash_attention_for_cpu.default
            mixed = s.call(operator.getitem, s.call(attend, heads, heads, heads, attn_mask=given_), 0)
            mixed = s.call(ATEN.view.default, s.call(ATEN.permute.default, mixed, [0, 2, 1, 3]), [8, 8, 12])
            x = s.call(ATEN.add.Tensor, mixed, x)
        return s.returns(x)

    plain, module = make(), make()
    assert outline_repeats(module)
    done = alone(module)
    assert done.calls or mask == (8, 8), "of two dimensions it may be either"
    values = [value_of(node) for node in plain.graph.find_nodes(op="placeholder")]
    assert nearly_equal(plain(*values), module(*values))


# ---- settings


@pytest.mark.parametrize(("preset", "tiles"), [("exact", False), ("paper", False), ("balanced", True), ("max", True)])
def test_what_presets_say(preset, tiles):
    assert slimfit_fx.Config(preset=preset).tiles is tiles
    assert (
        slimfit_fx.Config(preset=preset, tiles=not tiles).fingerprint()
        != slimfit_fx.Config(preset=preset).fingerprint()
    )


@pytest.mark.parametrize("value", [1, "yes", None])
def test_tiles_is_true_or_false(value):
    with pytest.raises(TypeError, match=f"tiles must be True or False, got {value!r}"):
        slimfit_fx.Config(tiles=value)


# ---- any graph


@settings(max_examples=examples(25))
@given(data=st.data(), seed=st.integers(0, 2**16), least=st.sampled_from((1, 20_000)))
def test_any_model_computes_the_same_in_tiles(data, seed, least):
    """But for rounding, whatever nodes run in tiles, and whatever is closed; a ghost in tiles is a ghost, and open
    gradients are the same bits."""
    spec = data.draw(specs(max_layers=4, repeats=(3, 4), sizes=("static",)))
    spec = dataclasses.replace(spec, batch=data.draw(st.sampled_from((4, 6))))
    torch._dynamo.reset()
    level = data.draw(st.sampled_from(("cheap", "blocks")))
    seam = pair_of(build(spec), inputs(spec), recompute=level, units=spec.is_unit, min_bytes=0)
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(tile_bodies, "ADDED_AT_ONCE", 0)
        if data.draw(st.booleans()):
            patch.setattr(tile_stretches, "_most_alive", lambda *_: chance.random())
        copied, _ = tiled(seam, least, in_parts=data.draw(st.booleans()))
    names = gates_of(seam)
    closed = [name for index, name in enumerate(names) if (seed >> index % 16) & 1]
    user, grads = run_pair(seam, seed=seed, closed=closed)
    user_tiled, grads_tiled = run_tiles(copied, seed=seed, closed=closed)
    assert nearly_equal(user, user_tiled) and nearly_equal(grads, grads_tiled)
    _, all_open = run_tiles(copied, seed=seed)
    opened = [i for i, grad in enumerate(grads_tiled) if grad is None or not is_ghost(grad)]
    assert unequal([all_open[i] for i in opened], [grads_tiled[i] for i in opened]) == []


# ---- compiled


@pytest.mark.inductor
@pytest.mark.slow
def test_a_compiled_model_trains_the_same_in_tiles(monkeypatch):
    """Loss, gradients, a smaller peak that is the predicted one, no recompile; the plan says so."""
    monkeypatch.setattr(batch_, "LEAST_FLOPS", {"cpu": 2 * 16 * 48 * 64})
    monkeypatch.setattr(tile_stretches, "WORTH", 0.9)
    batch, found = tokens(batch=32), {}
    chosen = {"preset": "balanced", "scheduler": "none", "freeze_rate": 0.5, "min_bytes": 0, "recompute": "blocks"}
    for tiles in (False, True):
        torch._dynamo.reset()
        model, session = optimized(Tiny(depth=4, dropout=0.0), executor="inductor", tiles=tiles, **chosen)
        loss = model(*batch)
        loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        memory = step_memory(functools.partial(model, *batch), lambda loss: loss.backward())
        assert memory.peak_bytes <= session.predict_peak().peak_bytes <= 1.02 * memory.peak_bytes
        assert session.recompiles == 0
        assert any("part of the batch after the other" in note for note in session.plan.notes) is tiles
        found[tiles] = loss.detach(), list(grads.values()), memory.peak_bytes
    assert torch.allclose(found[False][0], found[True][0], rtol=1e-6)
    assert nearly_equal(found[False][1], found[True][1])
    assert found[True][2] < found[False][2]
