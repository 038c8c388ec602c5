"""A budget in bytes: sizes, candidates, what is said when nothing fits, and that the choice holds."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Small, small_batch
from test_peak import Encoder, measured
from torch import Tensor, nn
from torch.nn import functional as F

import slimfit_fx
from bench import budget as budget_bench
from bench import plan_big
from slimfit_fx.capture.captured import CapturedGraph
from slimfit_fx.capture.fit import Attempt, first_that_fits, with_fewer_blocks
from slimfit_fx.capture.partitioner import GatedPartitioner, PlanTooLarge
from slimfit_fx.capture.under_budget import UnderBudget
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import (
    Budget,
    FixedBytes,
    Judged,
    MemoryBudgetError,
    budget_bytes,
    explain,
    fixed_bytes,
    held_alone,
    judge,
    parse_bytes,
    rate_that_leaves,
)
from slimfit_fx.planning.candidates import between, candidates, place_of
from slimfit_fx.planning.peak import Event, StepTrace
from slimfit_fx.planning.rows import GraphPlan, MemoryPlan, PlanRow
from slimfit_fx.schedule import UnitInfo, make_scheduler

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * 2**30),
        ("500MB", 500_000_000),
        (" 1.5 g ", 1_500_000_000),
        ("2kib", 2048),
        ("17", 17),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size == budget_bytes(text, CPU)


@pytest.mark.parametrize("text", ["", "GiB", "6 gigs", "-3MB", "1e9", "six"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="not a size in bytes: got "):
        parse_bytes(text)


def test_a_share_is_one_of_the_device():
    assert budget_bytes(1000, CPU) == 1000
    assert 0 < budget_bytes(0.5, CPU) == budget_bytes(1.0, CPU) // 2


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"memory_budget": "6 gigs"}, ValueError, "memory_budget must be bytes, .*got '6 gigs'; write it as '6GiB'"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be bytes, .*got -1"),
        ({"memory_budget": 0}, ValueError, "got 0"),
        ({"memory_budget": 2.5}, ValueError, "got 2.5"),
        ({"memory_budget": True}, TypeError, "memory_budget must be bytes, .*got True"),
        ({"memory_budget": 10, "executor": "interpreter"}, ValueError, "memory_budget needs executor 'inductor'"),
        ({"recompute_price": 0}, ValueError, "recompute_price must be a finite number > 0, got 0"),
        ({"recompute_price": "low"}, TypeError, "recompute_price must be a number > 0, got 'low'"),
        ({"recompute_share": 0}, ValueError, r"recompute_share must be in \(0, 1\], got 0"),
        ({"recompute_share": None}, TypeError, r"recompute_share must be a number in \(0, 1\], got None"),
        ({"recompute_share": 0.5}, ValueError, "recompute_share 0.5 needs recompute 'products' or 'blocks', got 'au"),
        ({"recompute_share": 0.5, "preset": "exact"}, ValueError, "'products' or 'blocks', got 'cheap'"),
    ],
)
def test_settings_are_checked_before_anything_is_traced(settings, error, match):
    with pytest.raises(error, match=match):
        Config(**settings)


def test_no_budget_without_a_compiler(monkeypatch):
    monkeypatch.setattr("slimfit_fx.api.has_compiler", lambda device: "no C++ compiler")
    with pytest.raises(ValueError, match="memory_budget needs executor 'inductor'.*no C.. compiler"):
        slimfit_fx.optimize(Encoder(), memory_budget="1GiB")


def test_candidates_go_from_the_least_lossy_to_what_was_asked_for_and_recompute_more_only_then():
    presets = {p: [c.preset for c in candidates(Config(preset=p))] for p in ("exact", "paper", "balanced", "max")}
    assert presets == {
        "exact": ["exact"] * 7,
        "paper": [*["exact", "paper"], *["paper"] * 3, *["exact", "paper"], "paper", *["exact", "paper"]],
        "balanced": [*["exact", "balanced"], *["balanced"] * 3, *["exact", "balanced"], "balanced",
                     *["exact", "balanced"]],
        "max": [*["exact", "balanced", *["max"] * 3], *["max"] * 3, *["exact", "balanced", *["max"] * 3], "max",
                *["exact", "balanced", *["max"] * 3]],
    }  # fmt: skip
    chosen = candidates(Config(preset="max", codecs={"gelu_input": "int2"}, freeze_rate=0.5))
    assert [c.codecs for c in chosen if c.preset != "max"] == [None, None] * 3
    mine = [(c.recompute, c.recompute_share) for c in chosen if c.codecs == {"gelu_input": "int2"}]
    assert len(mine) == len(set(mine)) == 7, "the last of each step"
    assert {c.freeze_rate for c in chosen} == {0.5}


def test_more_runs_again_step_by_step_from_what_was_asked_for():
    def steps(**settings: object) -> list[tuple[str, float]]:
        return [(c.recompute, c.recompute_share) for c in candidates(Config(preset="exact", **settings))]

    everything = [("cheap", 1.0), *(("products", s) for s in (0.25, 0.5, 0.75, 1.0)), ("blocks", 0.5), ("blocks", 1.0)]
    assert steps() == steps(recompute="auto") == everything
    assert steps(recompute="products") == [("products", 1.0), ("blocks", 0.5), ("blocks", 1.0)]
    assert steps(recompute="products", recompute_share=0.6) == [("products", 0.6), *everything[3:]]
    assert steps(recompute="blocks") == [("blocks", 1.0)]


def test_between_two_presets_some_kinds_have_the_codec_of_one_and_some_of_the_other():
    _, balanced, *mixed, most = candidates(Config(preset="max"))[:5]
    for one in mixed:
        pairs = {kind: (balanced.codec_map[kind], codec) for kind, codec in one.codec_map.items()}
        assert all(codec in (mild, most.codec_map[kind]) for kind, (mild, codec) in pairs.items())
        assert one.codec_map not in (balanced.codec_map, most.codec_map)
    assert all(one.codec_map["normalised"] == "int8" for one in mixed), "where the error costs most per byte"


def test_a_codec_of_the_users_that_loses_less_is_kept_in_milder_presets():
    chosen = candidates(Config(preset="max", codecs={"normalised": None, "gelu_input": "int2"}))
    assert chosen[1].preset == "balanced" and chosen[1].codecs == {"normalised": None}
    assert all(one.codec_map["normalised"] is None for one in chosen)


TRACE = StepTrace((Event(100, 0), Event(40, 1, frozenset([0])), Event(30, 2, frozenset([1])), Event(-100, 0)), 1, {}, 2)


def test_a_step_is_judged_by_its_worst_choice_or_by_the_update():
    def total(open_count: int, fixed: FixedBytes, **settings: bool) -> int:
        return judge(Config(), TRACE, Budget(0, open_count, lambda _: fixed, **settings)).total_bytes

    small, large = FixedBytes(5, 1, 10, 20), FixedBytes(5, 1, 10, 500)
    assert (total(1, small), total(2, small), total(2, large)) == (16 + 140, 16 + 170, 16 + 500)
    assert total(1, FixedBytes(5, 1, 10, 20, gradients=7), accumulates=True) == 16 + 7 + 140


@pytest.mark.parametrize(("limit", "again", "floor"), [(200, False, 0), (160, True, 1)])
def test_accumulated_gradients_lead_to_another_plan_only_if_they_do_not_fit(limit, again, floor):
    fixed, config = FixedBytes(5, 1, 10, 20, gradients=7), Config(preset="max")
    graph = CapturedGraph(("a", "b"), is_recompile=False, chosen=candidates(config)[0])
    graph.keep_trace(TRACE)
    under = UnderBudget(config, Budget(limit, 1, lambda _: fixed), [graph])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert under.expect_gradients() is again
    assert under.budget.accumulates and under.floor == floor
    assert [("gradient_accumulation was not set" in str(w.message)) for w in said] == [True] * again


def test_with_nothing_smaller_left_training_goes_on():
    fixed, config = FixedBytes(5, 1, 10, 20, gradients=7), Config(preset="max")
    graph = CapturedGraph(("a", "b"), is_recompile=False, chosen=candidates(config)[-1])
    graph.keep_trace(TRACE)
    under = UnderBudget(config, Budget(160, 1, lambda _: fixed), [graph])
    with pytest.warns(RuntimeWarning, match="nothing fits into .*training goes on with the smallest plan.*accumulated"):
        assert under.expect_gradients() is False


@pytest.mark.parametrize(
    ("now", "again", "floor", "told"),
    [
        (FixedBytes(5, 1, 10, 20), False, 0, ""),
        (FixedBytes(5, 1, 14, 20), False, 0, ""),
        (FixedBytes(5, 1, 15, 20), True, 1, "a step with the optimizer that is in use would take 161 of 160 bytes"),
        (FixedBytes(5, 1, 10, 145), False, 0, "nothing fits into .* in the optimizer's step"),
    ],
)
def test_another_optimizer_leads_to_another_plan_only_if_that_helps(now, again, floor, told):
    config, beside = Config(preset="max"), [FixedBytes(5, 1, 10, 20)]
    graph = CapturedGraph(("a", "b"), is_recompile=False, chosen=candidates(config)[0])
    graph.keep_trace(TRACE)
    under = UnderBudget(config, Budget(160, 1, lambda _: beside[-1]), [graph])
    assert not under.meet_optimizers(), "nothing was planned yet"
    under._beside = beside[0]
    beside.append(now)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert under.meet_optimizers() is again
        assert not under.meet_optimizers(), "it is asked once"
    assert under.floor == floor
    assert len(said) == bool(told) and all(re.search(told, str(w.message)) for w in said)


@pytest.mark.parametrize(
    ("first", "update", "expected"),
    [(0, 20, True), (-1, 20, False), (0, 200, False)],
    ids=["larger before", "smallest before", "the optimizer takes most"],
)
def test_graphs_before_a_break_are_planned_again_if_that_helps(first, update, expected):
    config = Config(preset="balanced")
    tried = candidates(config)
    before = CapturedGraph(("a",), is_recompile=False, chosen=tried[first])
    now = CapturedGraph(("b",), is_recompile=False)
    under = UnderBudget(config, Budget(160, 1, lambda _: FixedBytes(5, 1, 10, update)), [before, now])
    found = Attempt(tried[-1], GraphPlan((), (), ()), (), TRACE, TRACE, judge(tried[-1], TRACE, under.budget))

    def meet() -> None:
        under._go_on_or_refuse(now, found, None, lambda *_: pytest.fail("nothing is proposed for a part"))

    if not expected:
        with pytest.raises(MemoryBudgetError, match="breaks into several graphs; up to this one a step takes") as error:
            meet()
        assert error.value.smallest_bytes is None
        return
    with pytest.warns(RuntimeWarning, match=r"before the next forward all .*recompute blocks"):
        meet()
    meet()  # a third graph of this forward
    assert under.begin_forward() and under.floor == len(tried) - 1
    with pytest.raises(MemoryBudgetError):
        meet()
    under.settled = True
    with pytest.warns(RuntimeWarning, match="training goes on with the smallest plan"):
        meet()


def test_only_what_was_planned_as_a_whole_settles_a_model():
    under = UnderBudget(Config(), Budget(160, 1, lambda _: FixedBytes(0, 0, 0, 0)), [])
    assert not under.begin_forward() and not under.settled, "nothing was planned"
    under._planned, under.outgrown = True, True
    assert under.begin_forward() and not under.settled, "it is planned again"
    assert not under.begin_forward() and under.settled


def said(
    budget: Budget, *, preset: str = "exact", batch: int | None = 8, less: int = 0, more: dict[float, int] | None = None
) -> str:
    """What is said of ``TRACE``. Preset max takes ``less`` bytes less; freeze rates may take ``more`` than promised."""

    def retry(config: Config, budget: Budget) -> tuple[Judged, StepTrace]:
        own = Event((more or {}).get(config.freeze_rate, 0) - (less if config.preset == "max" else 0), 9)
        trace = StepTrace((own, *TRACE.events), 1, {}, 2)
        return judge(config, trace, budget), trace

    config = Config(preset=preset, freeze_rate=0)
    return explain(budget, judge(config, TRACE, budget), TRACE, batch, retry)


def test_what_is_said_when_nothing_fits():
    budget = Budget(160, 2, lambda _: FixedBytes(5, 1, 10, 0), num_units=2)
    text = said(budget)
    assert text.startswith("memory_budget: nothing fits into 0.0 MiB. The smallest step takes 0.0 MiB (186 bytes): ")
    assert "in the step itself (preset exact); a freeze rate of 0.5 would fit (1 open units instead of 2)" in text
    assert "a batch of about 6 instead of 8 would fit (slimfit_fx.max_batch finds the largest)" in text
    assert "preset" not in text.replace("(preset exact)", ""), "it would take as much"
    assert "alone do not fit" in said(dataclasses.replace(budget, limit=16))


def test_preset_max_is_proposed_with_what_it_takes():
    budget = Budget(160, 2, lambda _: FixedBytes(5, 1, 10, 0))
    text = "preset 'max' (activations in four bits) "
    assert text + "would fit: it takes 0.0 MiB, 0.0 MiB less" in said(budget, less=26)
    assert text + "alone does not do, but takes 0.0 MiB, 0.0 MiB less" in said(budget, less=25)
    assert text not in said(budget, preset="max", less=26) and text not in said(budget)


def test_no_freeze_rate_is_proposed_that_was_not_seen_to_fit():
    """The plan for another rate may take more than the trace of this one promises."""
    rows = tuple(Event(10, number, frozenset([number])) for number in range(10))
    trace = StepTrace(rows, 1, {}, 10)
    for more, expected in (({}, "0.4"), ({0.4: 10}, "0.5"), ({0.4: 10, 0.5: 20, 0.6: 30}, None)):
        asked = []

        def retry(config: Config, budget: Budget, more: dict[float, int] = more, asked: list[float] = asked):
            asked.append(config.freeze_rate)
            own = StepTrace((Event(more.get(config.freeze_rate, 0), 99), *rows), 1, {}, 10)
            return judge(config, own, budget), own

        budget = Budget(69, 9, lambda _: FixedBytes(5, 1, 3, 0), num_units=10)
        text = explain(budget, judge(Config(preset="max"), trace, budget), trace, None, retry)
        assert asked == [0.4, 0.5, 0.6][: len(more) + (expected is not None)]
        assert ("would fit" in text) == (expected is not None) and (expected or "") in text
    assert "would fit" not in said(Budget(160, 2, lambda _: FixedBytes(5, 1, 10, 0)), batch=None), "no rate to raise"


@pytest.mark.parametrize(("update", "rate"), [(lambda count: 150 * count, True), (lambda count: 280 + count, False)])
def test_where_the_optimizer_takes_most_neither_batch_nor_preset_is_proposed(update, rate):
    budget = Budget(16 + 250, 2, lambda count: FixedBytes(5, 1, 10, update(count)), num_units=2)
    text = said(budget, less=50)
    assert "in the optimizer's step (preset exact); " in text
    assert ("a freeze rate of 0.5 would fit (1 open units instead of 2)" in text) == rate
    assert "no smaller batch and no preset helps" in text
    assert "a batch of about" not in text and "four bits" not in text


def test_nothing_more_is_tried_where_the_optimizer_takes_most():
    written = []

    def attempt(configs, gives_up):
        written.append(configs[0])
        return Attempt(configs[0], GraphPlan((), (), ()), (), TRACE, TRACE, judge(configs[0], TRACE, budget))

    budget = Budget(100, 1, lambda _: FixedBytes(5, 1, 10, 500))
    found, holds = first_that_fits(candidates(Config(preset="max")), attempt, budget)
    assert not holds and found.judged.total_bytes == 516 and written == candidates(Config(preset="max"))[:1]


def held_row(size: int) -> GraphPlan:
    return GraphPlan(
        (PlanRow(0, "v", "", "mul", "float", False, (), (), "float32", "keep", None, "", 0, size, 0),), (), ()
    )


def test_what_runs_more_again_but_holds_no_less_is_not_tried():
    """Nothing fits: all that differ in what they hold are run dry, in order."""
    tried = candidates(Config(preset="exact"))
    held = dict(zip(tried, (80, 80, 60, 60, 50, 55, 40), strict=True))
    written = []

    def attempt(configs, gives_up):
        for config in configs:
            if gives_up is None or not gives_up(config, held_row(held[config])):
                written.append(config)
                return Attempt(config, held_row(0), (), TRACE, TRACE, Judged(config, 0, 200))
        raise PlanTooLarge

    first_that_fits(tried, attempt, Budget(100, 1, lambda _: FixedBytes(0, 0, 0, 0)))
    assert written == [tried[0], tried[2], tried[4], tried[6]]


@given(num_units=st.integers(2, 3000), data=st.data())
def test_a_rate_leaves_as_many_units_open_as_is_said(num_units, data):
    count = data.draw(st.integers(1, num_units - 1))
    rate = float(f"{rate_that_leaves(count, num_units)}")
    scheduler = make_scheduler("random")
    scheduler.start([UnitInfo(str(n), 1, 4) for n in range(num_units)], freeze_rate=rate, seed=0)
    assert scheduler.open_count == count


def test_a_rate_has_few_digits():
    assert rate_that_leaves(3, 101) == 0.98 and rate_that_leaves(1, 2) == 0.5
    assert rate_that_leaves(71, 100) > 0.29, "int(0.29 * 100) is 28"


class Stack(nn.Module):
    """Layers of which each saves something that only its own weights need."""

    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(F.gelu(first(x)))
        return x.square().mean()


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
def test_what_is_proposed_is_accepted():
    """A budget below the smallest: each way out that the error names leads to a plan that fits."""

    def plan(batch: int = 64, **settings: Any) -> MemoryPlan:
        settings = {"preset": "exact", "freeze_rate": 0, **settings}
        return slimfit_fx.plan(Stack(), torch.zeros(batch, 32, 32), **settings)

    smallest = plan(peak=True)
    limit = 3 * smallest.parameter_bytes + int(0.92 * smallest.peak.worst_bytes)
    with pytest.raises(MemoryBudgetError) as error:
        plan(memory_budget=limit)
    text = str(error.value)
    rate, fewer = re.search(r"a freeze rate of (\S+) would fit \((\d+) open units instead of 8\)", text).groups()
    batch = int(re.search(r"a batch of about (\d+) instead of 64 would fit", text)[1])
    assert plan(memory_budget=limit, freeze_rate=float(rate)).peak.open_count == int(fewer) < 8
    assert 0.9 * 0.92 * 64 < batch and plan(batch, memory_budget=limit).peak is not None
    assert "preset 'max' (activations in four bits) would fit: it takes" in text
    assert plan(memory_budget=limit, preset="max").peak.worst_bytes < smallest.peak.worst_bytes


def test_the_benchmark_has_every_preset_and_sees_a_peak_that_rises():
    found = budget_bench.groups(16, seed=0)
    assert len({(group.case.model, group.preset) for group in found}) == 16
    assert [group.preset for group in found[:4]] == list(budget_bench.PRESETS)
    assert budget_bench.falling(10, 100, 10) == [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]
    assert budget_bench.rises([5, 4, None, 4, 3]) == 0
    assert budget_bench.rises([100, 90, 91, 90, 100]) == 2 and budget_bench.rises([100, 90, 90.5, 95], 1.01) == 1


def test_cases_that_do_not_run_keep_their_rows():
    stored = {"commit": "a", "date": "1", "results": [{"name": "bert-large", "seconds": 1}, {"name": "llama-1b"}]}
    now = [{"name": "vit-large-384", "commit": "b"}, {"name": "llama-1b", "commit": "b"}]
    assert plan_big.merged(stored, now) == [
        {"name": "bert-large", "seconds": 1, "commit": "a", "date": "1"}, *now
    ]  # fmt: skip


def test_what_is_there_before_a_step():
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    found = fixed_bytes(model, [400], 1, optimizer_state=7, copies=[100])
    assert (found.parameters, found.optimizer_state) == (520, 7)
    assert found.buffers == 10 * 4 * 2 + 8
    assert found.update == 520 + 100 + 3 * 520, "gradients, copies of open weights, a rough bound for the optimizer"
    known = fixed_bytes(model, [400], 1, optimizer_state=7, temporaries=11)
    assert known.update == 520 + 11
    worst = fixed_bytes(model, [200, 190], 1, optimizer_state=7, copies=[5, 100], temporaries=0)
    assert worst.update == 520 - 200 + 100, "the unit that takes most with its copy"
    assert worst.gradients == 520 - 190


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
def test_the_choice_fits_and_a_smaller_budget_never_peaks_higher():
    """From a budget that everything fits to one that nothing does: presets, peaks, and one clear error."""
    batch, peaks, presets = small_batch(), [], []
    fixed = sum(p.numel() * 4 for p in Small().parameters()) * 3  # AdamW
    budgets: list[int] = [10**9]
    while len(peaks) < len(budgets):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = slimfit_fx.optimize(Small(), preset="max", memory_budget=budgets[-1], freeze_rate=0.6)
        try:
            model(*batch).backward()
        except MemoryBudgetError as error:
            assert "nothing fits" in str(error) and "would fit" in str(error)
            break
        session = slimfit_fx.session(model)
        worst = session.plan.peak.worst_bytes
        assert fixed + measured(model, batch) <= fixed + worst * 1.01 <= budgets[-1] * 1.01
        peaks.append(worst)
        presets.append(next(note for note in session.plan.notes if "memory_budget" in note).split()[3])
        budgets.append(fixed + worst - 1)
    assert peaks == sorted(peaks, reverse=True) and len(peaks) >= 2
    assert presets[0] == "exact" and len(set(presets)) >= 2 and len(budgets) == len(peaks) + 1


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
def test_the_smallest_budget_that_is_told_does_fit_and_plans_are_the_same_each_time(monkeypatch):
    model, batch, settings = Small(), small_batch(8, 16), {"preset": "balanced", "freeze_rate": 0.6}
    partition, others = GatedPartitioner.__call__, []

    def count(self, *args, **kwargs):
        others.append(len(self.others))
        return partition(self, *args, **kwargs)

    monkeypatch.setattr(GatedPartitioner, "__call__", count)
    with pytest.raises(MemoryBudgetError, match=r"\((\d+) bytes\)") as error:
        slimfit_fx.plan(model, *batch, memory_budget=1000, **settings)
    known = len(candidates(Config(memory_budget=1000, **settings)))
    assert others[0] == known - 1 > 0, "what its saved bytes give away is planned on one and the same joint graph"
    assert not any(others[1:]), "and what may be the smallest after all has its code written"
    smallest = error.value.smallest_bytes
    assert f"({smallest} bytes)" in str(error.value)
    found = slimfit_fx.plan(model, *batch, memory_budget=smallest, **settings)
    assert found == slimfit_fx.plan(model, *batch, memory_budget=smallest, **settings)
    with pytest.raises(MemoryBudgetError):
        slimfit_fx.plan(model, *batch, memory_budget=smallest - 1, **settings)


def test_too_many_saved_bytes_are_seen_before_any_code_is_written():
    def row(size: int, gates: tuple[str, ...] = ()) -> PlanRow:
        closed = 0 if gates else size
        return PlanRow(
            0, "v", "", "mul", "float", bool(gates), gates, (), "float32", "keep", None, "", size, size, closed
        )

    plan = GraphPlan((row(100), row(40, ("0",)), row(30, ("1", "2"))), (), (0, 1, 2))
    fixed = FixedBytes(5, 1, 4, 0, gradients=7)
    held = 10 + 0.9 * 140

    def held_with(count: int = 1, accumulates: bool = False) -> int:
        return held_alone(plan, Budget(0, count, lambda _: fixed, accumulates))

    assert held_with() == held
    assert held_with(count=2) == held + 0.9 * 30
    assert held_with(accumulates=True) == held + 7


def shares(found: list[Config]) -> list[tuple[str, float]]:
    return [(one.recompute, one.recompute_share) for one in found]


def test_between_two_candidates_are_numbers_of_blocks():
    tried = candidates(Config(preset="balanced"))
    at = {share: one for one, share in zip(tried, shares(tried), strict=True) if one.preset == "balanced"}
    assert shares(between(tried, at["products", 0.5], 12)) == [("products", 4 / 12), ("products", 5 / 12)]
    assert shares(between(tried, at["products", 0.25], 24)) == [("products", k / 24) for k in (2, 3, 4)]
    assert between(tried, at["products", 0.5], 4) == [] and between(tried, at["products", 0.5], 0) == []
    assert between(tried, at["cheap", 1.0], 12) == [], "nothing runs less again"
    assert between(tried, at["blocks", 0.5], 12) == [], "products in all blocks come before it, which is another thing"
    exact = next(one for one in tried if one.preset == "exact" and one.recompute == "products")
    assert shares(between(tried, exact, 12)) == [("products", 3 / 12), ("products", 6 / 12), ("products", 9 / 12)]


def test_what_lies_between_stands_where_the_next_one_does():
    tried = candidates(Config(preset="balanced"))
    for config in tried:
        assert place_of(config, tried) == tried.index(config)
        for one in between(tried, config, 12):
            assert place_of(one, tried) == tried.index(config) and one not in tried


@given(
    more=st.lists(st.integers(0, 40), min_size=60, max_size=60),
    blocks=st.integers(0, 13),
    limits=st.lists(st.integers(0, 70), min_size=2, max_size=2).map(sorted),
)
def test_fewer_blocks_are_tried_and_a_smaller_budget_never_peaks_higher(more, blocks, limits):
    """Whatever steps take, even where they take more though more runs again."""
    tried = candidates(Config(preset="balanced"))
    places = {repr(one): 2 * (len(tried) - i) for i, one in enumerate(tried)}
    places |= {repr(o): places[repr(one)] + 1 for one in tried for o in between(tried, one, blocks)}
    takes = {name: held + extra for (name, held), extra in zip(places.items(), more, strict=False)}

    def chosen(limit: int) -> tuple[int, Config]:
        def attempt(configs, gives_up):
            for config in configs:
                plan = dataclasses.replace(held_row(places[repr(config)]), blocks=blocks)
                if gives_up is None or not gives_up(config, plan):
                    return Attempt(config, plan, (), TRACE, TRACE, Judged(config, 0, takes[repr(config)]))
            raise PlanTooLarge

        budget = Budget(limit, 1, lambda _: FixedBytes(0, 0, 0, 0))
        found, holds = first_that_fits(tried, attempt, budget)
        if not holds:
            return limit, found.config
        better = with_fewer_blocks(found, tried, attempt, budget)
        assert found.judged.total_bytes <= better.judged.total_bytes <= limit
        assert better is found or better.config in between(tried, found.config, blocks)
        return better.judged.total_bytes, better.config

    smaller, larger = map(chosen, limits)
    assert smaller[0] <= larger[0] or takes[repr(smaller[1])] > limits[0]


@given(
    candidates_of=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6),
    limit=st.integers(0, 100),
)
def test_the_first_that_fits_is_taken_and_else_the_smallest_of_all(candidates_of, limit):
    """Each candidate holds some bytes between forward and backward and takes some more."""
    configs = [Config(seed=number, recompute="cheap") for number in range(len(candidates_of))]
    held = {config: held for config, (held, _) in zip(configs, candidates_of, strict=True)}
    total = {config: sum(sizes) for config, sizes in zip(configs, candidates_of, strict=True)}
    written = []

    def attempt(configs, gives_up):
        for config in configs:
            plan = held_row(held[config])
            if gives_up is None or not gives_up(config, plan):
                written.append(config)
                return Attempt(config, plan, (), TRACE, TRACE, Judged(config, 0, total[config]))
        raise PlanTooLarge

    budget = Budget(limit, 1, lambda _: FixedBytes(0, 0, 0, 0))
    found, holds = first_that_fits(list(total), attempt, budget)
    fitting = [config for config in total if total[config] <= limit]
    assert holds == bool(fitting)
    assert found.judged.total_bytes == (total[fitting[0]] if fitting else min(total.values()))
    assert not fitting or found.config == fitting[0]
    assert not fitting or all(int(0.9 * held[config]) <= limit for config in written), "no code was written in vain"
