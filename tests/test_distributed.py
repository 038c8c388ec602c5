"""DDP and FSDP2 on gloo, started by torchrun with 1, 2 and 4 processes. What runs there is distributed_worker.py."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    *(
        "ddp_curve",
        "ddp_split",
        "ddp_diverge",
        "fsdp_diverge",
        "ddp_ils",
        "ddp_traffic",
        "ddp_gradients",
        "ddp_then_optimize",
        "ddp_own_hook",
        "ddp_disagree",
    ),
    *("ddp_join", "ddp_digits", *["fsdp_digits", "ddp_inductor", "fsdp_inductor"] * THOROUGH),
    *("fsdp_curve", "fsdp_distances", "fsdp_traffic", "fsdp_flat", "shard_then_optimize"),
    *("ddp_save", "ddp_resume", "fsdp_save", "fsdp_resume"),
)
ON_OTHERS = ("ddp_curve", "fsdp_curve", "ddp_resume", "fsdp_resume")


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def accelerate_launch(processes: int) -> list[str]:
    """``--multi_gpu`` is Accelerate's name for several processes on one machine; the script itself asks for CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    return [*command, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def run(command: list[str], processes: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """What each rank wrote to ``folder``."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=WORKER.parent)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def launch(
    processes: int, folder: pathlib.Path, scenarios: tuple[str, ...], starter: Callable[[int], list[str]] = torchrun
) -> list[dict[str, Any]]:
    """The results of every rank."""
    return run([*starter(processes), str(WORKER), str(folder), *scenarios], processes, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, pathlib.Path]:
    return {processes: tmp_path_factory.mktemp(f"ranks{processes}") for processes in (1, 2, 4)}


@pytest.fixture(scope="module")
def two(folders) -> list[dict[str, Any]]:
    return launch(2, folders[2], ON_TWO)


@pytest.fixture(scope="module")
def others(folders, two) -> dict[int, list[dict[str, Any]]]:
    """The same with one and with four processes; they resume what two saved."""
    found = {}
    for processes in (1, 4):
        for kind in ("ddp", "fsdp"):
            shutil.copytree(folders[2] / f"{kind}-checkpoint", folders[processes] / f"{kind}-checkpoint")
        found[processes] = launch(processes, folders[processes], ON_OTHERS)
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_loss_curves_agree_whatever_the_number_of_processes(kind, two, others):
    runs = {1: others[1], 2: two, 4: others[4]}
    curve = {n: torch.tensor(ranks[0][f"{kind}_curve"]["losses"]) for n, ranks in runs.items()}
    assert len(curve[1]) == 50
    for processes in (2, 4):
        torch.testing.assert_close(curve[processes], curve[1], rtol=1e-5, atol=0)
    histories = [rank[f"{kind}_curve"]["history"] for ranks in runs.values() for rank in ranks]
    assert all(history == histories[0] for history in histories) and len({str(h) for h in histories[0]}) > 10


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_closed_units_stand_still_on_every_rank(kind, two, others):
    """With two processes and with four: no gradient when the optimizer steps, weights and state untouched."""
    for ranks in (two, others[4]):
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
        assert found["session"] == ("inductor", 6, 1, 0) and found["gated"]
        assert found["looked"] and found["moved"] == [] and found["gradients"] == []
        assert found["history"] == first["history"] and len({str(opened) for opened in first["history"]}) > 2
        assert all(torch.equal(found["weights"][n], first["weights"][n]) for n in first["weights"])


