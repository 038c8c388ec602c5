"""Predicted steps against steps that ran: eager rivals on fake tensors, compiled ones by their generated code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from effort import first

from bench import cells, headline, smoke
from bench import predict as predictions
from bench.cells import Cell
from bench.measure import step_peak
from bench.memory import bounds_of, measure_step
from bench.models import Case, make_case
from bench.predict import predict
from bench.rivals import Settings, make_trainee

pytest.importorskip("transformers")
SIZES = {"layers": 2, "batch": 4, "width": 128, "heads": 4, "vocab": 500, "length": 64, "resolution": 96}
BERT, VIT = make_case("bert", **SIZES), make_case("vit", **SIZES)


def measured_step(name: str, case: Case, settings: Settings | None = None) -> tuple[int, int]:
    """(peak of forward and backward, gradients and the optimizer's step) of the second step."""
    trainee = make_trainee(name, case, settings or Settings())
    trainee.step()
    trainee.clear()
    step = step_peak(trainee.outputs, backward=lambda outputs: outputs.loss.backward()).peak_bytes
    return step, trainee.grad_bytes() + step_peak(trainee.update).peak_bytes


@pytest.mark.parametrize("name", first(["eager-attention", "lora-checkpoint", "eager", "checkpoint", "lora"], 2))
def test_an_eager_step_takes_what_was_predicted(name):
    if name.startswith("lora"):
        pytest.importorskip("peft")
    found = predict(name, BERT, Settings())
    step, update = measured_step(name, BERT)
    assert found.step_bytes == pytest.approx(step, rel=0.05), "what operators take for themselves is not seen"
    assert found.update_bytes == pytest.approx(update, rel=0.01)


@pytest.mark.inductor
@pytest.mark.thorough
def test_no_step_of_ours_takes_more_than_was_predicted():
    """Of the worst choice of open units; under a budget, with what fits into it."""
    found = predict("balanced", BERT, Settings(freeze_rate=0.5))
    step, update = measured_step("balanced", BERT, Settings(freeze_rate=0.5))
    assert 0.5 * found.step_bytes < step <= found.step_bytes
    assert 0 < update <= found.update_bytes
    assert found.expected_ms is not None and found.expected_ms > 0
    fitted = predict(f"budget-{found.total_bytes + 10_000}", BERT, Settings(freeze_rate=0.5))
    assert fitted.total_bytes <= found.total_bytes + 10_000 and fitted.chosen is not None


def expected_work(name: str) -> Any:
    """What the kernels of a step do."""
    with mock.patch.object(predictions, "_expected", lambda found, work, *_, **__: work):
        return predict(name, BERT, Settings())


@pytest.mark.thorough
def test_every_rival_has_a_throughput_to_expect():
    """Checkpointing runs the products of forward again; adapters leave out most gradients of weights."""
    pytest.importorskip("peft")
    names = ("eager", "compile", "checkpoint", "lora")
    flops = {name: sum(work.flops for work in expected_work(name)) for name in names}
    assert flops["eager"] == pytest.approx(flops["compile"], rel=0.05)
    assert 1.2 * flops["eager"] < flops["checkpoint"] < 1.4 * flops["eager"]
    assert flops["lora"] < 0.8 * flops["eager"]
    found = {name: predict(name, BERT, Settings()) for name in names}
    assert all(f.expected_ms > 0 and f.roofline["bytes_per_s"] > 0 for f in found.values())
    assert found["compile"].expected_ms < found["eager"].expected_ms, "fused kernels move fewer bytes"
    assert found["eager"].expected_ms < found["checkpoint"].expected_ms


def test_answers_and_regression_train():
    for case in (make_case("bert", **SIZES, head="answers"), make_case("bert", **SIZES, labels=1)):
        found = predict("eager", case, Settings())
        assert found.step_bytes == pytest.approx(measured_step("eager", case)[0], rel=0.03)


def test_adapters_train_few_parameters():
    pytest.importorskip("peft")
    for case in (BERT, VIT):
        whole, adapters = (predict(name, case, Settings()) for name in ("eager", "lora"))
        assert 0 < adapters.optimizer_bytes < whole.optimizer_bytes / 10
        assert whole.parameter_bytes < adapters.parameter_bytes < 1.1 * whole.parameter_bytes


def test_plain_attention_keeps_its_probabilities():
    case = make_case("bert", **{**SIZES, "length": 256})
    kept = predict("eager-attention", case, Settings()).step_bytes - predict("eager", case, Settings()).step_bytes
    probabilities = SIZES["layers"] * SIZES["batch"] * SIZES["heads"] * 256**2
    assert kept > 4 * probabilities, "at least one copy in fp32"


def test_the_total_is_what_is_there_and_the_larger_of_both_peaks():
    found = predict("eager", BERT, Settings())
    beside = found.parameter_bytes + found.buffer_bytes + found.optimizer_bytes + found.batch_bytes
    assert found.total_bytes == beside + max(found.step_bytes, found.update_bytes)


@pytest.fixture
def small_cola(monkeypatch):
    monkeypatch.setattr(cells, "case_of", lambda setting, **_: BERT)
    monkeypatch.setattr(headline, "case_of", lambda setting, **_: BERT)


def test_a_measured_cell_lies_close_to_its_prediction(small_cola):
    measured = cells.fill(Cell("CoLA", "eager", "fp32", "cpu", "measured", times=True))
    predicted = cells.fill(Cell("CoLA", "eager", "fp32", "cpu", "predicted"))
    assert (measured.how, predicted.how) == ("measured", "predicted")
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)
    assert measured.recompiles == 0 and measured.samples_per_s is not None
    assert predicted.step_ms is None and predicted.recompiles is None


