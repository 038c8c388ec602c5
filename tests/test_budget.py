"""A budget in bytes: sizes, candidates, what is said when nothing fits, and that the choice holds."""

from __future__ import annotations

import pytest
import torch
from test_peak import Encoder, encoder_batch, measured
from torch import nn

import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import (
    Budget,
    FixedBytes,
    MemoryBudgetError,
    budget_bytes,
    candidates,
    explain,
    fixed_bytes,
    judge,
    parse_bytes,
)
from slimfit_fx.planning.peak import Event, StepTrace

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
    ],
)
def test_settings_are_checked_before_anything_is_traced(settings, error, match):
    with pytest.raises(error, match=match):
        Config(**settings)


def test_no_budget_without_a_compiler(monkeypatch):
    monkeypatch.setattr("slimfit_fx.api.has_compiler", lambda device: "no C++ compiler")
    with pytest.raises(ValueError, match="memory_budget needs executor 'inductor'.*no C.. compiler"):
        slimfit_fx.optimize(Encoder(), memory_budget="1GiB")


def test_candidates_go_from_the_least_lossy_to_what_was_asked_for():
    presets = {p: [c.preset for c in candidates(Config(preset=p))] for p in ("exact", "paper", "balanced", "max")}
    assert presets == {
        "exact": ["exact", "exact"],
        "paper": ["exact", "paper", "paper"],
        "balanced": ["exact", "balanced", "balanced"],
        "max": ["exact", "balanced", "max", "max"],
    }
    chosen = candidates(Config(preset="max", codecs={"gelu_input": "int2"}, freeze_rate=0.5))
    assert [c.codecs for c in chosen] == [None, None, {"gelu_input": "int2"}, {"gelu_input": "int2"}]
    assert chosen[-1].recompute_price < chosen[-2].recompute_price == 1.0
    assert {c.freeze_rate for c in chosen} == {0.5}


TRACE = StepTrace((Event(100, 0), Event(40, 1, frozenset([0])), Event(30, 2, frozenset([1])), Event(-100, 0)), 1, {}, 2)


def test_a_step_is_judged_by_its_worst_choice_or_by_the_update():
    small, large = FixedBytes(5, 1, 10, 20), FixedBytes(5, 1, 10, 500)
    assert judge(Config(), TRACE, small, 1).total_bytes == 16 + 140
    assert judge(Config(), TRACE, small, 2).total_bytes == 16 + 170
    assert judge(Config(), TRACE, large, 2).total_bytes == 16 + 500


def test_what_is_said_when_nothing_fits():
    fixed = FixedBytes(5, 1, 10, 0)
    best = judge(Config(preset="exact"), TRACE, fixed, 2)
    text = explain(Budget(160, 2, lambda: fixed), best, TRACE, 8)
    assert "nothing fits into 0.0 MiB" in text and "preset exact" in text and "preset 'max'" in text
    assert "a freeze rate of 0.500 would fit (1 open units instead of 2)" in text
    assert "a batch of about" in text
    assert "alone do not fit" in explain(Budget(10, 2, lambda: fixed), best, TRACE, 8)


def test_what_is_there_before_a_step():
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    found = fixed_bytes(model, [400], 1, optimizer_state=7, copies=True)
    assert (found.parameters, found.optimizer_state) == (520, 7)
    assert found.buffers == 10 * 4 * 2 + 8
    assert found.update == 520 + 400 + 3 * 520, "gradients, copies of open weights, a rough bound for the optimizer"
    known = fixed_bytes(model, [400], 1, optimizer_state=7, copies=False, temporaries=11)
    assert known.update == 520 + 11


@pytest.mark.inductor
@pytest.mark.slow
def test_the_choice_fits_and_a_smaller_budget_never_peaks_higher():
    """From a budget that everything fits to one that nothing does: presets, peaks, and one clear error."""
    batch, peaks, presets = encoder_batch(), [], []
    fixed = sum(p.numel() * 4 for p in Encoder().parameters()) * 3  # AdamW
    budgets: list[int] = [10**9]
    while len(peaks) < len(budgets):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = slimfit_fx.optimize(Encoder(), preset="max", memory_budget=budgets[-1], freeze_rate=0.6)
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
