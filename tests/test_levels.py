"""``recompute="auto"``: as much runs again as the closed units pay for; and where blocks are cut for it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from graphs import Bench, stopped_after
from reference import compile_reference, differences, equal_bits, optimized, step
from small_models import Tiny, tokens
from torch import nn

import slimfit_fx
from slimfit_fx.capture.partitioner import settings_of
from slimfit_fx.config import Config
from slimfit_fx.graph import ops
from slimfit_fx.passes import pipeline
from slimfit_fx.planning import levels
from slimfit_fx.planning.kinds import comes_from_softmax
from slimfit_fx.planning.levels import Level, afford, choose, shrink, spare
from slimfit_fx.planning.planner import Planning
from slimfit_fx.planning.prices import Prices
from slimfit_fx.planning.roofline import Roofline, node_flops
from slimfit_fx.planning.rows import Faster, GraphPlan, MemoryPlan, merge_plans
from slimfit_fx.planning.timeline import Timeline
from slimfit_fx.presets import BLOCK_INPUT, RECOMPUTE
from slimfit_fx.session import needless_recompute


def level(name: str, saved: float, again: float, *, blocks=8, working=0.0, error=0.0) -> Level:
    return Level(name, Planning(None), saved, saved + working, again, 100.0, blocks, error=error)


@pytest.mark.parametrize(
    ("products", "blocks", "expected"),
    [
        ((50.0, 40.0), (10.0, 90.0), "blocks"),
        ((50.0, 40.0), (10.0, 96.0), "products"),  # five run again anyway; 91 of 100 are too many
        ((50.0, 40.0), (10.0, 95.0), "blocks"),
        ((99.0, 99.0), (10.0, 99.0), "cheap"),
        ((81.0, 20.0), (90.0, 30.0), "cheap"),  # neither saves less than the first
    ],
)
def test_of_what_is_paid_the_least_is_saved(products, blocks, expected):
    found = choose([level("cheap", 80.0, 5.0), level("products", *products), level("blocks", *blocks)])
    assert found.name == expected


def test_without_repeated_blocks_nothing_more_runs_again():
    """A chain of recompute would run through the whole model."""
    found = [level("cheap", 80.0, 0.0, blocks=0), level("blocks", 1.0, 1.0, blocks=0)]
    assert choose(found).name == "cheap"


def test_a_level_at_which_nothing_can_be_planned_is_not_taken():
    assert choose([level("cheap", 80.0, 0.0), level("blocks", math.inf, 0.0)]).name == "cheap"


def test_what_a_block_brings_back_counts():
    assert choose([level("cheap", 80.0, 0.0), level("blocks", 30.0, 1.0, working=51.0)]).name == "cheap"
    assert choose([level("cheap", 80.0, 0.0), level("blocks", 30.0, 1.0, working=49.0)]).name == "blocks"


@pytest.mark.parametrize(
    ("more", "share"),
    [(-3.0, 1.0), (0.0, 1.0), (4.9, 1.0), (5.1, 0.875), (20.0, 0.5), (39.0, 0.125), (40.0, None), (500.0, None)],
)
def test_blocks_that_save_no_more_than_one_brings_back_need_not_run_again(more, share, monkeypatch):
    """Eight blocks save 40, five each; ``first`` needs 7 at work, too."""
    first, whole = level("cheap", 80.0, 0.0, working=7.0), level("blocks", 40.0, 80.0, working=7.0 + more)
    monkeypatch.setattr(levels, "plan_level", lambda share: dataclasses.replace(whole, share=share))
    found = shrink(SimpleNamespace(at_level=lambda _, share, price: share), whole, first)
    assert (None if found is None else found.share) == share


def test_no_more_blocks_are_spared_than_the_expected_peak_allows(monkeypatch):
    first, whole = level("cheap", 80.0, 0.0), level("blocks", 40.0, 80.0, working=20.0)
    peaks = {0.5: 61.0, 0.625: 60.7, 0.75: 60.5}  # 60.6 is as good as 60
    monkeypatch.setattr(levels, "plan_level", lambda s: dataclasses.replace(whole, share=s, peak_bytes=peaks[s]))
    planner = SimpleNamespace(at_level=lambda _, share, price: share)
    assert shrink(planner, whole, first).share == 0.75
    peaks |= {0.75: 61.0, 0.875: 61.0}
    assert shrink(planner, whole, first) is whole


@pytest.mark.parametrize(
    ("fewer", "all_of_them"),
    [
        (level("blocks", 58.0, 1.0, error=0.031), False),  # 60 against 58: not worth the time
        (level("blocks", 50.0, 1.0, working=12.0), True),  # attention scores of the last block come back anyway
        (level("blocks", 51.0, 1.0, error=0.245), True),  # where blocks do not run again, four bits are kept
    ],
)
def test_the_last_blocks_are_spared_unless_all_cost_less(fewer, all_of_them, monkeypatch):
    monkeypatch.setattr(levels, "shrink", lambda *_: fewer)
    whole = level("blocks", 32.0, 2.0, working=25.0, error=0.023)
    assert spare(None, whole, level("cheap", 196.0, 0.0)) == [fewer, whole][: 1 + all_of_them]


def test_a_level_that_saves_nothing_is_spared_in_all_blocks():
    assert spare(None, level("blocks", 80.0, 0.0), level("cheap", 80.0, 0.0)) == []


def test_products_run_again_for_the_time_that_is_spared_and_not_by_the_rates_of_a_device():
    """On a device that moves memory fast for its arithmetic no product is worth its time."""
    ids = tokens(batch=8)[0]
    bench = stopped_after("tag_liveness", post_norm(depth=3), (ids, torch.ones_like(ids)))
    planner = pipeline.make_planner(bench.work, settings_of(Config(preset="exact", recompute="auto", min_bytes=0)))
    planner.prices = Prices(Roofline({"float32": 2.0**34}, 2.0**38))
    priced, paid = (levels.plan_level(planner.at_level("products", product_price=price)) for price in (1.0, 1e-6))
    assert priced.again == 0.0 < paid.again and paid.saved_bytes < priced.saved_bytes
    planner.prices = Prices(Roofline({"float32": 2.0**34}, 2.0**34))
    chosen = levels.plan_paid(("cheap", "products"), planner)
    assert "products" in chosen.note


def test_what_reads_attention_scores_runs_again_in_whole_blocks_only():
    """It would bring the scores back."""
    ids = tokens(batch=2)[0]
    bench = stopped_after("tag_liveness", eager_attention(), (ids, torch.ones_like(ids)))
    planner = pipeline.make_planner(bench.work, settings_of(Config(preset="exact", recompute="auto", min_bytes=0)))
    found = {}
    for name in RECOMPUTE:
        cut = planner.at_level(name, product_price=1e-6).plan().cut
        found[name] = {n for n in cut.recomputed & planner.forward if ops.op_name(n) == "bmm"}
    scores = {n for n in planner.forward if ops.op_name(n) == "bmm"}
    assert len(scores) == 4, "two layers with two products of activations each"
    readers = {n for n in scores if any(comes_from_softmax(ops.view_base(i)) for i in n.all_input_nodes)}
    assert len(readers) == 2 and not readers & (found["cheap"] | found["products"])
    assert scores - readers <= found["products"]


def test_what_is_not_paid_in_all_blocks_runs_again_in_fewer():
    found = [level("cheap", 196.0, 0.0), level("blocks", 50.0, 80.0, working=12.0), level("blocks", 32.0, 95.0)]
    assert choose(found) is found[1]


@pytest.mark.parametrize(("again", "share"), [(89.0, None), (91.0, 0.875), (180.0, 0.5), (2000.0, None)])
def test_what_is_not_paid_in_all_blocks_is_afforded_in_as_many_as_are_paid(again, share, monkeypatch):
    """Closed units spare 100, of which 90 may be spent; eight blocks run ``again`` together."""
    first, whole = level("cheap", 80.0, 0.0), level("blocks", 40.0, again)
    monkeypatch.setattr(levels, "plan_level", lambda s: dataclasses.replace(whole, share=s, again=again * s))
    found = afford(SimpleNamespace(at_level=lambda _, share, price: share), whole, first)
    assert [one.share for one in found] == ([] if share is None else [share])


def test_a_dearer_level_that_is_paid_is_taken_before_part_of_a_cheaper_one(monkeypatch):
    """Of whole blocks three of eight are paid, of products all."""
    by_name = {
        "cheap": level("cheap", 80.0, 0.0),
        "products": level("products", 42.0, 89.0),
        "blocks": level("blocks", 40.0, 240.0),
    }

    def plan_level(at: tuple[str, float]) -> Level:
        name, share = at
        whole = by_name[name]
        saved = share * whole.saved_bytes + (1 - share) * 80.0
        return dataclasses.replace(whole, share=share, again=share * whole.again, saved_bytes=saved, peak_bytes=saved)

    monkeypatch.setattr(levels, "plan_level", plan_level)
    monkeypatch.setattr(levels, "_faster", lambda *_: None)
    planner = SimpleNamespace(at_level=lambda name, share=1.0, product_price=1.0: (name, share))
    assert '"auto": products,' in levels.plan_paid(RECOMPUTE, planner).note
    del by_name["products"]
    assert '"auto": blocks in the first 38%' in levels.plan_paid(("cheap", "blocks"), planner).note


def test_a_level_is_as_dear_as_what_it_loses():
    rough, fine = level("cheap", 50.0, 0.0, error=0.2), level("blocks", 40.0, 1.0, working=15.0, error=0.02)
    assert rough.peak_bytes < fine.peak_bytes and choose([rough, fine]) is fine


def test_a_level_that_saves_nothing_is_dropped():
    first = level("cheap", 80.0, 0.0)
    assert shrink(None, level("blocks", 80.0, 0.0), first) is None
    assert shrink(None, level("blocks", math.inf, 0.0), first) is None
    assert shrink(None, level("blocks", math.inf, 0.0), level("cheap", math.inf, 0.0)) is None, "nothing was planned"


def post_norm(depth: int) -> nn.Module:
    """What passes on from block to block comes from a norm behind a wide product."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 31}
    config = transformers.BertConfig(num_hidden_layers=depth, attention_probs_dropout_prob=0.0, num_labels=5, **sizes)
    return transformers.BertForSequenceClassification(config).train()


