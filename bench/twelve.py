"""The paper's twelve settings, and runs under a cap, as README and docs/results.md show them.

What is measured, emulated and predicted never stands in one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.cells import HOW, Cell
from bench.headline import CAPS_GB, RIVALS, TASKS
from bench.paper_table import (
    BASELINES,
    DTYPES,
    bound_by_update,
    ceiling,
    cells,
    error_table,
    lines,
    mean_table,
    pairs,
    task_table,
    verdicts,
)
from bench.paper_table import RIVALS as TABLE_RIVALS
from bench.rivals import preset_of
from bench.settings import TASKS as SETTINGS
from bench.tasks import machines

CPU_TOKENS = 1024

Rows = dict[str, dict[str, Any]]


def rows_of(folder: Path, name: str) -> Rows:
    """Return the stored rows of one file, none if there is no such file."""
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_text())["rows"]) if path.exists() else {}


def twelve_block(folder: Path) -> str:
    """Return the means over the paper's settings.

    Measured on a GPU if every cell that it needs is there, else on an emulated one, else predicted.
    """
    for how, dtype, device in (
        ("measured", "tf32", "cuda"),
        ("emulated", "tf32", "cuda"),
        ("predicted", "fp32", "cpu"),
    ):
        rows = rows_of(folder, _file_of(how, device))
        found = [line for line in lines(rows, table_cells(how, dtype, device)) if line.mean_bytes is not None]
        if any(line.rival == "balanced" and None not in line.ratios[:2] for line in found):
            return f"{_source(how, dtype, device)}\n\n{mean_table(found, 'github')}"
    return "Not every setting has a figure yet: see [all results](docs/results.md)."


def table_cells(how: str, dtype: str, device: str) -> list[Cell]:
    """Return the cells of one table of the twelve settings."""
    return cells(device, [how], [dtype], SETTINGS, TABLE_RIVALS, CPU_TOKENS)


def _file_of(how: str, device: str) -> str:
    return "twelve-emulated" if how == "emulated" else f"twelve-{device}"


def _source(how: str, dtype: str, device: str) -> str:
    if how == "emulated":
        return (
            f"**Emulated**, {dtype}, full batches: PyTorch's CUDA allocator and operators, and Inductor's code for an\n"
            "H200, with kernels that do nothing (`python -m bench.emulated_gpu`). No times."
        )
    if how == "predicted":
        kernels = "the CPU" if device == "cpu" else "a GPU"
        return (
            f"**Predicted**, {dtype}, full batches, kernels of {kernels}: dry runs of the code that Inductor writes,\n"
            "eager steps on fake tensors. Attention dropout in `eager-attention` only."
        )
    if device == "cpu":
        return (
            f"**Measured** on a CPU, {dtype}, batches cut to {CPU_TOKENS} tokens, attention dropout in\n"
            "`eager-attention` only."
        )
    return f"**Measured** on a GPU, {dtype}, full batches."


def twelve_section(folder: Path) -> str:
    parts = ["## The paper's twelve settings"]
    for device in ("cuda", "cpu"):
        for how in HOW:
            rows = rows_of(folder, _file_of(how, device))
            for dtype in DTYPES[device]:
                table = table_cells(how, dtype, device)
                if any(cell.key in rows for cell in table):
                    parts.append(_one_table(rows, table, _source(how, dtype, device)))
            if how == "emulated" and device == "cuda":
                parts += filter(None, [_fidelity(folder)])
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not run yet."])


def _fidelity(folder: Path) -> str:
    """How far emulated totals lie from measured ones, where both are known and nothing of ours takes part."""
    emulated, off = rows_of(folder, "twelve-emulated"), []
    for key, row in rows_of(folder, "twelve-cuda").items():
        other = emulated.get(key.replace("measured", "emulated", 1))
        if other is not None and "figures" in row and "figures" in other and preset_of(row["cell"]["rival"]) is None:
            off.append(other["figures"]["total_bytes"] / row["figures"]["total_bytes"] - 1)
    if not off:
        return ""
    same = sum(one == 0 for one in off)
    return (
        f"Emulated against measured: {len(off)} cells of eager training have both; {same} are equal to the byte, the "
        f"largest difference is {max(map(abs, off)):.4%}."
    )


def _one_table(rows: Rows, table: Sequence[Cell], source: str) -> str:
    known = [rows[cell.key] for cell in table if cell.key in rows]
    found = lines(rows, table)
    parts = [source, task_table(rows, table, "github"), mean_table(found, "github"), *verdicts(found)]
    late, of = bound_by_update(rows, table, "balanced")
    if of:
        parts.append(
            f"In {late} of {of} settings the optimizer's step of `balanced` (gradients of open units, samples of\n"
            "their weights for the distances, AdamW's temporaries) takes more than its forward and backward."
        )
    for base in BASELINES[:2]:
        most = ceiling(rows, table, base)
        if most is not None:
            parts.append(
                f"Parameters, AdamW's state and the batch alone come to a mean ratio of {most:.2f} against {base}: "
                "nobody who trains every parameter at some time can exceed that."
            )
    return "\n\n".join([*parts, *machines(known)])


def errors_section(folder: Path) -> str:
    rows, parts = rows_of(folder, "twelve-cpu"), []
    for dtype in DTYPES["cpu"]:
        table = error_table(rows, pairs([dtype], SETTINGS, TABLE_RIVALS, CPU_TOKENS), "github")
        parts += [f"{dtype}:", table] if table else []
    said = (
        f"How far predicted totals lie above measured ones, on a CPU, batches cut to {CPU_TOKENS} tokens (ours are\n"
        "bounds for the worst choice of open units)."
    )
    return "\n\n".join(["## Predictions against measurements", said, *parts]) if parts else ""


def headline_section(folder: Path) -> str:
    parts = []
    for file, said in (("gpu-headline-cuda", "**Measured** on a GPU."), ("gpu-headline-emulated", "**Emulated.**")):
        rows = rows_of(folder, file)
        parts += [said, *_caps(rows)] if rows else []
    told = "50 steps at batch 128; the caching allocator may take no more than the cap."
    return "\n\n".join(["## Under a hard cap", told, *parts]) if parts else ""


def _caps(rows: Rows) -> list[str]:
    parts = []
    for dtype in (dtype for dtype in DTYPES["cuda"] if any(f", {dtype}, " in key for key in rows)):
        body = [
            [f"{task}, {rival}", *(_outcome(rows.get(f"{task}, {dtype}, {cap} GB, {rival}")) for cap in CAPS_GB)]
            for task in TASKS
            for rival in RIVALS
            if any(f"{task}, {dtype}, {cap} GB, {rival}" in rows for cap in CAPS_GB)
        ]
        heads = [dtype, *(f"{cap} GB" for cap in CAPS_GB)]
        parts.append(str(tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)))
    return [*parts, *machines(rows.values())]


def _outcome(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "failed"
    outcome = row["outcome"]
    taken = f"{outcome['total_bytes'] / 1e9:.1f} GB" if outcome["total_bytes"] else "-"
    return f"trains, {taken}" if outcome["fits"] else outcome["reason"].split(":")[0]
