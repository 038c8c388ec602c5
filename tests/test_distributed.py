"""DDP and FSDP2 on gloo with 1, 2 and 4 processes, forked (distributed_worker.py) or started by their launchers."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from effort import THOROUGH
from small_models import Tiny, same_state

import slimfit_fx

pytestmark = pytest.mark.slow

SAMPLE = 100  # as in the worker

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")
ON_TWO = (
    *("ddp_curve", "ddp_split", "ddp_diverge", "fsdp_diverge", "ddp_ils", "ddp_traffic", "ddp_accumulate"),
    *("ddp_then_optimize", "ddp_own_hook", "ddp_disagree", "ddp_join"),
    *["ddp_bf16", "ddp_digits", "fsdp_digits", "ddp_inductor", "fsdp_inductor"] * THOROUGH,
    *("fsdp_curve", "fsdp_distances", "fsdp_traffic", "fsdp_flat", "shard_then_optimize", "fsdp_accumulate"),
    *(
        "fsdp_torch_blocks",
        "fsdp_bf16",
        "ddp_save_ils",
        "ddp_resume_ils",
        "ddp_save_random",
        "fsdp_save_ils",
        "fsdp_resume_ils",
    ),
    "fsdp_save_random",
)
ON_OTHERS = (
    *("ddp_curve", "fsdp_curve"),
    *("ddp_resume_ils", "ddp_resume_random", "fsdp_resume_ils", "fsdp_resume_random"),
)
OTHERS = (1, 4) if THOROUGH else (1,)
"""Numbers of processes beside two; four share two cores."""


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def accelerate_launch(processes: int) -> list[str]:
    """``--multi_gpu`` is Accelerate's name for several processes on one machine; the script itself asks for CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    return [*command, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def run(command: list[str], timeout: int = 900) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a process that has looked at a GPU cannot be forked
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=WORKER.parent, env=hidden)
    assert ran.returncode == 0, ran.stderr[-4000:]


def results(folder: pathlib.Path, processes: int) -> list[dict[str, Any]]:
    """What each rank wrote."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The ranks of jobs of several numbers of processes; the others resume what two saved."""
    folder, wanted = tmp_path_factory.mktemp("jobs"), {2: ON_TWO, **dict.fromkeys(OTHERS, ON_OTHERS)}
    given = [f"{processes}:{','.join(scenarios)}" for processes, scenarios in wanted.items()]
    run([sys.executable, str(WORKER), str(folder), *given], timeout=1800)
    return {processes: results(folder / str(processes), processes) for processes in wanted}


@pytest.fixture(scope="module")
def two(jobs) -> list[dict[str, Any]]:
    return jobs[2]