def eager_attention() -> nn.Module:
    """Two layers whose attention scores stand in memory."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 31}
    config = transformers.BertConfig(num_hidden_layers=2, attn_implementation="eager", **sizes)
    return transformers.BertForSequenceClassification(config).train()


def again(bench: Bench) -> list[tuple[int, int]]:
    """(inner size, outer size) of each product that runs again."""
    planning = bench.work.planning
    assert planning is not None and planning.cut is not None
    found = [n for n in planning.cut.recomputed if ops.is_matrix_product(n) and n.name in kept_forward(bench)]
    return sorted(tuple(n.args[-1].meta["val"].shape) for n in found)


def kept_forward(bench: Bench) -> set[str]:
    return {n.name for n in bench.work.pair().forward.graph.nodes}


def test_blocks_are_cut_where_the_least_runs_again():
    """The wide product before the last norm of a block is spared (the last block may be cut in two), for two numbers
    per row."""
    ids = tokens(batch=8)[0]
    bench = stopped_after(
        "split_joint", post_norm(depth=3), (ids, torch.ones_like(ids)), recompute="blocks", preset="exact"
    )
    shapes = again(bench)
    assert shapes.count((256, 1024)) == 3 and shapes.count((1024, 256)) <= 1


def test_no_codec_touches_where_blocks_run_again_what_it_must_not_touch():
    """What must stay exact, random numbers, masks and what may hold mask constants is stored as without."""
    ids = tokens(batch=8)[0]
    bench = stopped_after("tag_liveness", post_norm(depth=3), (ids, torch.ones_like(ids)))
    planner = pipeline.make_planner(bench.work, settings_of(Config(preset="max", recompute="cheap", min_bytes=0)))
    blocks = planner.at_level("blocks")
    assert blocks.blocks.windows
    seen = set()
    for node in filter(ops.is_tensor, planner.forward):
        cheap, again = planner.decide(node), blocks.decide(node)
        barred = node in planner.tainted or ops.is_random(node) or cheap.kind in ("exact", "mask", "input", "output")
        if barred or not node.meta["val"].dtype.is_floating_point:
            seen.add(cheap.kind)
            assert again.codec is None or again.codec.lossless, node
            assert (again.codec, again.parts) == (cheap.codec, cheap.parts) and again.kind in (cheap.kind, BLOCK_INPUT)
        elif again.codec is not None and not again.codec.lossless:
            assert (again.kind, again.codec.name, again.parts) == (BLOCK_INPUT, "int8", None)
    assert {"mask", "input"} <= seen and planner.tainted & planner.forward


@pytest.mark.parametrize(("freeze_rate", "paid"), [(0.9, True), pytest.param(0.2, False, marks=pytest.mark.thorough)])
def test_the_plan_says_what_was_chosen_beyond_cheap_work(freeze_rate, paid):
    config = Config(preset="exact", recompute="auto", freeze_rate=freeze_rate, min_bytes=0)
    plan = slimfit_fx.plan(Tiny(depth=4), *tokens(batch=8), config=config)
    found = [note.partition(",")[0] for note in plan.notes if "recompute" in note]
    assert len(found) == paid
    assert all(re.fullmatch(r'graph 0: recompute "auto": (products|blocks)', one) for one in found)
    spent = [int(n) for note in plan.notes for n in re.findall(r"(\d+)% of the operations that closed units", note)]
    assert len(spent) == paid and all(0 < share <= 90 for share in spent)


def test_the_plan_says_in_how_many_of_the_blocks():
    ids = tokens(batch=64)[0]
    plan = slimfit_fx.plan(post_norm(depth=4), ids, torch.ones_like(ids), config=Config(recompute="auto", min_bytes=0))
    (note,) = (n for n in plan.notes if "recompute" in n)
    assert re.search(r'"auto": \w+ in the first \d+%, \d+% of the operations', note)


def merged(*, peak: int, update: int, faster: Faster | None) -> MemoryPlan:
    """The plan of a step that takes ``peak``, and an optimizer's step that takes ``update``."""
    step = Timeline((0,), (peak, 1), (1, update), peak, 1, ())
    graph = GraphPlan((), (), (), faster=faster)
    whole = merge_plans([graph], [()], [], preset="max", freeze_rate=0.9, parameter_bytes=1, optimizer_bytes=2)
    return dataclasses.replace(whole, timeline=step, expected_gradient_error=0.02)