def test_one_graph_with_all_gates_under_ddp(two):
    """torch's DDPOptimizer would split it."""
    for rank in two:
        assert rank["ddp_split"]["torch"] > 1 == rank["ddp_split"]["ours"] and rank["ddp_split"]["gated"]
        assert rank["ddp_curve"]["compiles"] == 1 and rank["ddp_curve"]["gated"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_that_part_in_the_middle_of_a_run_are_found(kind, two):
    for rank in two:
        assert "ranks disagree after step 2: unit " in rank[f"{kind}_diverge"]["error"]
        assert " is open on rank 0, closed on rank 1; every rank must " in rank[f"{kind}_diverge"]["error"]


def test_blocks_have_their_gates_under_fsdp(two):
    names = set().union(*two[0]["fsdp_curve"]["history"])
    gated = two[0]["fsdp_curve"]["gated"]
    assert {name for name in names if name.startswith("blocks.")} <= gated
    assert two[0]["fsdp_curve"]["compiles"][1] == 0, "no recompile"


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
    assert any(distance < 2**20 for distance in ddp["distances"].values())
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


def test_gradients_are_those_of_ddp_without_us(two):
    assert all(rank["ddp_gradients"]["worst"] < 1e-6 for rank in two)
    assert two[0]["ddp_traffic"]["norms"] == two[1]["ddp_traffic"]["norms"], "clipping sees the same norm on all ranks"


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
def test_distributed_checkpoints_resume_on_any_number_of_processes(kind, two, others):
    for rank in two:
        saved, resumed = rank[f"{kind}_save"], rank[f"{kind}_resume"]
        for key in ("losses", "history", "steps"):
            assert resumed[key] == saved[key], "bit for bit on as many processes"
        for name, state in saved["state"].items():
            assert state and same_state(state, resumed["state"][name]), name
    saved = two[0][f"{kind}_save"]
    for processes in (1, 4):
        found = others[processes][0][f"{kind}_resume"]
        assert found["steps"] == saved["steps"] and found["history"][0] == saved["history"][0]
        assert found["losses"][:2] == pytest.approx(saved["losses"][:2], rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.thorough)])
def test_digits_to_an_accuracy_in_half_of_the_memory(kind, two):
    for rank in two:
        (ours, our_peak), (plain, plain_peak) = rank[f"{kind}_digits"]["ours"], rank[f"{kind}_digits"]["plain"]
        assert ours >= plain - 0.01 and 2 * our_peak <= plain_peak, (ours, plain, our_peak, plain_peak)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_trainer_and_a_loop_under_accelerate_launch(processes, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    worker = WORKER.with_name("accelerate_worker.py")
    ranks = run([*accelerate_launch(processes), str(worker), str(tmp_path)], processes, tmp_path)
    for name, as_in in (("trainer", "trainer"), ("resumed", "trainer"), ("loop", "loop")):
        expected = ranks[0][as_in]
        for found in (rank[name] for rank in ranks):
            assert found["world"] == processes and found["steps"] == 6 and found["history"] == expected["history"]
            assert all(torch.equal(found["weights"][n], expected["weights"][n]) for n in expected["weights"])
            assert found["moved"] == [] and found["gradients"] == []
            assert found["bytes_sent"] and found["bytes_not_sent"] >= found["bytes_closed"] > 0, "all of what is closed"


def test_fully_shard_under_accelerate_launch(two, tmp_path):
    """Accelerate's own FSDP wants a GPU; the script shards for itself, and goes as it does under torchrun."""
    pytest.importorskip("accelerate")
    for rank, expected in zip(launch(2, tmp_path, ("fsdp_curve",), accelerate_launch), two, strict=True):
        found, under_torchrun = rank["fsdp_curve"], expected["fsdp_curve"]
        assert found["losses"] == under_torchrun["losses"] and found["history"] == under_torchrun["history"]
        assert found["compiles"] == under_torchrun["compiles"] and found["gated"]


@pytest.mark.thorough
def test_lightning_under_torchrun(tmp_path):
    pytest.importorskip("lightning")
    command = [*torchrun(2), str(WORKER.with_name("lightning_worker.py")), str(tmp_path)]
    first, second = run(command, 2, tmp_path)
    for rank in (first, second):
        assert rank["steps"] == 8 and rank["looked"] and rank["moved"] == rank["gradients"] == []
        assert not any(rank["clipped"].values()), "DDP's zeros, if anything"
    assert first["history"] == second["history"] and len({str(opened) for opened in first["history"]}) > 2
    assert 0 < first["traffic"][0] < first["traffic"][1]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
