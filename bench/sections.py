"""Sections of docs/results.md that are told by one kind of file each; empty where there is no file yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import host_time, plan_time, price, report, schedule
from bench.accuracy import claims
from bench.accuracy import table as accuracy_table
from bench.accuracy.__main__ import CACHE
from bench.accuracy.cells import METHODS
from bench.accuracy.store import Store
from bench.accuracy.tasks import TASKS, named_tasks
from bench.accuracy.tasks.base import POINTS
from bench.budget import TOLERANCE, rises
from bench.lossless import verdicts
from bench.tasks import machines, short_commit


def lossless_section(folder: Path) -> str:
    """Recompute without loss against torch's own, and ours against checkpointing."""
    parts = []
    for path in sorted(folder.glob("lossless-*.json")):
        document = json.loads(path.read_text())
        rows = [
            [f"`{name}`", row["peak_bytes"] / 1e6, row["step_ratio"][1]]
            for name, row in sorted(document["results"].items(), key=lambda pair: pair[1]["peak_bytes"])
        ]
        heads = [path.stem.removeprefix("lossless-"), "step peak MB", "step / torch.compile's"]
        judged = [[f"`{what}`", *rest] for what, *rest in verdicts(document["results"])]
        parts += [_table(rows, heads, ("", ".1f", ".3f")), _table(judged, ["", "ratio", "must be", ""], ("", ".3f"))]
        parts += machines([document])
    said = (
        "`exact-...-open`: lossless, every gate open, so that only recompute saves memory; the same bits as plain\n"
        "torch.compile. `activation-budget-X`: torch's `activation_memory_budget`. **Measured** on a CPU."
    )
    return "\n\n".join(["## Recompute without loss", said, *parts]) if parts else ""


def language_section(folder: Path) -> str:
    """What a step of a language model with many words takes above parameters and optimizer state."""
    parts = []
    for path in sorted(folder.glob("memory-llama-*-emulated.json")):
        document = json.loads(path.read_text())
        results = {name: row for name, row in document["results"].items() if "worst" in row}
        peaks = {name: row["worst"]["peak_bytes"] for name, row in results.items()}
        rows = [
            [f"`{name}`", size / 1e9, results[name]["worst"]["grad_bytes"] / 1e9, peaks["eager"] / size,
             len(results[name]["steps"]), results[name]["recompiles"]]
            for name, size in sorted(peaks.items(), key=lambda pair: -pair[1])
        ]  # fmt: skip
        case = document["case"]
        heads = [
            f"Llama, {case['layers']} layers, {case['vocab']:,} words, {case['batch']} x {case['length']} tokens, "
            f"{case['dtype']}",
            "step peak GB", "gradients of it", "smaller than eager", "steps", "recompiles",
        ]  # fmt: skip
        parts += [_table(rows, heads, ("", ".2f", ".2f", ".2f", "", "")), *machines([document])]
    said = (
        "**Emulated**: the peak of a step above parameters and optimizer state, the worst of the steps, at a freeze\n"
        'rate of 0.9 under ILS. `-loss`: `outputs="loss"`, so that logits are never held; `-open`: every gate open.'
    )
    return "\n\n".join(["## A language model", said, *parts]) if parts else ""


def host_time_section(folder: Path) -> str:
    """How long a process needs to issue a step to a GPU."""
    parts = []
    for path in sorted(folder.glob("host-time-*.json")):
        for case, document in json.loads(path.read_text())["cases"].items():
            rows = host_time.lines(document["results"])
            parts += [_table(rows, [case, *host_time.HEADS[1:]], host_time.FORMATS), *machines([document])]
    said = (
        "How long the process needs to issue a step to a GPU, **emulated**: no kernel computes, so that a step takes\n"
        "as long as Python takes to start them. A GPU that is faster than this waits. Milliseconds as on an\n"
        "undisturbed machine, by a loop of Python that is timed between the steps; median of the rounds. Allocations:\n"
        "blocks that the allocator hands out in a step (`python -m bench.emulated_gpu -m bench host-time`)."
    )
    return "\n\n".join(["## Time to issue a step", said, *parts]) if parts else ""


