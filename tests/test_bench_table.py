"""The paper's twelve settings: the list of cells, their means, their store, resuming and time limits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import cells, gpu, headline, paper_table, report, rivals
from bench.cells import Cell, Figures, figures_of
from bench.settings import SETTINGS, case_of, cpu_batch, setting_of
from bench.tasks import Progress, Store, Task, machines, run_tasks


def figures(total: int, **more: Any) -> Figures:
    return Figures("measured", 4, total, parameter_bytes=10, optimizer_bytes=20, batch_bytes=0, **more)


def row(total: int, **more: Any) -> dict[str, Any]:
    return {"figures": asdict(figures(total, **more))}


# ---- settings and rivals


def test_the_settings_are_those_of_the_papers_code():
    assert [s.task for s in SETTINGS if s.model == "vit"] == ["CIFAR-10", "CIFAR-100", "ImageNet"]
    assert len(SETTINGS) == 12
    squad = case_of(setting_of("SQuAD 2.0"), dtype="fp32", device="cpu")
    assert (squad.batch, squad.length, squad.head, squad.vocab, squad.layers) == (128, 384, "answers", 30522, 12)
    imagenet = case_of(setting_of("ImageNet"), dtype="bf16", device="cpu")
    assert (imagenet.batch, imagenet.resolution, imagenet.labels, imagenet.tokens) == (128, 384, 1000, 577)
    assert [s.task for s in SETTINGS if s.batch == 16] == ["RTE"]


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="unknown task: got 'COLA'; legal: CoLA"):
        setting_of("COLA")


def test_attention_dropout_is_left_to_the_kernels_of_a_gpu():
    cola = setting_of("CoLA")
    assert case_of(cola, dtype="tf32", device="cuda").attention_dropout == 0.1
    on_cpu = case_of(cola, dtype="fp32", device="cpu")
    assert on_cpu.attention_dropout == 0.0
    plain = rivals.rival_of("eager-attention").case(on_cpu)
    assert (plain.attention, plain.attention_dropout) == ("eager", 0.1)


def test_the_batch_of_a_cpu_is_cut_to_the_tokens():
    assert cpu_batch(setting_of("CoLA"), 1024) == 8
    assert cpu_batch(setting_of("ImageNet"), 100) == 1
    assert cpu_batch(setting_of("RTE"), 10**6) == 16


@pytest.mark.parametrize(
    "name", [*paper_table.RIVALS, "max-open", "balanced-loss", "exact-blocks", "paper-products", "budget-8GiB"]
)
def test_every_rival_has_one_meaning(name):
    found = rivals.rival_of(name)
    assert found.name == name
    assert (found.preset is not None) == name.startswith(("exact", "paper", "balanced", "max", "budget"))


def test_the_parts_of_a_name_are_read():
    found = rivals.rival_of("balanced-blocks-open")
    assert (found.preset, found.recompute, found.all_open) == ("balanced", "blocks", True)
    assert not found.loss_only and rivals.rival_of("balanced-loss-open").loss_only
    assert rivals.rival_of("activation-budget-0.3").activation_budget == 0.3
    assert rivals.rival_of("budget-8GiB").memory_budget == "8GiB"
    assert rivals.rival_of("lora-checkpoint").lora and rivals.rival_of("lora-checkpoint").checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "eger",
        "activation-budget-0",
        "activation-budget-1.5",
        "budget-",
        "budget-lots",
        "budget-0%",
        "max-",
        "-loss",
        "",
    ],
)
def test_a_name_that_nobody_bears_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown rival: got {name!r}; legal: eager-attention, eager"):
        rivals.rival_of(name)


# ---- cells


def test_settings_whose_figures_cannot_differ_share_a_cell():
    def key(task: str, rival: str) -> str:
        return Cell(task, rival, "fp32", "cpu", "predicted").key

    assert key("CoLA", "balanced") == key("MRPC", "balanced")
    assert key("CoLA", "eager") == key("SST-2", "eager")
    assert key("CoLA", "balanced") != key("SST-2", "balanced"), "their freeze rates differ"
    assert key("CoLA", "eager") != key("RTE", "eager")


def test_measured_and_predicted_cells_never_share_a_result():
    measured = Cell("CoLA", "eager", "fp32", "cpu", "measured")
    assert measured.key != replace(measured, how="predicted").key
    assert measured.key != cells.scaled(measured, 256).key


def test_a_cell_survives_the_command_line(monkeypatch, tmp_path):
    cell = Cell("STS-B", "budget-25%", "bf16", "cpu", "measured", batch=3, steps=5, times=True)
    seen: list[Cell] = []
    monkeypatch.setattr(cells, "fill", lambda given: seen.append(given) or figures(99))
    out = tmp_path / "out.json"
    assert cells.main([*cell.as_task(1.0).arguments, "--out", str(out)]) == 0
    assert seen == [cell]
    assert figures_of({cell.key: json.loads(out.read_text())}, cell) == figures(99)


def test_a_budget_of_a_share_leaves_room_for_what_is_there_beside_the_step(monkeypatch):
    class Found:
        parameter_bytes, buffer_bytes, optimizer_bytes, step_bytes = 100, 1, 200, 1000

    monkeypatch.setattr(cells, "predict", lambda name, case, settings: Found())
    cell = Cell("CoLA", "budget-25%", "tf32", "cuda", "measured")
    assert cells._with_share(cell) == "budget-551"
    assert cells._with_share(replace(cell, rival="budget-8GiB")) == "budget-8GiB"


# ---- means


def table_with(totals: dict[tuple[str, str], Any]) -> tuple[dict[str, Any], list[Cell]]:
    """Rows and cells of two settings: (rival, task) -> bytes, or a row."""
    chosen = [Cell(task, rival, "fp32", "cpu", "measured") for rival, task in totals]
    rows = {c.key: row(v) if isinstance(v, int) else v for c, v in zip(chosen, totals.values(), strict=True)}
    return rows, chosen


def test_the_mean_is_that_of_the_settings_ratios():
    rows, chosen = table_with({
        ("eager-attention", "CoLA"): 400, ("eager-attention", "RTE"): 300,
        ("balanced", "CoLA"): 100, ("balanced", "RTE"): 150,
    })  # fmt: skip
    found = {line.rival: line for line in paper_table.lines(rows, chosen)}
    assert found["balanced"].mean_bytes == 125
    assert found["balanced"].ratios == (3.0, None, None), "4x and 2x; there is no other baseline"
    assert found["eager-attention"].ratios[0] == 1.0
    assert paper_table.verdicts(list(found.values())) == [
        "balanced, eager-attention / it: 3.00, wanted >= 4.4: SHORT by 31.8%"
    ]


def test_a_rival_that_failed_once_has_no_mean_and_shows_its_error():
    error = {"error": "exit status 1: torch.cuda.OutOfMemoryError: CUDA out of memory"}
    rows, chosen = table_with({
        ("eager-attention", "CoLA"): 400, ("eager-attention", "RTE"): error,
        ("balanced", "CoLA"): 100, ("balanced", "RTE"): 150,
    })  # fmt: skip
    found = {line.rival: line for line in paper_table.lines(rows, chosen)}
    assert (found["eager-attention"].mean_bytes, found["eager-attention"].failed) == (None, 1)
    assert found["balanced"].mean_bytes == 125 and found["balanced"].ratios == (None, None, None)
    assert "OutOfMemoryError" in paper_table.task_table(rows, chosen)
    assert "1 failed" in paper_table.mean_table(list(found.values()))
    assert paper_table.verdicts(list(found.values())) == []


def test_what_was_not_run_is_no_figure():
    rows, chosen = table_with({("balanced", "CoLA"): 100, ("balanced", "RTE"): 150})
    del rows[chosen[1].key]
    (line,) = paper_table.lines(rows, chosen)
    assert (line.mean_bytes, line.done, line.failed) == (None, 1, 0)
    assert figures_of(rows, chosen[1]) is None


def test_the_ceiling_is_what_a_step_of_no_bytes_would_reach():
    rows, chosen = table_with({("eager", "CoLA"): 300, ("eager", "RTE"): 90})
    assert paper_table.ceiling(rows, chosen, "eager") == (300 / 30 + 90 / 30) / 2
    assert paper_table.ceiling(rows, chosen, "compile") is None
    del rows[chosen[0].key]
    assert paper_table.ceiling(rows, chosen, "eager") is None


def test_where_the_optimizer_takes_more_than_the_step_is_counted():
    late, early = row(9, step_bytes=3, update_bytes=4), row(9, step_bytes=5, update_bytes=4)
    rows, chosen = table_with({("balanced", "CoLA"): late, ("balanced", "RTE"): early, ("balanced", "QQP"): 9})
    assert paper_table.bound_by_update(rows, chosen, "balanced") == (1, 2)


def test_predictions_are_compared_with_measurements_of_the_same_batch():
    (measured, predicted), other = paper_table.pairs(["fp32"], ["CoLA", "RTE"], ["eager"], 256)
    assert (measured.batch, predicted.batch, measured.how, predicted.how) == (2, 2, "measured", "predicted")
    rows = {measured.key: row(200), predicted.key: row(210)}
    assert paper_table.prediction_error(rows, measured, predicted) == pytest.approx(0.05)
    assert paper_table.prediction_error(rows, *other) is None or other[0].key == measured.key
    assert "+5.0%" in paper_table.error_table(rows, [(measured, predicted)])
    assert paper_table.error_table({}, [(measured, predicted)]) == ""


def test_throughput_follows_from_batch_and_step_time():
    assert figures(1, step_ms=8.0).samples_per_s == 500
    assert figures(1).samples_per_s is None


# ---- running, stopping, going on


class Worker:
    """Stands for processes: notes what was run and how long it might have taken."""

    def __init__(self, seconds: float = 0.0, outcome: Callable[[float], dict[str, Any]] | None = None) -> None:
        self.now, self.seconds, self.ran, self.limits = 0.0, seconds, [], []  # type: ignore[var-annotated]
        self.outcome = outcome or (lambda limit: {"value": 1})

    def __call__(self, module: str, arguments: list[str], *, environment: Any, timeout_s: float) -> dict[str, Any]:
        self.ran.append(arguments[0])
        self.limits.append(timeout_s)
        self.now += min(self.seconds, timeout_s)
        return self.outcome(timeout_s) if self.seconds <= timeout_s else {"error": "late", "timed_out": True}

    def clock(self) -> float:
        return self.now


def tasks(count: int, limit_s: float = 100.0) -> list[Task]:
    return [Task(f"key {k}", "m", (str(k),), limit_s) for k in range(count)]


def run(worker: Worker, path: Path, count: int = 3, **options: Any) -> Any:
    return run_tasks(tasks(count), Store(path), device="cpu", run=worker, clock=worker.clock, **options)


def test_finished_work_is_not_done_again(tmp_path):
    path, worker = tmp_path / "rows.json", Worker()
    assert run(worker, path, 2).left == 0
    assert run(worker, path, 3).done == 3
    assert worker.ran == ["0", "1", "2"]
    assert set(Store(path).rows) == {"key 0", "key 1", "key 2"}
    run(worker, path, 1, again=True)
    assert worker.ran[-1] == "0" and len(Store(path).rows) == 3


def test_each_result_is_stored_before_the_next_begins(tmp_path):
    path = tmp_path / "rows.json"

    def stop_at_the_second(limit: float) -> dict[str, Any]:
        if len(worker.ran) == 2:
            raise KeyboardInterrupt
        return {"value": 1}

    worker = Worker(outcome=stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(worker, path)
    assert list(Store(path).rows) == ["key 0"]
    assert not list(tmp_path.glob("*.tmp"))


def test_work_of_one_key_is_done_once(tmp_path):
    worker = Worker()
    twice = [*tasks(2), *tasks(2)]
    assert run_tasks(twice, Store(tmp_path / "rows.json"), device="cpu", run=worker, clock=worker.clock).done == 2
    assert worker.ran == ["0", "1"]


def test_what_the_deadline_cuts_short_is_not_done_and_comes_first_next_time(tmp_path):
    path, worker = tmp_path / "rows.json", Worker(seconds=80.0)
    first = run(worker, path, minutes=2.0)
    assert (first.done, first.left, first.failed) == (1, 2, ())
    assert worker.limits == [100.0, 40.0]
    second = run(worker, path, minutes=2.0)
    assert (second.done, worker.ran) == (2, ["0", "1", "1", "2"])


def test_with_no_time_left_nothing_is_begun(tmp_path):
    worker = Worker()
    assert run(worker, tmp_path / "rows.json", minutes=0.1).left == 3
    assert worker.ran == []


def test_what_takes_longer_than_its_own_limit_has_failed(tmp_path):
    path, worker = tmp_path / "rows.json", Worker(seconds=101.0)
    found = run(worker, path, 2)
    assert (found.left, found.failed) == (0, ("key 0", "key 1"))
    assert Store(path).rows["key 0"]["error"] == "late"


def test_results_name_machine_commit_and_date(tmp_path):
    path = tmp_path / "rows.json"
    run(Worker(), path, 1)
    (found,) = Store(path).rows.values()
    assert {"machine", "commit", "date", "value"} <= set(found)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=report.ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert found["commit"].removesuffix("+") == head.stdout.strip()
    else:
        assert found["commit"] is None
    (line,) = machines([found, {**found, "commit": None}])
    assert "no commit" in line and f"Python {found['machine']['python']}" in line


# ---- the GPU's list


def test_the_calls_of_a_gpu_name_everything_that_was_asked_for():
    headlines = gpu.headline_tasks("cuda")
    assert len({t.key for t in headlines}) == len(headlines)
    for cap in (32, 16, 12):
        assert f"SQuAD 2.0, tf32, {cap} GB, balanced" in {t.key for t in headlines}
    assert all(t.limit_s < 9 * 60 for group in gpu.GROUPS.values() for t in group("cuda"))
    table = {t.key for t in gpu.table_tasks("cuda")}
    assert all(key.startswith("measured cuda") for key in table)
    assert {Cell(s.task, r, d, "cuda", "measured").key for s in SETTINGS for r in paper_table.RIVALS
            for d in ("tf32", "bf16")} == table  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "has_device", lambda device: False)
    assert gpu.main(["--minutes", "9"]) == 2
    assert "there is no cuda here" in capsys.readouterr().err
    assert gpu.main(["--list", "--only", "headline"]) == 0
    assert "headline: SQuAD 2.0, tf32, 16 GB, balanced" in capsys.readouterr().out


def test_a_call_hands_the_rest_of_its_time_from_group_to_group(monkeypatch, tmp_path):
    given: list[tuple[int, float]] = []

    def note(tasks: list[Task], store: Store, *, minutes: float, **_: Any) -> Progress:
        given.append((len(tasks), minutes))
        return Progress(0, len(tasks), ())

    monkeypatch.setattr(gpu, "has_device", lambda device: True)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "run_tasks", note)
    assert gpu.main(["--minutes", "9", "--only", "headline", "peak"]) == 1, "something is left"
    assert [count for count, _ in given] == [len(gpu.headline_tasks("cuda")), len(gpu.peak_tasks("cuda"))]
    assert 9 >= given[0][1] >= given[1][1] > 8


def test_a_cap_is_a_share_of_the_device():
    assert headline.cap_fraction(32 * 10**9, 80 * 10**9) == 0.4
    assert headline.cap_fraction(32 * 10**9, 16 * 10**9) == 1.0
    with pytest.raises(ValueError, match="a cap must be positive, got 0 bytes"):
        headline.cap_fraction(0, 1)
    assert headline.rival_under("budget", 10 * 10**9) == "budget-9000000000"
    assert headline.rival_under("max", 1) == "max"


# ---- the command


def test_commands_lead_to_what_they_name(capsys):
    assert command.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in command.COMMANDS)
    assert command.main(["memry"]) == 2
    assert "unknown command: got 'memry'; legal: memory" in capsys.readouterr().err


def test_a_command_that_this_tree_lacks_is_named(monkeypatch, capsys):
    monkeypatch.setitem(command.COMMANDS, "nothing", ("bench.nothing.here", ""))
    assert command.main(["nothing"]) == 2
    assert "bench.nothing.here is not part of this tree" in capsys.readouterr().err


def test_the_list_of_cells_marks_what_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    cell = Cell("CoLA", "eager", "fp32", "cpu", "predicted")
    (tmp_path / "twelve-cpu.json").write_text(json.dumps({"rows": {cell.key: row(5)}}))
    flags = ["--device", "cpu", "--how", "predicted", "--dtypes", "fp32", "--rivals", "eager", "--list"]
    assert command.main(["memory", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"done {cell.key}" in lines
    assert sum(line.startswith("    ") for line in lines) == 7, "CoLA's figures are those of four more settings"