on_two_and_four = pytest.mark.parametrize(
    "accelerated", [2, pytest.param(4, marks=pytest.mark.thorough)], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def accelerated(request, tmp_path_factory) -> list[dict[str, Any]]:
    """The ranks of a script that ``accelerate launch`` started."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    processes, folder = request.param, tmp_path_factory.mktemp("accelerated")
    command = [*accelerate_launch(processes), str(WORKER.with_name("accelerate_worker.py")), str(folder)]
    run(command)
    return results(folder, processes)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_loss_curves_agree_whatever_the_number_of_processes(kind, jobs):
    curve = {n: torch.tensor(ranks[0][f"{kind}_curve"]["losses"]) for n, ranks in jobs.items()}
    assert len(curve[1]) == 50
    for processes in curve:
        torch.testing.assert_close(curve[processes], curve[1], rtol=1e-5, atol=0)
    histories = [rank[f"{kind}_curve"]["history"] for ranks in jobs.values() for rank in ranks]
    assert all(history == histories[0] for history in histories) and len({str(h) for h in histories[0]}) > 10


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_closed_units_stand_still_on_every_rank(kind, jobs):
    """No gradient when the optimizer steps, weights and state untouched."""
    for ranks in jobs.values():
        first = ranks[0][f"{kind}_curve"]
        for rank in ranks:
            found = rank[f"{kind}_curve"]
            assert found["looked"] and found["moved"] == [] and found["gradients"] == []
            assert all(torch.equal(found["weights"][n], first["weights"][n]) for n in first["weights"])


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_with_the_default_executor(kind, two):
    first = two[0][f"{kind}_inductor"]
    for rank in two:
        found = rank[f"{kind}_inductor"]
        assert found["session"] == ("inductor", 6, 1, 0) and not found["ungated"]
        assert found["looked"] and found["moved"] == [] and found["gradients"] == []
        assert found["history"] == first["history"] and len({str(opened) for opened in first["history"]}) > 2
        assert all(torch.equal(found["weights"][n], first["weights"][n]) for n in first["weights"])


def test_one_graph_with_all_gates_under_ddp(two):
    """torch's DDPOptimizer would split it."""
    for rank in two:
        assert rank["ddp_split"]["torch"] > 1 == rank["ddp_split"]["ours"] and not rank["ddp_split"]["ungated"]
        found = rank["ddp_curve"]
        assert found["compiles"] == (1, 0) and not found["ungated"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_that_part_in_the_middle_of_a_run_are_found(kind, two):
    for rank in two:
        assert "ranks disagree after step 2: unit " in rank[f"{kind}_diverge"]
        assert " is open on rank 0, closed on rank 1; every rank must " in rank[f"{kind}_diverge"]


def test_blocks_have_their_gates_under_fsdp(two):
    """What stands between them runs eagerly."""
    names, found = set().union(*two[0]["fsdp_curve"]["history"]), two[0]["fsdp_curve"]
    assert any(name.startswith("blocks.") for name in names)
    assert not any(name.startswith("blocks.") for name in found["ungated"])
    assert found["compiles"][1] == 0, "no recompile"


def test_blocks_of_torchs_own_classes_are_captured_under_fsdp(two):
    """Dynamo skips their frames; what is put around them is gone behind the forward."""
    for rank in two:
        found = rank["fsdp_torch_blocks"]
        assert found["recompiles"] == 0 and found["forwards_left"] == []
        names = set().union(*found["history"])
        assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}
        assert not any(name.startswith("blocks.") for name in found["ungated"])


def test_ranks_that_measure_otherwise_decide_alike(two):
    first, second = (rank["ddp_ils"] for rank in two)
    assert first["history"] == second["history"] and first["distances"] == second["distances"]
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in first["weights"])


@pytest.mark.parametrize("most", [None, SAMPLE])
def test_distances_under_fsdp_are_of_whole_units(two, most):
    found = two[0]["fsdp_distances"]
    fsdp, ddp = found["shard", most], found["DistributedDataParallel", most]
    assert fsdp["history"] == ddp["history"]
    for name, distance in fsdp["distances"].items():
        assert distance == pytest.approx(ddp["distances"][name], rel=1e-5), name
    assert any(distance < 2**40 for distance in ddp["distances"].values())
    assert (most is None) or found["shard", None]["distances"] != fsdp["distances"]


def test_shards_that_are_no_run_of_elements_are_measured_whole(two):
    found, whole = two[0]["fsdp_distances"]["shard_columns"], two[0]["fsdp_distances"]["DistributedDataParallel", None]
    assert found == two[1]["fsdp_distances"]["shard_columns"] and found["history"] == whole["history"]
    for name, distance in found["distances"].items():
        assert distance == pytest.approx(whole["distances"][name], rel=1e-5), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_closed_gradients_are_not_sent(kind, two):
    for rank in two:
        found = rank[f"{kind}_traffic"]
        assert 0 < 5 * found["sent"] <= found["full"]
        assert kind == "fsdp" or found["said"] == (found["sent"], found["full"]), "session.traffic is what was sent"
    if kind == "ddp":
        assert two[0]["ddp_traffic"]["norms"] == two[1]["ddp_traffic"]["norms"], "clipping sees the same on all ranks"