def prediction_section(folder: Path) -> str:
    """Predicted against measured peaks, and budgets against what steps took."""
    parts = []
    for path in sorted(folder.glob("peak-*.json")):
        document = json.loads(path.read_text())
        if path.stem == "peak-emulated":
            parts.append("On an **emulated** GPU (`python -m bench.emulated_gpu -m bench.peak --device cuda`):")
        rows = []
        for result in document["results"]:
            off = [step["predicted"] / step["measured"] - 1 for step in result.get("steps", ())]
            most = max((step["measured"] for step in result.get("steps", ())), default=None)
            worst = 100 * max(off, key=abs) if off else None
            rows.append([result["name"], most and most / 1e6, worst])
        parts.append(_table(rows, ["case", "largest peak MB", "largest error %"], ("", ".1f", "+.3f")))
        steps = sum(len(result.get("steps", ())) for result in document["results"])
        parts.append(
            f"{len(rows)} cases, {steps} steps: median error {document['median_error']:.3%}, largest "
            f"{document['largest_error']:.3%}; cases with a step above the bound of the worst choice of gates: "
            f"{document['above_bound']}."
        )
        parts += machines([document])
    for path in sorted(folder.glob("budget-*.json")):
        document = json.loads(path.read_text())
        kept = [row for result in document["results"] for row in result.get("rows", ())]
        over = sum(row["measured"] > 1.01 * row["budget"] for row in kept)
        failed = sum("error" in result for result in document["results"])
        parts.append(
            f"Budgets: {len(kept)} random ones were accepted, in {len(document['results'])} models; {over} were "
            f"exceeded by more than 1%, {failed} models failed."
        )
        falling = [result["falling"] for result in document["results"] if result.get("falling")]
        rose = sum(rises([row["predicted_step"] for row in rows]) for rows in falling)
        rose += sum(rises([row["measured"] for row in rows], TOLERANCE) for rows in falling)
        if falling:
            count = sum(map(len, falling))
            parts.append(f"{count} more in falling order, in {len(falling)} models: the peak rose {rose} times.")
        parts += machines(report.rows_in(document))
    return "\n\n".join(["## Predicted against measured peaks", *parts]) if parts else ""


def planning_section(folder: Path) -> str:
    """How long plans take, and what the price of running again changes."""
    parts: list[str] = []
    for path in sorted(folder.glob("plan-time-*.json")):
        parts += _plan_time(json.loads(path.read_text()))
    for path in sorted(folder.glob("plan-big*.json")):
        parts += _plan_big(json.loads(path.read_text()))
    for path in sorted(folder.glob("price-*.json")):
        document = json.loads(path.read_text())
        said = (
            "The different plans of BERT-base, batch 16, length 128, at prices of running again from 1/256 to 256\n"
            "times the planner's own (**predicted**; time by the roofline):"
        )
        for result in document["results"]:
            heads = [f"`{result['settings']['preset']}`", *price.HEADS]
            parts += [said, _table(list(price.lines(result["cuts"])), heads, price.FORMATS)]
            said = "The same:"
        parts += machines([document])
    return "\n\n".join(["## Planning", *parts]) if parts else ""


def _plan_time(document: dict[str, Any]) -> list[str]:
    captured, planned = zip(*document["rounds"], strict=True)
    parts = [
        f"{document['model']}, batch {document['batch']}, length {document['length']}, processor time: captured as "
        f"torch.compile does in {min(captured):.1f} s, planned in {min(planned):.1f} s, the fastest of "
        f"{len(planned)} rounds: {document['beyond_capture_s']:.1f} s beyond capture (at most "
        f"{document['limit_s']:g}). Median of the differences within each round: "
        f"{plan_time.median_beyond(document['rounds']):.1f} s.",
        *machines([document]),
    ]
    more = document.get("more", [])
    if more:
        rows, formats = list(plan_time.lines(more)), plan_time.FORMATS
        parts += [_table(rows, list(plan_time.HEADS), formats), *machines(more)]
    return parts


