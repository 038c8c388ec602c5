"""README's tables and docs/results.md are what the stored results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import front, lossless, paper_table, render, report, sections, twelve
from bench.cells import Cell
from bench.front import Point
from bench.settings import TASKS
from slimfit_fx.planning.roofline import Roofline

_MACHINE = {"cpu": "A", "torch_threads": 2, "python": "3", "versions": {"torch": "9"}, "gpu": {"name": "G"}}
_PEAKS = "memory-bert-{}layers-batch16-len128-fp32-cpu.json"


def stored(rival: str, task: str, total: int, *, how: str, dtype: str, device: str, **more: Any) -> dict[str, Any]:
    cell = Cell(task, rival, dtype, device, how)
    if how == "measured" and device == "cpu":
        cell = paper_table.scaled(cell, twelve.CPU_TOKENS)
    figures = {"how": how, "batch": 8, "total_bytes": total, "parameter_bytes": 10**8, "optimizer_bytes": 2 * 10**8,
               "batch_bytes": 0, **more}  # fmt: skip
    return {cell.key: {"figures": figures, "machine": _MACHINE, "commit": "c" * 40, "date": "d"}}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": {k: v for row in rows for k, v in row.items()}}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (_PEAKS.format(4), _PEAKS.format(12), "memory-vit-4layers-batch8-res224-fp32-cpu.json"):
        shutil.copy(report.RESULTS / name, tmp_path)
    return tmp_path


def all_twelve(totals: dict[str, int], **how: Any) -> list[dict[str, Any]]:
    return [stored(rival, task, total, **how) for rival, total in totals.items() for task in TASKS]


# ---- what is published


def test_readme_is_what_the_results_say():
    text = render.README.read_text()
    assert render.filled(text, report.RESULTS) == text, "run python -m bench report"


def test_the_page_of_results_is_what_the_results_say():
    assert render.page(report.RESULTS) == render.PAGE.read_text(), "run python -m bench report"


def test_the_check_finds_a_stale_page(monkeypatch, tmp_path, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(render.README.read_text().replace("<!-- bench:end -->", "by hand\n<!-- bench:end -->", 1))
    monkeypatch.setattr(render, "README", readme)
    monkeypatch.setattr(render, "PAGE", page)
    assert render.main(["--check"]) == 1 and not page.exists()
    assert "README.md: out of date" in capsys.readouterr().out
    assert render.main([]) == 0 and page.exists()
    assert render.main(["--check"]) == 0


@pytest.mark.parametrize("text", ["", "<!-- bench:begin nothing -->\n<!-- bench:end -->\n"])
def test_a_readme_without_its_blocks_is_refused(text, folder):
    with pytest.raises(ValueError, match=r"blocks \['accuracy', 'step-peak', 'twelve'\], once each, got"):
        render.filled(text, folder)


# ---- accuracy in README


def test_gains_over_full_are_those_of_the_rows(folder):
    """One seed's score of one method on one task falls by ten points: so do its gain and a third of the mean."""
    path = folder / "accuracy-cpu.jsonl"
    shutil.copy(report.RESULTS / path.name, path)

    def cells() -> list[str]:
        (line,) = (line for line in sections.accuracy_block(folder).splitlines() if line.startswith("| LoRA"))
        return [cell.strip().split(" ")[0] for cell in line.split("|")[2:-2]]

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before, seeds = cells(), 0
    for row in rows:
        cell = row.get("cell", {"task": None, "method": None, "scale": None})
        if (cell["task"], cell["method"], cell["scale"]) == ("pairs", "lora", "quick"):
            row["test"], seeds = row["test"] - 0.1, seeds + 1
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    after = cells()
    assert seeds >= 5 and after[:2] == before[:2]
    assert float(after[2]) == pytest.approx(float(before[2]) - 10, abs=0.011)
    assert float(after[3]) == pytest.approx(float(before[3]) - 10 / 3, abs=0.011)
    path.unlink()
    assert sections.accuracy_block(folder) == ""


# ---- the twelve settings


def test_step_peaks_are_those_of_the_files(folder):
    path = folder / _PEAKS.format(4)
    document = json.loads(path.read_text())
    document["results"]["eager"]["worst"]["peak_bytes"] = 2 * document["results"]["max"]["worst"]["peak_bytes"]
    path.write_text(json.dumps(document))
    (line,) = (line for line in render.step_peak_block(folder).splitlines() if line.startswith("| slimfit_fx, `max`"))
    assert line.split("|")[3].strip() == "2.00x"


