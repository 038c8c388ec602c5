"""What single benchmarks make of what they measured, and what stays in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from effort import first

from bench import budget, plan_big, plan_time, report, schedule, trainer
from bench import levels as bench_levels
from bench import profile as step_profile
from bench import time as step_time
from bench.models import make_case
from bench.rivals import Settings, make_trainee

TINY = make_case("bert", layers=2, width=32, heads=2, batch=2, length=8, vocab=50)


@pytest.fixture
def results(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


# ---- growth of a run's peaks


def peaks(length: int, **spikes: int) -> list[int]:
    """``length`` peaks of 10 bytes; ``at_N=bytes`` is another one, counted from the end."""
    found = [10] * length
    for name, size in spikes.items():
        found[-int(name.removeprefix("at_"))] = size
    return found


def test_growth_holds_the_halves_of_the_last_peaks_against_each_other():
    assert trainer.FLAT == 150
    assert trainer.growth(peaks(200)) == 0
    assert trainer.growth(peaks(200, at_75=13)) == 3, "the first of the second half"
    assert trainer.growth(peaks(200, at_1=13, at_76=12)) == 1
    assert trainer.growth(peaks(200, at_1=13, at_76=15)) == 0, "a peak that falls is no growth"
    assert trainer.growth(peaks(200, at_1=13, at_151=99)) == 3, "what was before the last 150 does not count"
    assert trainer.growth(peaks(200, at_1=13, at_150=99)) == 0


def test_growth_of_a_short_run_leaves_out_its_warm_up():
    assert trainer.growth(peaks(30, at_1=13, at_21=99)) == 3
    assert trainer.growth(peaks(30, at_10=13, at_20=11)) == 2
    assert trainer.growth(peaks(30, at_11=13)) == 0
    assert trainer.growth(peaks(11)) is None and trainer.growth([]) is None
    assert trainer.growth(peaks(12, at_1=13)) == 3


def test_a_run_without_peaks_claims_none():
    run = {"samples_per_s": 1.0, "peaks": [], "growth_bytes": None, "recompiles": 0}
    assert trainer.as_table({"eager": run}).splitlines()[-1].split() == ["eager", "1.0", "-", "-", "-", "0"]


# ---- step and compile times


def canned(monkeypatch, commit: str, value: float) -> None:
    """Let every part of bench/time.py find ``value``, at ``commit``."""
    row = {"step_ratio": [value] * 3}
    monkeypatch.setattr(report, "commit", lambda: commit)
    monkeypatch.setattr(step_time, "bench_steps", lambda *_: {"results": {"balanced": row}, "times": {}})
    compiled = {"compile": {"cold_compile_s": 1.0}, "balanced": {"cold_compile_s": value}}
    monkeypatch.setattr(step_time, "bench_compile", lambda *_: compiled)
    counted = {"balanced, tiny": {"steps": 200, "compiles_later": 0}}
    monkeypatch.setattr(step_time, "bench_recompiles", lambda *_: counted)


def measured(results: Path, *arguments: str) -> dict[str, Any]:
    step_time.main(["--layers", "12", *arguments])
    (path,) = results.glob("time-*.json")
    return dict(json.loads(path.read_text()))


def test_a_part_that_is_not_measured_keeps_its_figures_and_its_stamp(monkeypatch, results):
    canned(monkeypatch, "a", 0.9)
    first = measured(results, "--what", "steps", "recompiles")
    assert {part: stamp["commit"] for part, stamp in first["stamps"].items()} == {"steps": "a", "recompiles": "a"}
    canned(monkeypatch, "b", 2.0)
    both = measured(results, "--what", "compile", "--freeze-rate", "0.5")
    assert (both["steps"], both["recompiles"]) == (first["steps"], first["recompiles"])
    stamps = {part: (stamp["commit"], stamp["freeze_rate"]) for part, stamp in both["stamps"].items()}
    assert stamps == {"steps": ("a", 0.9), "recompiles": ("a", 0.9), "compile": ("b", 0.5)}
    assert both["stamps"]["steps"]["machine"]["torch_threads"] > 0
    judged = {line["figure"]: line["verdict"] for line in both["bounds"]}
    assert judged == {"step time": "PASS", "compile time, cold": "SHORT by 60.0%", "recompiles, 200 steps": "PASS"}


def test_a_part_is_replaced_as_a_whole(monkeypatch, results):
    canned(monkeypatch, "a", 0.9)
    before = measured(results, "--what", "steps", "compile")
    canned(monkeypatch, "b", 2.0)
    monkeypatch.setattr(step_time, "bench_steps", lambda *_: {"results": {"eager": {}}, "times": {}})
    after = measured(results, "--what", "steps")
    assert list(after["steps"]["results"]) == ["eager"], "balanced was measured in another run"
    assert after["compile"] == before["compile"] and after["stamps"]["steps"]["commit"] == "b"


def test_parts_of_a_file_without_stamps_get_those_of_the_file():
    stored = {"case": TINY.to_dict(), "commit": "old", "machine": {"cpu": "A"}, "freeze_rate": 0.8, "steps": {"x": 1}}
    del stored["case"]["head"]  # a field that came later
    found = step_time.merged(stored, {"compile": {}}, TINY, {"commit": "new"})
    assert found["steps"] == {"x": 1}
    assert found["stamps"]["steps"] == {"commit": "old", "machine": {"cpu": "A"}, "freeze_rate": 0.8}
    assert found["stamps"]["compile"] == {"commit": "new"}


def test_parts_of_another_case_are_not_kept():
    stored = {"case": {**TINY.to_dict(), "dropout": 0.3}, "steps": {"x": 1}}
    assert step_time.merged(stored, {"compile": {}}, TINY, {}) == {"compile": {}, "stamps": {"compile": {}}}


# ---- plans


def test_every_big_plan_has_its_commit_and_machine(monkeypatch, results):
    outcome = {"seconds": 1.0, "host_bytes": 1, "peak_bytes": 1, "phases": {}}
    monkeypatch.setattr(report, "run_worker", lambda *_, **__: dict(outcome))
    for commit, only in (("a", ""), ("b", "llama")):
        monkeypatch.setattr(report, "commit", lambda commit=commit: commit)
        assert plan_big.main(["--only", only]) == 0
    rows = json.loads((results / "plan-big.json").read_text())["results"]
    assert [(row["name"], row["commit"]) for row in rows] == [
        ("bert-large", "a"), ("vit-large-384", "a"), ("llama-1b", "b")
    ]  # fmt: skip
    assert all(row["machine"]["torch_threads"] > 0 for row in rows)


def test_the_median_of_planning_is_taken_round_by_round():
    assert plan_time.median_beyond([[1.0, 5.0], [10.0, 11.0], [2.0, 5.0]]) == 3.0


def test_plans_without_a_bound_that_are_left_out_stay(monkeypatch, results):
    monkeypatch.setattr(plan_time.from_config, "build", lambda *_, **__: (None, {}))
    monkeypatch.setattr(plan_time, "seconds", lambda run: 1.0)
    row = {"name": "plan(peak=True)", "seconds": [9.0], "step_peak_bytes": None}
    monkeypatch.setattr(plan_time, "time_more", lambda *_: iter([row]))
    monkeypatch.setattr(report, "commit", lambda: "a")
    assert plan_time.main(["--rounds", "1", "--check"]) == 0
    monkeypatch.setattr(report, "commit", lambda: "b")
    assert plan_time.main(["--rounds", "2", "--more-rounds", "0"]) == 0
    document = json.loads((results / "plan-time-cpu.json").read_text())
    assert (document["commit"], len(document["rounds"]), document["median_beyond_capture_s"]) == ("b", 2, 0.0)
    assert [(found["name"], found["commit"]) for found in document["more"]] == [("plan(peak=True)", "a")]


def test_the_timed_budget_leaves_room_for_a_share_of_the_step(monkeypatch):
    class Plan:
        parameter_bytes, optimizer_bytes, notes = 1000, 2000, ("balanced was chosen",)

        class peak:  # noqa: N801
            worst_bytes = 100

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(plan_time.slimfit_fx, "plan", lambda model, **settings: asked.append(settings) or Plan())
    monkeypatch.setattr(plan_time, "seconds", lambda run: run() or 1.0)
    peak, budget = plan_time.time_more(None, {"x": 1}, 2)
    assert (peak["seconds"], peak["step_peak_bytes"]) == ([1.0, 1.0], 100)
    assert budget["budget_bytes"] == 3090 and budget["notes"] == ["balanced was chosen"]
    assert [settings.get("memory_budget") for settings in asked] == [None, None, 3090, 3090]
    assert [line[0] for line in plan_time.lines([peak, budget])] == [
        "`plan(peak=True)`", "`plan(preset='max', memory_budget=...)`"
    ]  # fmt: skip


# ---- budgets


def test_models_that_are_done_are_not_measured_again(monkeypatch, results):
    asked: list[str] = []

    def worker(module: str, arguments: list[str], **_: Any) -> dict[str, Any]:
        asked.append(arguments[-1])
        if arguments[-1] == "1" and len(asked) == 2:
            return {"error": "killed"}
        row = {"budget": 10, "measured": 9, "predicted_step": 5, "preset": "exact"}
        return {"rows": [row] * 2, "falling": [row] * 3 if arguments[-1] == "0" else []}

    monkeypatch.setattr(report, "run_worker", worker)
    command = ["--groups", "3", "--budgets", "2", "--falling", "3"]
    assert budget.main([*command, "--check"]) == 1
    assert budget.main([*command, "--check"]) == 0
    assert asked == ["0", "1", "2", "1"], "only the one that failed"
    kept = json.loads((results / "budget-cpu.json").read_text())["results"]
    assert len(kept) == 3 and all("commit" in row and "machine" in row for row in kept)
    asked.clear()
    budget.main([*command[:-1], "4"])
    assert asked == ["0"], "of the others no falling budgets were asked"
    budget.main([*command, "--seed", "1"])
    budget.main([*command, "--again", "--seed", "1"])
    assert len(asked) == 1 + 3 + 3


# ---- where the time of a step goes


@pytest.mark.parametrize("rival", ["eager", "balanced"])
def test_a_profile_tells_what_a_step_waits_for(rival):
    found = step_profile.measure(make_trainee(rival, TINY, Settings(executor="interpreter")), steps=2, warm_up=1)
    assert list(found.issue_ms) == ["forward", "backward", "update", "wait"]
    assert min(found.issue_ms.values()) >= 0 and found.step_ms > 0 and found.device_ms is None
    for lists in (found.longest, found.python):
        times = [ms for _, ms, _ in lists]
        assert times == sorted(times, reverse=True) and times[0] > 0 and all(calls > 0 for *_, calls in lists)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in found.attention
    assert not any("bmm" in name for name in found.attention)


# ---- the scheduler


@pytest.mark.parametrize("rate", first([0.9, 0.5]))
def test_the_scheduler_is_timed_within_steps_of_training(rate):
    found = schedule.time_training(TINY, 3, Settings(freeze_rate=rate, executor="interpreter"))
    parts = [found[f"{part}_ms"] for part in ("before_forward", "copies", "distances")]
    assert all(part > 0 for part in parts) and max(parts) < found["scheduling_ms"] < found["step_ms"]
    assert found["share"] == sorted(found["shares"])[1] and 0 < found["share"] < 1


def test_the_clock_leaves_nothing_behind():
    trainee = make_trainee("balanced", TINY, Settings(executor="interpreter"))
    session = trainee.session
    owners = (session, session._tracker, session._hooks)
    before = [set(vars(owner)) for owner in owners]
    with schedule.Clock(session) as clock:
        trainee.step()
    assert [set(vars(owner)) for owner in owners] == before
    spent = dict(clock.seconds)
    trainee.step()
    assert clock.seconds == spent and session.steps == 2


def test_without_training_the_scheduler_runs_alone_and_nothing_is_written(monkeypatch, results, capsys):
    monkeypatch.setattr(schedule, "make_case", lambda *_, **__: TINY)
    monkeypatch.setattr(schedule, "time_training", lambda *_: pytest.fail("trained"))
    assert schedule.main(["--no-training", "--steps", "2", "--check"]) == 0
    assert not list(results.iterdir())
    assert "freeze rate" in capsys.readouterr().out


def test_the_bound_on_the_scheduler_is_kept_with_its_verdict(monkeypatch, results):
    monkeypatch.setattr(schedule, "make_case", lambda *_, **__: TINY)
    monkeypatch.setattr(schedule, "time_steps", lambda *_: {"units": 3, "step_ms": 1.0})

    def training(case: Any, steps: int, settings: Settings) -> dict[str, float]:
        return {"scheduling_ms": 1.0, "step_ms": 100.0, "share": 0.01 if settings.freeze_rate > 0.8 else 0.02}

    monkeypatch.setattr(schedule, "time_training", training)
    assert schedule.main(["--check"]) == 1
    assert schedule.main(["--check", "--freeze-rates", "0.9"]) == 0
    assert schedule.main([]) == 0
    (path,) = results.glob("schedule-*.json")
    bounds = json.loads(path.read_text())["bounds"]
    assert [(line["measured"], line["verdict"]) for line in bounds] == [(0.01, "PASS"), (0.02, "SHORT by 100.0%")]
    assert [line["must reach"] for line in bounds] == ["<= 0.01"] * 2


# ---- levels of recompute


@pytest.mark.thorough
def test_levels_are_shown_as_expected_and_as_inductor_has_them(monkeypatch, capsys):
    tiny = {"model": "bert", "width": 32, "heads": 2, "batch": 32, "length": 16, "vocab": 50}
    monkeypatch.setattr(bench_levels, "CASES", {"tiny": tiny})
    found: list[bench_levels.Level] = []
    weighed = bench_levels.weighed

    def watched(*given: Any) -> list[bench_levels.Level]:
        found.extend(weighed(*given))
        return found[:1]  # code is written for one of them

    monkeypatch.setattr(bench_levels, "weighed", watched)
    assert bench_levels.main(["--layers", "3"]) == 0
    assert [one.name for one in found][:4] == ["cheap", "products", "products", "blocks"]
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cheap"))
    assert row[1:3] == ["1", "100%"] and 0.5 < float(row[-3]) < 1.5