@pytest.mark.parametrize(
    ("scenario", "bound"),
    [
        *(("ddp_accumulate", 1e-6), ("fsdp_accumulate", 1e-6), ("fsdp_torch_blocks", 1e-6)),
        *(pytest.param("ddp_bf16", 4e-3, marks=pytest.mark.thorough), ("fsdp_bf16", 4e-3)),
    ],
)
def test_gradients_are_those_without_us(scenario, bound, two):
    """Accumulation, clipping, bf16 by autocast and by FSDP2's policy; ``bound`` is relative, for bf16 its rounding."""
    first, full_precision = two[0][scenario], two[0]["ddp_curve"]["losses"][0]
    assert len({str(opened) for opened in first["history"]}) > 2
    if "bf16" in scenario:
        assert first["ours_losses"][0] != full_precision == pytest.approx(first["ours_losses"][0], rel=1e-2)
    for rank in two:
        found = rank[scenario]
        assert found["looked"] and found["moved"] == [] and found["gradients"] == []
        assert found["error"] < bound and min(found["plain_norms"]) > 0.1, "clipped"
        for what in ("norms", "losses"):
            assert found[f"ours_{what}"] == first[f"ours_{what}"] == pytest.approx(found[f"plain_{what}"], rel=bound)
        assert found["history"] == first["history"]
        assert all(torch.equal(found["weights"][n], first["weights"][n]) for n in first["weights"])


@pytest.mark.parametrize("scenario", ["ddp_then_optimize", "shard_then_optimize"])
def test_the_other_order_of_wrapping(scenario, two):
    kind = "ddp" if scenario.startswith("ddp") else "fsdp"
    for rank in two:
        found = rank[scenario]
        assert found["losses"] == rank[f"{kind}_curve"]["losses"][:5]
        assert found["history"] == rank[f"{kind}_curve"]["history"][:5]


def test_what_is_refused_or_said(two):
    assert "optimize the inner module first" in two[0]["ddp_then_optimize"]["refused"]
    assert any("communication hook of its own" in text for text in two[0]["ddp_own_hook"]["said"])
    assert two[0]["ddp_own_hook"]["losses"] == pytest.approx(two[0]["ddp_curve"]["losses"][:5], rel=1e-6)
    for rank in two:
        assert len(rank["fsdp_flat"]["said"]) == 8
        assert all("use fully_shard (FSDP2) instead" in text for text in rank["fsdp_flat"]["said"])
        assert "drop_last=True: all ranks then end together" in rank["ddp_join"]["error"]
        assert "ranks disagree after step 0: unit 'blocks.0." in rank["ddp_disagree"]["error"]
        assert "on rank 1; every rank must use the same settings (seed" in rank["ddp_disagree"]["error"]