def _plan_big(document: dict[str, Any]) -> list[str]:
    known = [row for row in report.rows_in(document) if "error" not in row]
    rows = [
        [row["name"], row["budget"] or "-", row["seconds"], row["host_bytes"] / 2**30, row["peak_bytes"] / 2**30,
         short_commit(row)]
        for row in known
    ]  # fmt: skip
    heads = ["planned with its peak", "budget", "seconds (at most 60)", "host GiB (at most 2)", "step peak GiB"]
    return [_table(rows, [*heads, "commit"], ("", "", ".1f", ".2f", ".1f", "")), *machines(known, commits=False)]


def schedule_section(folder: Path) -> str:
    """What the scheduler itself takes of a step."""
    parts = []
    for path in sorted(folder.glob("schedule-*.json")):
        document = json.loads(path.read_text())
        rows = list(schedule.lines(document["rates"]))
        parts += [path.stem.removeprefix("schedule-") + ":", _table(rows, list(schedule.HEADS), schedule.FORMATS)]
        parts += machines([document])
    said = (
        "Distances, decision and gates of `balanced` under ILS, medians: driven alone, and within training steps as a\n"
        "share of the same step. **Measured** on a CPU."
    )
    return "\n\n".join(["## What the scheduler takes", said, *parts]) if parts else ""


def accuracy_section(folder: Path) -> str:
    """The tables of ``bench accuracy``, of the tasks that have finished cells, at both scales."""
    path = folder / "accuracy-cpu.jsonl"
    if not path.exists():
        return ""
    store, parts = Store(path), []
    for scale, command in (("quick", "python -m bench accuracy --quick"), ("full", "python -m bench accuracy")):
        tasks = named_tasks(list(TASKS), scale, CACHE)
        found = {task.name: claims.standings(store.rows_of(task.name, scale), task, METHODS) for task in tasks}
        begun = [task for task in tasks if found[task.name]]
        if not begun:
            continue
        missing = [task.name for task in tasks if task not in begun]
        bounds = [claim for claim in claims.claims(found, tasks) if claim.points is not None]
        parts += [
            f"`{command}`, what is finished of it. **Measured** on a CPU.",
            *(f"```\n{accuracy_table.task_table(task, found[task.name])}\n```" for task in begun),
            *([_block(bounds)] if bounds else []),
            *([f"Not run at this scale: {', '.join(missing)}."] if missing else []),
        ]
    said = "Two seeds have wide intervals. Tasks, scales and methods: [accuracy](accuracy.md)."
    return "\n\n".join(["## Accuracy", said, *parts]) if parts else ""


def accuracy_block(folder: Path) -> str:
    """For README: what methods gain over full fine-tuning, by task and in the mean; empty if that was not measured."""
    path = folder / "accuracy-cpu.jsonl"
    if not path.exists():
        return ""
    store = Store(path)
    tasks = [task for task in named_tasks(list(TASKS), "quick", CACHE) if task.metric.points == POINTS]
    found = {task.name: claims.standings(store.rows_of(task.name, "quick"), task, METHODS) for task in tasks}
    rows = []
    for method, said in _IN_README.items():
        each, mean = claims.gains_over_full(found, tasks, method)
        seeds = {interval.count for interval in each if interval is not None}
        shown = [accuracy_table.show(interval, sign=True) for interval in (*each, mean)]
        rows.append([said, *shown, " to ".join(map(str, sorted({min(seeds), max(seeds)}))) if seeds else "-"])
    heads = ["against full fine-tuning, points", *(task.name for task in tasks), "mean", "seeds"]
    return str(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


_IN_README = {
    "balanced-0.90-ils": "`balanced`, 90% frozen",
    "max-0.90-ils": "`max`, 90% frozen",
    "lora": "LoRA, rank 8",
    "head": "frozen backbone, trained head",
}


def _block(bounds: Any) -> str:
    return f"```\n{accuracy_table.claims_table(bounds)}\n```"


def _table(rows: list[list[Any]], heads: list[str], formats: tuple[str, ...]) -> str:
    commits = [index for index, head in enumerate(heads) if head == "commit"]  # of digits alone it is no number
    return str(
        tabulate(rows, headers=heads, tablefmt="github", floatfmt=formats, missingval="-", disable_numparse=commits)
    )
