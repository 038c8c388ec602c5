"""The arithmetic of ``bench host-time``; its figures need a CUDA build of torch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import host_time, sections


def a_round(step: float, reference_s: float = 0.004) -> dict[str, float]:
    return {"forward": 1.0, "backward": 2.0, "update": 0.5, "step": step, "reference_s": reference_s, "allocations": 70}


def test_the_median_round_counts_and_a_failed_one_does_not():
    rounds = iter([a_round(5.0), a_round(3.0), {"error": "too long"}, a_round(4.0)])
    found = host_time.run_rounds(["ours"], 4, lambda _: next(rounds))
    assert found["ours"]["step"] == 4.0 and len(found["ours"]["rounds"]) == 4
    assert host_time.combine([{"error": "too long"}])["error"] == "too long"


def test_rivals_are_run_in_turn():
    order = []
    host_time.run_rounds(["a", "b"], 2, lambda name: order.append(name) or a_round(1.0))
    assert order == ["a", "b", "a", "b"]


def test_milliseconds_are_those_of_the_fastest_reference():
    found = {"eager": host_time.combine([a_round(5.0), a_round(5.0, 0.003)]), "ours": host_time.combine([a_round(4.0)])}
    eager, ours = host_time.lines({**found, "broken": {"error": "no"}})
    assert eager == ["`eager`", 3.0, 6.0, 1.5, 15.0, 1.0, 70]
    assert ours[4:] == [12.0, pytest.approx(0.8), 70]
    assert host_time.lines({"ours": found["ours"]})[0][5] is None, "there is no eager to compare with"


def test_a_step_is_timed_in_units_of_the_loop_beside_it(monkeypatch):
    done = []
    monkeypatch.setattr(host_time, "reference_s", lambda: 0.25)
    monkeypatch.setattr(
        host_time, "time_step", lambda *_: {f"{part}_s": 0.5 for part in host_time.PARTS} if done else None
    )
    trainee = SimpleNamespace(case=SimpleNamespace(device="cpu"), step=lambda: done.append(1))
    found = host_time.measure(trainee, steps=3, warm_up=2)
    assert len(done) == 2 and found["step"] == 2.0 and found["reference_s"] == 0.25 and found["allocations"] == 0


def test_the_loop_takes_time():
    with torch.inference_mode():
        assert 1e-4 < host_time.reference_s() < 10


def test_the_section_shows_what_the_file_holds(tmp_path):
    assert sections.host_time_section(tmp_path) == ""
    machine = {"cpu": "one", "cores": 2, "torch_threads": 1, "system": "s", "python": "3", "versions": {}}
    told = {"command": "c", "date": "d", "commit": "f" * 40, "machine": machine}
    case = {"results": {"eager": host_time.combine([a_round(5.0)])}, **told}
    (tmp_path / "host-time-emulated.json").write_text(json.dumps({"cases": {"CoLA, tf32": case}}))
    shown = sections.host_time_section(tmp_path)
    assert "| CoLA, tf32" in shown and "`eager`" in shown and "20.0" in shown