def test_below_step_peaks_stands_how_they_were_measured(folder):
    documents = {}
    for layers in (4, 12):
        path = folder / _PEAKS.format(layers)
        documents[layers] = json.loads(path.read_text())
        results = documents[layers]["results"]
        for name in ("eager", "max"):
            results[name]["steps"] = [{"peak_bytes": 7}] * (3 if name == "eager" else 20)
            results[name].pop("machine", None)
        documents[layers]["results"] = {name: results[name] for name in ("eager", "compile", "max")}
        results["compile"]["steps"] = [{"peak_bytes": size} for size in range(20)]
        documents[layers]["machine"] = {**_MACHINE, "torch_threads": layers // 4}
        del documents[layers]["machine"]["gpu"]

    def note() -> str:
        for layers, document in documents.items():
            (folder / _PEAKS.format(layers)).write_text(json.dumps(document))
        return render.step_peak_block(folder).splitlines()[-1]

    worst = "Worst of 20 steps (of 3, all alike: eager)."
    assert note() == f"{worst} Measured on A, 1 thread: 4 layers; on A, 3 threads: 12 layers."
    documents[12]["machine"]["torch_threads"] = 1
    assert note() == f"{worst} Measured on A, 1 thread."
    elsewhere = {**documents[4]["machine"], "cpu": "B"}
    documents[4]["results"]["max"]["machine"] = elsewhere
    assert note() == (
        f"{worst} Measured on A, 1 thread: 4 layers (eager, torch.compile), 12 layers; "
        "on B, 1 thread: 4 layers (slimfit_fx, `max`)."
    )
    documents[12]["results"]["max"]["machine"] = elsewhere
    assert note() == f"{worst} Measured on A, 1 thread: eager, torch.compile; on B, 1 thread: slimfit_fx, `max`."
    for document in documents.values():
        del document["results"]["max"]["machine"]
    documents[4]["results"]["compile"]["steps"] = [{"peak_bytes": 1}, {"peak_bytes": 2}]
    assert note().startswith("Worst of 20 steps (of 3, all alike: eager; of 2: torch.compile).")
    for document in documents.values():
        for result in document["results"].values():
            result["steps"] = [{"peak_bytes": 1}]
    assert note().startswith("Worst of 1 steps. Measured")


def test_readme_takes_what_comes_nearest_to_a_measurement(folder):
    totals = {"eager-attention": 10**10, "eager": 5 * 10**9, "balanced": 2 * 10**9}
    assert "Not every setting" in twelve.twelve_block(folder)
    write(folder, "twelve-cpu", *all_twelve(totals, how="predicted", dtype="fp32", device="cpu"))
    predicted = twelve.twelve_block(folder)
    assert "**Predicted**" in predicted and "slimfit_fx balanced" in predicted
    (line,) = (line for line in predicted.splitlines() if "balanced" in line)
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["2.00", "5.00", "2.50"]
    emulated = all_twelve(totals, how="emulated", dtype="tf32", device="cuda")
    write(folder, "twelve-emulated", *emulated[:-1])
    assert twelve.twelve_block(folder) == predicted, "one setting of balanced is missing"
    write(folder, "twelve-emulated", *emulated)
    predicted = twelve.twelve_block(folder)
    assert "**Emulated**" in predicted and "**Measured**" not in predicted
    measured = all_twelve(totals, how="measured", dtype="tf32", device="cuda", step_ms=4.0)
    write(folder, "twelve-cuda", *measured[:-1])
    assert twelve.twelve_block(folder) == predicted, "one setting of balanced is missing"
    write(folder, "twelve-cuda", *measured)
    assert "**Measured** on a GPU" in twelve.twelve_block(folder)


def test_measured_and_predicted_have_tables_of_their_own(folder):
    both = [
        *all_twelve({"eager": 7 * 10**9}, how="predicted", dtype="fp32", device="cpu"),
        *all_twelve({"eager": 3 * 10**9}, how="measured", dtype="fp32", device="cpu"),
    ]
    write(folder, "twelve-cpu", *both)
    page = render.page(folder)
    write(folder, "twelve-emulated", *all_twelve({"eager": 9 * 10**9}, how="emulated", dtype="bf16", device="cuda"))
    emulated = render.page(folder).split("**Emulated**, bf16")[1].split("**Measured**")[0]
    assert "9.00" in emulated and "3.00" not in emulated and "7.00" not in emulated
    measured, predicted = page.split("**Measured** on a CPU")[1].split("**Predicted**")
    assert "3.00" in measured and "7.00" not in measured
    assert "7.00" in predicted.split("## ")[0] and "3.00" not in predicted.split("## ")[0].split("Parameters")[0]


def test_emulated_figures_are_held_against_measured_ones(folder):
    def cell(rival: str, task: str, total: int, how: str) -> dict[str, Any]:
        found = stored(rival, task, total, how=how, dtype="tf32", device="cuda")
        next(iter(found.values()))["cell"] = {"rival": rival}
        return found

    pairs = [("eager", "CoLA", 1000, 1000), ("eager", "RTE", 1000, 1001), ("balanced", "CoLA", 1000, 500)]
    write(folder, "twelve-cuda", *(cell(rival, task, real, "measured") for rival, task, real, _ in pairs))
    assert "Emulated against measured" not in render.page(folder)
    write(folder, "twelve-emulated", *(cell(rival, task, total, "emulated") for rival, task, _, total in pairs))
    said = "2 cells of eager training have both; 1 are equal to the byte, the largest difference is 0.1000%."
    assert f"Emulated against measured: {said}" in render.page(folder)


def test_errors_and_goals_are_shown(folder):
    rows = all_twelve({"eager-attention": 4 * 10**9, "balanced": 10**9}, how="predicted", dtype="fp32", device="cpu")
    failed = stored("lora", "CoLA", 1, how="predicted", dtype="fp32", device="cpu")
    key = next(iter(failed))
    failed[key] = {"error": "exit status 1: ValueError: no", "machine": _MACHINE, "commit": None, "date": "d"}
    write(folder, "twelve-cpu", *rows, failed)
    page = render.page(folder)
    assert "ValueError" in page
    assert "balanced, eager-attention / it: 4.00, wanted >= 4.4: SHORT by 9.1%" in page
    assert "a mean ratio of 13.33 against eager-attention" in page
    assert "G; Python 3, torch 9; commit" in page


# ---- under a cap, and the front


def test_runs_under_a_cap_are_shown_as_they_ended(folder):
    def outcome(rival: str, **how: Any) -> dict[str, Any]:
        known = {"fits": True, "steps": 50, "total_bytes": 9 * 10**9, "reserved_bytes": 1, "seconds": 1.0, "reason": ""}
        row = {"outcome": {**known, **how}, "machine": _MACHINE, "commit": None, "date": "d"}
        return {f"SQuAD 2.0, tf32, 16 GB, {rival}": row}

    late = outcome("eager", fits=False, reason="out of memory in step 1: CUDA out of memory")
    write(folder, "gpu-headline-cuda", outcome("balanced"), late)
    rows = {line.split("|")[1].strip(): line for line in render.page(folder).splitlines() if "SQuAD 2.0, " in line}
    assert "trains, 9.0 GB" in rows["SQuAD 2.0, balanced"]
    assert rows["SQuAD 2.0, eager"].split("|")[3].strip() == "out of memory in step 1"
    assert rows["SQuAD 2.0, balanced"].split("|")[2].strip() == "-", "not run under 32 GB"
    assert "SQuAD 2.0, max" not in rows, "not run at all"


POINTS = [Point("max", True, 10, 5.0), Point("balanced", True, 20, 9.0), Point("compile", False, 30, 8.0)]


def test_the_front_is_what_nothing_beats():
    slow = Point("eager", False, 5, 1.0)
    marked = {p.rival: p.on_front for p in front.mark_front([*POINTS, slow])}
    assert marked == {"max": True, "balanced": True, "compile": False, "eager": True}
    assert [p.rival for p in front.mark_front(POINTS)] == ["max", "balanced", "compile"]


def test_points_beyond_ours_are_those_that_none_of_ours_reaches():
    assert front.beyond_ours(POINTS) == []
    faster, equal = Point("compile", False, 30, 9.5), Point("compile", False, 20, 9.0)
    assert front.beyond_ours([*POINTS, faster]) == [faster]
    assert front.beyond_ours([*POINTS, equal]) == []
    assert front.beyond_ours(POINTS[2:]) == POINTS[2:]


def test_points_on_one_another_share_a_label():
    near = [Point("max", True, 1000 * 10**6, 100.0), Point("paper", True, 1009 * 10**6, 99.5)]
    far = [Point("exact", True, 1009 * 10**6, 110.0), Point("eager", False, 1200 * 10**6, 100.0)]
    assert front.labels_of([*near, *far]) == [
        ("max, paper", (1.0, 100.0)), ("exact", (1.009, 110.0)), ("eager", (1.2, 100.0)),
    ]  # fmt: skip


def test_points_have_measured_throughput_or_the_rooflines():
    how: dict[str, Any] = {"how": "predicted", "dtype": "fp32", "device": "cpu"}
    rows = {**stored("compile", "CoLA", 50, **how, expected_ms=4.0), **stored("eager", "CoLA", 60, **how)}
    chosen = [Cell("CoLA", rival, "fp32", "cpu", "predicted") for rival in ("compile", "eager", "max")]
    assert front.points_of(rows, chosen) == [Point("compile", False, 50, 2000.0, on_front=True)]
    cheap = [Cell("CoLA", f"{preset}-cheap", "fp32", "cpu", "predicted") for preset in ("max", "exact", "paper")]
    rates = [{"bytes_per_s": 1.0}, {"bytes_per_s": 2.0}, {"bytes_per_s": 2.0}]
    for cell, by in zip(cheap, rates, strict=True):
        rows |= stored(cell.rival, "CoLA", 50, **how, expected_ms=4.0, roofline=by)
    known = {p.rival for p in front.points_of(rows, cheap)}
    assert known == {"exact-cheap", "paper-cheap"}, "expectations by other rates do not compare"
    measured = {**how, "how": "measured", "device": "cuda"}
    rows = stored("max", "CoLA", 50, **measured, step_ms=8.0, expected_ms=1.0)
    (point,) = front.points_of(rows, [Cell("CoLA", "max", "fp32", "cuda", "measured")])
    assert (point.ours, point.samples_per_s) == (True, 1000.0)


def test_a_front_is_published_as_data_and_picture(monkeypatch, tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", folder)
    rows = [
        stored(rival, "CoLA", total, how="predicted", dtype="fp32", device="cpu", expected_ms=ms)
        for rival, total, ms in (("balanced", 10**9, 5.0), ("compile", 2 * 10**9, 4.0))
    ]
    write(folder, "twelve-cpu", *rows)
    options = ["--device", "cpu", "--models", "bert", "--minutes", "0", "--check"]
    assert front.main(options) == 1
    assert "rivals' points beyond ours: compile" in capsys.readouterr().out
    assert (folder / "front-bert-fp32-cpu-predicted.png").stat().st_size > 1000
    page = render.page(folder)
    assert "Rivals' points beyond ours: compile." in page and "predicted (throughput: roofline" in page
    assert front.main([*options, "--how", "measured"]) == 1, "nothing measured: no point"
    assert not (folder / "front-bert-fp32-cpu.json").exists()


def test_what_a_front_measures_on_a_cpu_is_cut_timed_and_kept_apart(folder, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", folder)
    assert {
        (c.case.batch, c.times) for c in front.cells("bert", dtype="fp32", device="cpu", how="measured", tokens=512)
    } == {(4, True)}
    on_gpu = front.cells("bert", dtype="tf32", device="cuda", how="measured")
    assert {(c.batch, c.steps) for c in on_gpu} == {(None, Cell.steps)}, "the table's own cells"
    assert front.front_store("cpu", "measured").path != front.front_store("cpu", "predicted").path
    assert front.front_store("cuda", "measured").path == folder / "twelve-cuda.json"
    assert front.front_store("cuda", "predicted").path == folder / "points-cuda.json"
    predicted = front.cells("vit", dtype="tf32", device="cuda", how="predicted")[0]
    assert "predicted (throughput: roofline" in (title := front.title_of("vit", predicted)) and "launches" in title
    assert "launches" not in front.title_of("vit", on_gpu[0])


def test_points_whose_times_are_measured_run_one_by_one(capsys):
    assert front.parse(["--device", "cpu", "--jobs", "2"]).jobs == 2
    with pytest.raises(SystemExit):
        front.parse(["--device", "cpu", "--how", "measured", "--jobs", "2"])
    assert "one by one" in capsys.readouterr().err


def test_rates_are_asked_in_the_precision_of_the_points(monkeypatch):
    asked = []

    def rates(_device):
        asked.append(torch.get_float32_matmul_precision())
        return Roofline({"float32": 1.0}, 2.0)

    monkeypatch.setattr(front, "roofline_of", rates)
    before = torch.get_float32_matmul_precision()
    try:
        for dtype in ("tf32", "fp32"):
            lacks = front._other_rates("cpu", dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["high", "highest"]
    row = {"figures": {"roofline": {"flops_per_s": {"float32": 1.0}, "bytes_per_s": 2.0}}}
    assert not lacks(row) and lacks({"figures": {"roofline": None}}) and not lacks({"error": "does not fit"})


# ---- the other sections


def lossless_row(megabytes: float, ratio: float) -> dict[str, Any]:
    return {"peak_bytes": int(megabytes * 1e6), "step_ratio": [ratio, ratio, ratio], "step_ms": 1e3 * ratio}


def test_lossless_plans_are_held_against_every_setting_of_torch(folder):
    found = {
        "compile": lossless_row(1200, 1.0),
        "activation-budget-0.5": lossless_row(900, 1.1),
        "activation-budget-0.1": lossless_row(700, 1.3),
        "exact-open": lossless_row(800, 0.99),
        "exact-blocks-open": lossless_row(400, 1.25),
    }
    judged = {line[0]: line[1:] for line in lossless.verdicts(found)}
    assert judged["compile / exact-open"] == [1.5, "> 1, no slower", "PASS"]
    assert judged["activation-budget-0.1 / exact-blocks-open"][0] == 1.75
    assert judged["torch's smallest peak / our smallest"][2] == "PASS"
    slower = {**found, "exact-open": lossless_row(800, 1.05), "eager": lossless_row(1300, 1.0)}
    judged = {line[0]: line[1:] for line in lossless.verdicts(slower)}
    assert judged["compile / none of ours is as fast"][2] == "SHORT"
    checkpointed = {**found, "checkpoint": lossless_row(500, 1.4), "max": lossless_row(200, 0.7)}
    judged = {line[0]: line[1:] for line in lossless.verdicts({**checkpointed, "eager": lossless_row(1300, 1.0)})}
    assert judged["step time max / checkpoint"][0] == 0.5 and judged["peak eager / max"][2] == "SHORT by 18.8%"
    assert sections.lossless_section(folder) == ""
    document = {"results": found, "machine": _MACHINE, "commit": None}
    (folder / "lossless-a-model.json").write_text(json.dumps(document))
    section = sections.lossless_section(folder)
    assert "| `exact-blocks-open`" in section and "PASS" in section and section in render.page(folder)


def test_what_is_measured_already_is_not_measured_again():
    known = dict.fromkeys((*lossless.TORCH, *lossless.CHECKPOINT), {})
    assert [name for group in lossless.groups(known) for name in group if name != "compile"] == [
        "eager", *lossless.LOSSLESS, *lossless.FROZEN
    ]  # fmt: skip
    assert all(group[0] == "compile" for group in lossless.groups({}))


def test_prediction_errors_and_budgets_are_told(folder):
    assert sections.prediction_section(folder) == ""
    steps = [{"predicted": 99, "measured": 100}, {"predicted": 100, "measured": 100}]
    results = [{"name": "one case", "steps": steps}, {"name": "another", "error": "no"}]
    known = {"results": results, "median_error": 0.005, "largest_error": 0.01, "above_bound": 0}
    (folder / "peak-cpu.json").write_text(json.dumps({**known, "machine": _MACHINE, "commit": None}))
    rows = [{"measured": 103, "budget": 100}, {"measured": 100, "budget": 100}]
    steps_down = [{"predicted_step": 9, "measured": 90}, {"predicted_step": 10, "measured": 80}]
    budgets = {
        "results": [
            {"name": "m", "rows": rows, "falling": steps_down, "commit": "a" * 40},
            {"name": "n", "rows": [], "falling": []},
        ]
    }
    (folder / "budget-cpu.json").write_text(json.dumps({**budgets, "machine": _MACHINE, "commit": None}))
    section = sections.prediction_section(folder)
    assert "-1.000" in section and "2 cases, 2 steps: median error 0.500%" in section
    assert "2 random ones were accepted, in 2 models; 1 were exceeded by more than 1%" in section.replace("\n", " ")
    assert "2 more in falling order, in 1 models: the peak rose 1 times" in section
    assert f"commit {'a' * 10}, no commit" in section, "each model's own"


def test_planning_is_told(folder):
    assert "vit-large-384" in sections.planning_section(report.RESULTS)
    for path in folder.glob("pl*.json"):
        path.unlink()
    for path in folder.glob("price*.json"):
        path.unlink()
    assert sections.planning_section(folder) == ""
    kept = {"machine": _MACHINE, "commit": None}
    times = {"model": "m", "batch": 2, "length": 3, "rounds": [[1.0, 2.0], [1.0, 4.0]], "beyond_capture_s": 2.0}
    (folder / "plan-time-cpu.json").write_text(json.dumps({**times, "limit_s": 5.0, **kept}))
    cut = {"level": "cheap", "saved_bytes": 2e6, "again_flops": 0.0, "prices": [0.5, 1.0], "peak_bytes": 3_000_000}
    results = [{"settings": {"preset": "exact"}, "cuts": [cut, {**cut, "prices": [2.0]}]}]
    (folder / "price-cpu.json").write_text(json.dumps({"results": results, **kept}))
    section = sections.planning_section(folder)
    assert "planned in 2.0 s, the fastest of 2 rounds: 2.0 s beyond capture (at most 5)" in section
    assert "differences within each round: 2.0 s" in section, "a file from before what has no bound was timed"
    assert "| 0.5 to 1 " in section and "| 2 " in section


def test_what_has_no_bound_is_told_with_its_own_commit(folder):
    times = {"model": "m", "batch": 2, "length": 3, "rounds": [[1.0, 2.0]], "beyond_capture_s": 1.0, "limit_s": 5.0}
    row = {"name": "plan(peak=True)", "seconds": [30.0, 50.0], "step_peak_bytes": 7_000_000, "commit": "b" * 40}
    document = {**times, "more": [{**row, "machine": _MACHINE}], "machine": _MACHINE, "commit": "a" * 40 + "+"}
    (folder / "plan-time-cpu.json").write_text(json.dumps(document))
    section = sections.planning_section(folder)
    assert "| `plan(peak=True)` | 40.0 | 7.0 |" in " ".join(section.split())
    assert f"commit {'a' * 10}+" in section and f"commit {'b' * 10}" in section


def test_big_plans_are_told_with_the_commit_of_each(folder):
    figures = {"budget": None, "seconds": 1.0, "host_bytes": 2**30, "peak_bytes": 2**30}
    rows = [{"name": "bert-large", **figures, "commit": "1" * 40}, {"name": "llama-1b", **figures}]
    document = {"results": rows, "machine": _MACHINE, "commit": "c" * 40}
    (folder / "plan-big.json").write_text(json.dumps(document))
    section = sections.planning_section(folder)
    cells = {line.split("|")[1].strip(): line.split("|")[6].strip() for line in section.splitlines() if "|" in line}
    assert (cells["bert-large"], cells["llama-1b"]) == ("1" * 10, "c" * 10)
    assert section.endswith("G; Python 3, torch 9"), "no commit stands for all rows"


def test_the_schedulers_share_of_a_step_is_told(folder):
    assert sections.schedule_section(folder) == ""
    path, alone = folder / "schedule-m.json", {"units": 101, "step_ms": 18.0}
    kept = {"machine": _MACHINE, "commit": None}
    path.write_text(json.dumps({"rates": [{"freeze_rate": 0.9, "schedule": alone}], **kept}))
    (line,) = (line for line in sections.schedule_section(folder).splitlines() if "18.0" in line)
    assert [cell.strip() for cell in line.split("|")[4:8]] == ["-", "-", "-", "-"], "steps were not timed"
    found = [{"scheduling_ms": 1000 * share, "step_ms": 1000.0, "share": share} for share in (0.01, 0.0125)]
    rates = [{"freeze_rate": r, "schedule": alone, "training": t} for r, t in zip((0.9, 0.5), found, strict=True)]
    path.write_text(json.dumps({"rates": rates, **kept}))
    section = sections.schedule_section(folder)
    told = [[cell.strip() for cell in line.split("|")[5:8]] for line in section.splitlines() if "18.0" in line]
    assert told == [["1000.0", "1.00", "PASS"], ["1000.0", "1.25", "SHORT by 25.0%"]]
    assert section in render.page(folder)


def test_accuracy_is_shown_for_the_tasks_that_have_cells(folder):
    assert "Not run yet" in sections.accuracy_section(report.RESULTS) or "what must hold" in sections.accuracy_section(
        report.RESULTS
    )
    (folder / "accuracy-cpu.jsonl").unlink(missing_ok=True)
    assert sections.accuracy_section(folder) == ""