def test_a_deepspeed_engine_is_refused():
    engine = type("DeepSpeedEngine", (Tiny,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ValueError, match="model is a DeepSpeedEngine of DeepSpeed, which keeps gradients .* in flat"):
        slimfit_fx.optimize(engine)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_checkpoints_resume_on_any_number_of_processes(kind, jobs, two):
    for rank in two:
        saved, resumed = rank[f"{kind}_save_ils"], rank[f"{kind}_resume_ils"]
        for key in ("losses", "history", "steps"):
            assert resumed[key] == saved[key], "bit for bit on as many processes"
        for name, state in saved["state"].items():
            assert state and same_state(state, resumed["state"][name]), name
    for ranks in (jobs[processes] for processes in OTHERS):
        saved, found = two[0][f"{kind}_save_ils"], ranks[0][f"{kind}_resume_ils"]
        assert found["steps"] == saved["steps"] and found["history"][0] == saved["history"][0]
        assert found["losses"][:2] == pytest.approx(saved["losses"][:2], rel=1e-5)
        saved = two[0][f"{kind}_save_random"]
        assert len({str(opened) for opened in saved["history"]}) > 2
        for rank in ranks:
            found = rank[f"{kind}_resume_random"]
            assert found["steps"] == saved["steps"] and found["history"] == saved["history"]
            assert found["losses"] == pytest.approx(saved["losses"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["ils", "random"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_optimizer_state_of_a_distributed_checkpoint_is_what_was_saved(kind, schedule, jobs, two):
    """All of it, put together from the shards, as soon as it is loaded."""
    saved = two[0][f"{kind}_save_{schedule}"]["stored"]
    assert all(state["exp_avg"].any() for state in saved.values())
    for rank in (*two * (schedule == "ils"), *(rank for n in OTHERS for rank in jobs[n])):
        loaded = rank[f"{kind}_resume_{schedule}"]["stored"]
        assert loaded.keys() == saved.keys() and all(same_state(saved[name], loaded[name]) for name in saved)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_digits_to_an_accuracy_in_half_of_the_memory(kind, two):
    for rank in two:
        (ours, our_peak), (plain, plain_peak) = rank[f"{kind}_digits"]["ours"], rank[f"{kind}_digits"]["plain"]
        assert ours >= plain - 0.01 and 2 * our_peak <= plain_peak, (ours, plain, our_peak, plain_peak)


@pytest.mark.thorough
@on_two_and_four
def test_trainer_and_a_loop_under_accelerate_launch(accelerated):
    for name, as_in in (("trainer", "trainer"), ("resumed", "trainer"), ("loop", "loop")):
        expected = accelerated[0][as_in]
        for found in (rank[name] for rank in accelerated):
            assert found["world"] == len(accelerated) and found["steps"] == 6
            assert found["history"] == expected["history"]
            assert all(torch.equal(found["weights"][n], expected["weights"][n]) for n in expected["weights"])
            assert found["moved"] == [] and found["gradients"] == []
            assert found["bytes_sent"] and found["bytes_not_sent"] >= found["bytes_closed"] > 0, "all of what is closed"


@pytest.mark.thorough
@on_two_and_four
def test_fully_shard_under_accelerate_launch(accelerated, jobs):
    """Accelerate's own FSDP wants a GPU; the script shards for itself, and goes as in forked processes."""
    for rank, expected in zip(accelerated, jobs[len(accelerated)], strict=True):
        found, as_forked = rank["fsdp_curve"], expected["fsdp_curve"]
        assert found["looked"] and found["moved"] == [] and found["gradients"] == []
        assert found["compiles"] == as_forked["compiles"] and found["ungated"] == as_forked["ungated"]
        assert len(found["losses"]) == len(found["history"]) == 12
        assert found["losses"] == as_forked["losses"][:12] and found["history"] == as_forked["history"][:12]


@pytest.mark.thorough
def test_torchrun_starts_the_same_jobs(tmp_path, two):
    run([*torchrun(2), str(WORKER), str(tmp_path), "2:ddp_curve,fsdp_curve"])
    for rank, as_forked in zip(results(tmp_path / "2", 2), two, strict=True):
        for name, found in rank.items():
            assert found["looked"] and found["moved"] == [] and found["gradients"] == []
            assert found["losses"] == as_forked[name]["losses"] and found["history"] == as_forked[name]["history"]


@pytest.mark.thorough
def test_lightning_under_torchrun(tmp_path):
    pytest.importorskip("lightning")
    command = [*torchrun(2), str(WORKER.with_name("lightning_worker.py")), str(tmp_path)]
    run(command)
    first, second = results(tmp_path, 2)
    for rank in (first, second):
        assert rank["steps"] == 8 and rank["looked"] and rank["moved"] == rank["gradients"] == []
        assert not any(rank["clipped"].values()), "DDP's zeros, if anything"
    assert first["history"] == second["history"] and len({str(opened) for opened in first["history"]}) > 2
    assert 0 < first["traffic"][0] < first["traffic"][1]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
