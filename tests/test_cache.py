"""Compiled graphs outlive their process: a second one starts from the caches of Inductor and AOTAutograd."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from reference import differences, equal_bits, optimized
from tower import Tower, rows

from slimfit_fx.capture.partitioner import GatedPartitioner, source_hash
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout

WORKER = pathlib.Path(__file__).with_name("cached_runs.py")
UNKNOWN = "not known: its graph came from a compile cache; slimfit_fx.plan(model, *inputs) works it out"

HIT = {"graphs": {"hit": 2, "miss": 0, "bypass": 0}, "autograd": {"hit": 1, "miss": 0, "bypass": 0}}
MISS = {"graphs": {"hit": 0, "miss": 2, "bypass": 0}, "autograd": {"hit": 0, "miss": 1, "bypass": 0}}
"""Two graphs, forward and backward, in the cache of Inductor; one pair in that of AOTAutograd."""


def process(folder: pathlib.Path, name: str, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One step per settings in a process of its own; ``folder / "cache"`` is what processes share."""
    wanted, found = folder / f"{name}.json", folder / f"{name}.pt"
    wanted.write_text(json.dumps(settings))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(wanted), str(found)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(found)


def looked_up(result: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {key: result[key] for key in ("graphs", "autograd")}


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path):
    """One test, since every process costs its start: the gates, the numbers and the plan of graphs from the cache."""
    exact = {"preset": "exact"}
    (first,) = process(tmp_path, "first", exact)
    again, without_plan, other_preset, other_scheduler = process(
        tmp_path,
        "second",
        {**exact, "forget": "*-trace.json"},  # as if nobody had asked the first process for it
        {**exact, "forget": "*.json"},
        {"preset": "balanced"},
        {**exact, "seed": 7, "scheduler": "random"},
    )
    assert [looked_up(run) for run in (first, again, without_plan, other_preset)] == [MISS, HIT, HIT, MISS]
    for run in (first, again, without_plan, other_preset, other_scheduler):
        assert run["executor"] == "inductor" and "up.weight" in run["closed"]
        assert not set(run["closed"]) & set(run["grads"]) and {"up.bias", "down.bias"} <= set(run["grads"])
        assert equal_bits(first["loss"], run["loss"])
    for run in (again, without_plan):
        assert differences(first["grads"], run["grads"]) == []
    assert differences(first["grads"], other_preset["grads"]) != []

    assert again["plan"] == first["plan"] and len(first["plan"]["rows"]) > 2, "the plan that the first process kept"
    assert again["timeline"] == first["timeline"] and len(first["timeline"]) > 10, "from the code that was kept"
    assert without_plan["plan"]["rows"] == () and "run one training step" in without_plan["timeline"]
    assert {unit["reason"] for unit in without_plan["plan"]["units"]} == {UNKNOWN}

    assert looked_up(other_scheduler) == HIT


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.slow
def test_blocks_with_branches_inside_are_read_from_the_caches(tmp_path):
    settings = {"preset": "exact", "depth": 4, "min_bytes": 0}
    (first,), (again,) = (process(tmp_path, name, settings) for name in ("first", "second"))
    assert [looked_up(run) for run in (first, again)] == [MISS, HIT]
    assert differences(first["grads"], again["grads"]) == [] and equal_bits(first["loss"], again["loss"])


@pytest.mark.parametrize(
    "executor", ["interpreter", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.thorough])]
)
def test_who_asks_before_backward_is_compiled_does_not_lose_it(executor, monkeypatch):
    """Also where nothing can be kept on disk."""
    monkeypatch.setattr("slimfit_fx.planning.store.save_json", lambda *_: None)
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        model, session = optimized(Tower(), executor=executor, scheduler="none")
        loss = model(*rows()).sum()
        try:
            session.predict_peak()
        except RuntimeError as error:
            assert "run one training step" in str(error)
        loss.backward()
    assert session.predict_peak().peak_bytes > 0


# ---- what names a partition


LAYOUT = GateLayout(3, ((0,), (1,)))


def test_equal_partitioners_have_equal_names():
    ours, same = (GatedPartitioner(Config(), GateLayout(3, ((0,), (1,)))) for _ in range(2))
    assert ours.uuid() == same.uuid() and isinstance(ours.uuid(), str)
    assert source_hash() in ours.uuid() and Config().fingerprint() in ours.uuid() and torch.__version__ in ours.uuid()


NO_PART_OF_A_GRAPH = [{"seed": 1}, {"scheduler": "random"}, {"strict": True}, {"executor": "interpreter"}]


@pytest.mark.parametrize("change", NO_PART_OF_A_GRAPH, ids=str)
def test_what_changes_no_graph_changes_no_name(change):
    assert GatedPartitioner(Config(**change), LAYOUT).uuid() == GatedPartitioner(Config(), LAYOUT).uuid()


@pytest.mark.parametrize("change", NO_PART_OF_A_GRAPH, ids=str)
def test_what_changes_no_graph_changes_no_key_of_torch(change):
    assert pickle.dumps(GatedPartitioner(Config(**change), LAYOUT)) == pickle.dumps(GatedPartitioner(Config(), LAYOUT))


def test_units_chosen_by_a_function_do_not_keep_graphs_out_of_the_caches():
    pickle.dumps(GatedPartitioner(Config(units=lambda name, param: True), LAYOUT))


@pytest.mark.parametrize(
    "change",
    [{"preset": "max"}, {"codecs": {"float": "int4"}}, {"min_bytes": 1}, {"freeze_rate": 0.5}, {"debug": True}],
    ids=str,
)
def test_what_changes_a_graph_changes_the_name(change):
    config = dataclasses.replace(Config(debug=False), **change)
    assert GatedPartitioner(config, LAYOUT).uuid() != GatedPartitioner(Config(debug=False), LAYOUT).uuid()


@pytest.mark.parametrize(
    "layout", [GateLayout(4, ((0,), (1,))), GateLayout(3, ((0, 1),)), GateLayout(3, ((1,), (0,))), GateLayout(3, ())]
)
def test_another_layout_of_gates_changes_the_name(layout):
    assert GatedPartitioner(Config(), layout).uuid() != GatedPartitioner(Config(), LAYOUT).uuid()


def test_a_switched_off_pass_changes_the_name_whatever_the_order():
    names = ("sink_backward", "insert_codecs")
    one, two = (GatedPartitioner(Config(disabled_passes=n), LAYOUT).uuid() for n in (names, names[::-1]))
    assert one == two != GatedPartitioner(Config(), LAYOUT).uuid()


def test_what_is_asked_for_its_plan_only_bypasses_the_caches():
    assert GatedPartitioner(Config(), LAYOUT, plan_only=True).uuid() is None