def test_a_run_on_a_cpu_is_held_against_its_cap(small_cola):
    given = {"dtype": "fp32", "device": "cpu", "steps": 2, "batch": None}
    taken = headline.train("SQuAD 2.0", "eager", 10**12, **given)
    assert taken.fits and taken.steps == 2 and taken.total_bytes is not None
    assert headline.train("SQuAD 2.0", "eager", taken.total_bytes, **given).fits
    refused = headline.train("SQuAD 2.0", "eager", taken.total_bytes - 1, **given)
    assert not refused.fits and f"a step takes {taken.total_bytes} bytes" in refused.reason


# ---- the regression guard


def results(**peaks: int) -> dict[str, dict[str, Any]]:
    """As the guard has them: ``balanced`` was trained, and its peak is what its code says."""
    found: dict[str, dict[str, Any]] = {name: {"worst": {"peak_bytes": peak}} for name, peak in peaks.items()}
    found["balanced"] |= {"recompiles": 0, "compiles_later": 0, "off_by": 0.0}
    return found


def test_the_guard_holds_peaks_and_recompiles_against_its_bounds():
    bounds = bounds_of(smoke.CASE, 0.9)
    assert {(b.rival, b.against): b.limit for b in bounds} == {
        ("balanced", "eager"): 3.5, ("balanced", "compile"): 3.1, ("max", "eager"): 4.5, ("exact", "compile"): 1.35,
    }  # fmt: skip
    good = results(eager=500, compile=440, balanced=130, max=105, exact=300)
    assert {line["verdict"] for line in smoke.verdicts_of(good, bounds)} == {"PASS"}
    worse = results(eager=500, compile=440, balanced=150, max=105, exact=300)
    missed = [line for line in smoke.verdicts_of(worse, bounds) if line["verdict"] != "PASS"]
    assert [(line["rival"], line["against"]) for line in missed] == [("balanced", "eager"), ("balanced", "compile")]
    for name, value, what in (("compiles_later", 1, "recompiles"), ("off_by", 0.02, "read off its code")):
        bad = {**good, "balanced": {**good["balanced"], name: value}}
        (missed_one,) = [line for line in smoke.verdicts_of(bad, bounds) if line["verdict"] != "PASS"]
        assert (missed_one["rival"], missed_one["against"]) == ("balanced", what)


@pytest.mark.parametrize(("peak", "status"), [(130, 0), (200, 1)])
def test_the_guard_fails_where_a_bound_is_missed(monkeypatch, capsys, peak, status):
    peaks = {"eager": 500, "compile": 440, "balanced": peak, "max": 105, "exact": 300}
    shown = {"saved_bytes": 1, "grad_bytes": 1, "phase": "backward", "parameters_trained": 1}

    counted = {"recompiles": 0, "compiles_later": 0, "off_by": 0.0}
    found = {name: {"worst": {"peak_bytes": value, **shown}} for name, value in peaks.items()}
    found["balanced"] |= counted
    monkeypatch.setattr(smoke, "measure", lambda steps: found)
    assert smoke.main([]) == status
    assert ("SHORT" in capsys.readouterr().out) == bool(status)


@pytest.mark.thorough
@pytest.mark.inductor
def test_rivals_of_one_process_do_not_run_each_others_graphs():
    case = make_case("bert", layers=2, width=64, heads=2, vocab=300, batch=8, length=64)
    saved = {}
    for name in ("compile", "activation-budget-0.5", "activation-budget-0.1"):
        trainee = make_trainee(name, case, Settings())
        trainee.step()
        trainee.clear()
        saved[name] = measure_step(trainee, timeline=False)[0]["saved_bytes"]
    assert saved["compile"] > saved["activation-budget-0.5"] > saved["activation-budget-0.1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there_is_not_predicted():
    with pytest.raises(ValueError, match="predicted where there is one, or with python -m bench.emulated_gpu"):
        predict("eager", replace(BERT, device="cuda"), Settings())