@pytest.mark.parametrize(
    ("peak", "more", "error", "says"),
    [
        (60, 40, 0.02, "take 12 ms less and no more memory in all: the optimizer's step"),
        (60, 40, 0.16, "no more memory in all, with a gradient error of 0.16 to expect: the optimizer's step"),
        (60, 41, 0.02, None),  # 101 of 100
        (110, 5, 0.02, None),  # the step is the peak
        (60, -5, 0.02, None),  # it was taken for its error
    ],
)
def test_the_plan_says_where_recompute_buys_nothing(peak, more, error, says):
    found = needless_recompute(merged(peak=peak, update=100, faster=Faster("cheap", more, 12.0, error)))
    assert (found == []) if says is None else (says in found[0] and 'recompute="cheap"' in found[0])
    assert needless_recompute(merged(peak=peak, update=100, faster=None)) == []
    hardly = Faster("cheap", more, 0.09, error)
    assert needless_recompute(merged(peak=peak, update=100, faster=hardly)) == [], "who would notice"
    plan = merged(peak=peak, update=100, faster=Faster("cheap", more, 12.0, error))
    assert needless_recompute(plan, accumulates=True) == [], "gradients of earlier micro-batches are there, too"


def test_what_was_left_survives_json_and_is_summed_over_graphs():
    left = Faster("cheap", 5, 1.5, 0.1)
    graph = GraphPlan((), (), (), faster=left)
    assert GraphPlan.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    both = merge_plans(
        [graph, GraphPlan((), (), ()), graph], [(), (), ()], [],
        preset="max", freeze_rate=0.9, parameter_bytes=1, optimizer_bytes=2,
    )  # fmt: skip
    assert both.faster == Faster("cheap", 10, 3.0, 0.1)


