"""The peak that a joint graph lets expect, against arithmetic and against the code that Inductor writes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from effort import examples, first
from graphs import stopped_after
from hypothesis import given, settings
from small_models import Tiny, tokens
from strategies import Spec, build, inputs, specs
from torch import nn

import slimfit_fx
from bench.levels import peak_of_visits, watched_traces
from slimfit_fx.capture.partitioner import settings_of
from slimfit_fx.config import Config
from slimfit_fx.graph import batch
from slimfit_fx.graph.batch import Batch, BatchCut
from slimfit_fx.passes import pipeline
from slimfit_fx.planning.expected_peak import expected_backward, expected_peak, visits
from slimfit_fx.planning.mincut import Cut
from slimfit_fx.planning.planner import Planner
from slimfit_fx.presets import RECOMPUTE


def planner_of(model: nn.Module, batch, *, units=None, **changes) -> Planner:
    work = stopped_after("tag_liveness", model, batch, units=units).work
    return pipeline.make_planner(work, settings_of(Config(**{"min_bytes": 0, **changes})))


def bert(depth: int, *, scores: bool) -> nn.Module:
    """``scores``: of attention stand in memory."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 31}
    how = "eager" if scores else "sdpa"
    config = transformers.BertConfig(
        num_hidden_layers=depth, attention_probs_dropout_prob=0.1 * scores, attn_implementation=how, **sizes
    )
    return transformers.BertForSequenceClassification(config).train()


class Chain(nn.Module):
    """Two products without bias and a function between them that backward needs the input of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).sum()


def test_a_chain_by_hand():
    """The function's output is saved; the gradient of it, a product, is alive when that of its input is written."""
    x = torch.randn(1000, 8, requires_grad=True)
    planner = planner_of(Chain(), (x,), preset="exact", freeze_rate=0.9)
    cut = planner.plan().cut
    wide, narrow = 4 * 1000 * 64, 4 * 1000 * 8
    assert sum(map(planner.held_bytes, cut.saved)) == pytest.approx(wide, rel=0.02)
    found = expected_peak(planner, cut)
    assert found == pytest.approx(2 * wide, abs=2 * narrow), found / wide


def test_the_worst_choice_of_units_counts():
    """One unit is open at 0.9, both at 0.4: another gradient, and what that one reads."""
    peaks = {}
    for rate in (0.9, 0.4):
        planner = planner_of(Chain(), (torch.randn(2, 8),), preset="exact", freeze_rate=rate)
        peaks[rate] = expected_peak(planner, planner.plan().cut)
    gradient, read = 4 * 8 * 64, 4 * 2 * 64
    assert gradient <= peaks[0.4] - peaks[0.9] <= gradient + 2 * read