def test_gradients_are_the_same_bits():
    model, session = optimized(Tiny(depth=4), preset="exact", freeze_rate=0.9, min_bytes=0, recompute="auto")
    reference = Tiny(depth=4)
    expected_loss, expected = step(compile_reference(reference), reference, tokens())
    loss, grads = step(model, model, tokens())
    assert equal_bits(expected_loss, loss)
    assert differences(expected, grads, closed=set(session.gates.closed)) == []
    assert "products" in next(n for n in session.plan.notes if "recompute" in n)


def test_where_every_unit_trains_nothing_is_spared():
    assert Config(recompute="auto", scheduler="none").recompute_levels == ("cheap",)
    assert Config(recompute="auto").recompute_levels == RECOMPUTE
    assert Config(recompute="auto").fingerprint() != Config(recompute="cheap").fingerprint()
    assert Config(recompute="auto", scheduler="none").fingerprint() == Config(recompute="cheap").fingerprint()


@pytest.mark.parametrize(("preset", "levels"), [("exact", 1), ("paper", 1), ("balanced", 3), ("max", 3)])
def test_presets_say_what_runs_again(preset, levels):
    assert Config(preset=preset).recompute_levels == RECOMPUTE[:levels]
    assert Config(preset=preset, recompute="products").recompute_levels == ("products",)


def test_products_of_a_graph_have_their_operations():
    ids = tokens(batch=8)[0]
    bench = stopped_after("split_joint", post_norm(depth=2), (ids,), preset="exact", min_bytes=0)
    found = sum(map(node_flops, bench.work.pair().forward.graph.nodes))
    per_block = 2 * ids.numel() * (4 * 256 * 256 + 2 * 256 * 1024) + 4 * ids.numel() * ids.shape[1] * 256
    assert found == 2 * per_block + 2 * 8 * 256 * (256 + 5)