class Wide(nn.Module):
    """A function between two products whose output only the second unit needs: it is made from the first's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.gelu(self.first(x))).sum()


def test_a_closed_unit_keeps_nothing_that_its_branch_would_make_itself():
    x = torch.randn(1000, 8, requires_grad=True)
    planner = planner_of(Wide(), (x,), preset="exact", freeze_rate=0.5)
    trace = expected_backward(planner, planner.plan().cut)
    wide, narrow = 4 * 1000 * 64, 4 * 1000 * 8
    assert trace.num_gates == 2 and trace.gate_bytes == (4 * 8 * 64,) * 2
    closed, second = trace.peak(()).peak_bytes, trace.peak((1,)).peak_bytes
    assert closed == pytest.approx(2 * wide, abs=2 * narrow), "the input of the function, and its gradient"
    assert {event.delta_bytes for event in trace.events if event.owners == {1}} >= {wide, -wide}
    assert closed <= second <= closed + 4 * 8 * 64, "the branch is done before the gradient of its input is made"


def test_every_unit_is_open_as_often_as_steps_are_looked_at():
    sizes = (5, 0, 1, 1, 9, 2, 2)
    found = visits(sizes, 0.7)
    assert found[0] == frozenset() and all(len(opened) <= 2 for opened in found)
    counts = [sum(gate in opened for opened in found) for gate in range(len(sizes))]
    assert counts == [3, 0, 3, 3, 3, 3, 3], "the second gate has no gradient"
    assert visits(sizes, 0.0)[1:] == (frozenset({0, 2, 3, 4, 5, 6}),) * 3 and visits((), 0.9) == (frozenset(),)


@settings(max_examples=examples(20))
@given(spec=specs(sizes=("static", "all")))
def test_it_is_that_of_the_worst_step_and_at_least_what_is_saved(spec: Spec):
    torch._dynamo.reset()
    spec = dataclasses.replace(spec, break_at=None, every_parameter=True)
    planner = planner_of(build(spec), inputs(spec), units=spec.is_unit, preset="balanced", dynamic=spec.dynamic)
    for level in RECOMPUTE:
        one = planner.at_level(level)
        cut = one.plan().cut
        if cut is not None:
            trace, peak = expected_backward(one, cut), expected_peak(one, cut)
            steps = visits(trace.gate_bytes, one.freeze_rate)
            assert peak == max(trace.peak(opened).peak_bytes for opened in steps) and frozenset() in steps
            assert peak <= trace.peak(range(trace.num_gates)).peak_bytes
            always = [node for node in cut.saved if one.chance(node) == 1]
            assert math.fsum(map(one.held_bytes, always)) <= peak + len(always)
            again = Cut(frozenset(reversed(sorted(cut.saved, key=str))), frozenset(sorted(cut.recomputed, key=str)))
            assert expected_peak(one, again) == expected_peak(one, cut), "whatever the order of a set"


@pytest.mark.inductor
@pytest.mark.parametrize(("scores", "levels"), [(True, RECOMPUTE[1:]), (False, RECOMPUTE)])
@pytest.mark.thorough
def test_levels_are_in_the_order_of_what_inductor_takes(scores, levels):
    """Where two differ much. With attention scores in memory whole blocks bring back more than they save."""
    ids = torch.arange(16 * 128).reshape(16, 128) % 31
    batch, taken, expected = (ids, torch.ones_like(ids)), dict[str, float](), dict[str, float]()
    planner = planner_of(bert(3, scores=scores), batch, preset="balanced", recompute="cheap")
    for level in levels:
        config = Config(preset="balanced", recompute=level, min_bytes=0)
        with watched_traces() as traces:
            slimfit_fx.plan(bert(3, scores=scores), *batch, config=config, peak=True)
        taken[level] = peak_of_visits(traces[-1], config.freeze_rate)
        one = planner.at_level(level)
        expected[level] = expected_peak(one, one.plan().cut)
        assert 0.6 < expected[level] / taken[level] < 1.3, (level, expected, taken)
    for one, other in itertools.permutations(levels, 2):
        if taken[one] < 0.8 * taken[other]:
            assert expected[one] < expected[other], (taken, expected)
    if scores:
        assert taken["products"] < 0.8 * taken["blocks"], f"the case that saved bytes get wrong: {taken}, {expected}"


def test_what_is_made_in_tiles_counts_with_one_of_them():
    """What is saved is there whole; what backward makes of the batch is there for a fifth of it."""
    planner = planner_of(Chain(), (torch.randn(10, 100, 8, requires_grad=True),), preset="exact", freeze_rate=0.9)
    cut, wide = planner.plan().cut, 4 * 1000 * 64
    whole = expected_peak(planner, cut)
    planner.batch_cut = BatchCut(Batch(10, 1000), 5)
    assert whole == pytest.approx(2 * wide, rel=0.15)
    assert expected_peak(planner, cut) == pytest.approx(1.2 * wide, rel=0.15)


@pytest.mark.parametrize(
    ("least", "changes", "tiles"),
    first([(0.0, {}, 8), (1e12, {}, None), (0.0, {"tiles": False}, None), (0.0, {"executor": "interpreter"}, None)], 2),
)
def test_tiles_are_expected_where_there_will_be_some(monkeypatch, least, changes, tiles):
    monkeypatch.setattr(batch, "LEAST_FLOPS", {"cpu": least})
    chosen = {"executor": "inductor", "tiles": True, **changes}
    found = planner_of(Tiny(depth=2), tokens(batch=8), **chosen).batch_cut
    assert (found.tiles if found else None) == tiles
    assert found is None or found.batch == Batch(8, 64)
