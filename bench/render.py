"""README's tables and docs/results.md, written from bench/results/*.json: ``python -m bench report``.

In README, what stands between ``<!-- bench:begin NAME -->`` and ``<!-- bench:end -->`` is written by this module, the
rest by hand. docs/results.md is written as a whole. ``--check`` writes nothing and returns 1 if either is out of date.
What is measured and what is predicted never stand in one table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import front, report, sections, trainer, twelve
from bench.tasks import device_of, machines
from bench.twelve import rows_of

README = report.ROOT / "README.md"
PAGE = report.ROOT / "docs" / "results.md"
_BLOCK = re.compile(r"(<!-- bench:begin ([\w-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)
_PEAK_NAMES = {"compile": "torch.compile", "checkpoint": "gradient checkpointing (eager)"}

Documents = Mapping[str, Mapping[str, Any]]
"""Column -> what a file of bench/memory.py holds."""


# --- README -------------------------------------------------------------------------------------------------------
def step_peak_block(folder: Path) -> str:
    """Return the table of step peaks at 4 and 12 layers, measured on a CPU, with a note on how."""
    return _peak_table(_bert_documents(folder))


def _bert_documents(folder: Path) -> Documents:
    return {f"{n} layers": _memory_document(folder, f"bert-{n}layers-batch16-len128-fp32-cpu") for n in (4, 12)}


def _memory_document(folder: Path, case: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"memory-{case}.json").read_text()))


def _peaks(document: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the worst step of each rival."""
    return {name: result["worst"]["peak_bytes"] for name, result in document["results"].items() if "worst" in result}


def _peak_table(documents: Documents) -> str:
    """A line per rival that every case has, columns by case; below it how many steps, and where."""
    found = {case: _peaks(document) for case, document in documents.items()}
    first, *others = found.values()
    names = [name for name in first if all(name in peaks for peaks in others)]
    body = [[_shown(name), *(part for peaks in found.values() for part in _against(peaks, name))] for name in names]
    heads = ["", *(part for case in found for part in (case, "smaller than eager", "than torch.compile"))]
    table = tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{_steps_note(documents, names)} {_places_note(documents)}"


def _shown(name: str) -> str:
    return _PEAK_NAMES.get(name, name if name == "eager" else f"slimfit_fx, `{name}`")


def _steps_note(documents: Documents, names: Sequence[str]) -> str:
    """Of how many steps each rival's peak is the worst; where they are fewer, whether they are all alike."""
    peaks = {
        name: [[s["peak_bytes"] for s in d["results"][name]["steps"]] for d in documents.values()] for name in names
    }
    counts = {name: min(map(len, of_cases)) for name, of_cases in peaks.items()}
    most = max(counts.values())
    told = []
    for count in sorted({count for count in counts.values() if count < most}, reverse=True):
        those = [name for name in names if counts[name] == count]
        alike = all(len(set(steps)) == 1 for name in those for steps in peaks[name])
        told.append(f"of {count}{', all alike' * alike}: {', '.join(map(_shown, those))}")
    return f"Worst of {most} steps ({'; '.join(told)})." if told else f"Worst of {most} steps."


def _places_note(documents: Documents) -> str:
    """Where it was measured; a row that was measured again elsewhere says so itself (``machine``)."""
    by_case: dict[str, dict[str, list[str]]] = {}
    for case, document in documents.items():
        there = by_case.setdefault(case, {})
        for name, result in document["results"].items():
            there.setdefault(device_of(result.get("machine") or document["machine"]), []).append(_shown(name))
    splits = list(by_case.values())
    if all(split == splits[0] for split in splits):
        each = [f"on {place}: {', '.join(names)}" for place, names in splits[0].items()]
        return f"Measured {'; '.join(each)}." if len(each) > 1 else f"Measured on {next(iter(splits[0]))}."
    places: dict[str, list[str]] = {}
    for case, there in by_case.items():
        for place, names in there.items():
            places.setdefault(place, []).append(case if len(there) == 1 else f"{case} ({', '.join(names)})")
    each = [f"on {place}: {', '.join(cases)}" for place, cases in places.items()]
    return f"Measured {'; '.join(each)}."


def _against(peaks: Mapping[str, int], name: str) -> list[str]:
    ratios = [f"{peaks[base] / peaks[name]:.2f}x" for base in ("eager", "compile")]
    return [f"{peaks[name] / 1e6:.1f}", *ratios]


BLOCKS = {"step-peak": step_peak_block, "twelve": twelve.twelve_block, "accuracy": sections.accuracy_block}
"""Name in README -> what writes it."""


def filled(text: str, folder: Path) -> str:
    """Return ``text`` with every block written anew.

    Raises:
        ValueError: a block has a name that nothing writes, or one that README should have is missing.
    """
    names = [match.group(2) for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"README must have the blocks {sorted(BLOCKS)}, once each, got {sorted(names)}")
    return _BLOCK.sub(lambda match: f"{match.group(1)}{BLOCKS[match.group(2)](folder)}\n{match.group(3)}", text)


# --- docs/results.md ----------------------------------------------------------------------------------------------
def page(folder: Path) -> str:
    """Return docs/results.md."""
    told = [
        twelve.twelve_section(folder),
        twelve.errors_section(folder),
        twelve.headline_section(folder),
        _trainer_section(folder),
        _front_section(folder),
        sections.language_section(folder),
        sections.host_time_section(folder),
        _compile_section(folder),
        _peaks_section(folder),
        sections.lossless_section(folder),
        sections.prediction_section(folder),
        sections.planning_section(folder),
        sections.schedule_section(folder),
        sections.accuracy_section(folder),
    ]
    return "\n\n".join([_INTRODUCTION, *filter(None, told)]) + "\n"


_INTRODUCTION = """# Results

Written by `python -m bench report` from the files in `bench/results/`; do not edit. Everything here can be found out
again: `python -m bench` lists the commands, [CONTRIBUTING](../CONTRIBUTING.md) says which to run. 1 GB = 10^9 bytes.

Total memory: parameters, optimizer state, the batch, and the larger of the step's peak (activations, gradients,
workspaces) and the optimizer's. The optimizer is AdamW. Ours: the worst step under ILS at the setting's freeze rate;
predicted: the worst choice of open units. `eager-attention` is the paper's baseline: attention as plain products, its
probabilities kept. `budget-N%`: the planner, with room for parameters, optimizer state and N% of what eager's step
takes above them.

**Measured**: by the allocator, while the step ran. **Emulated**: by PyTorch's CUDA allocator, on a machine without a
GPU, while the code for an H200 ran with kernels that do nothing (`python -m bench.emulated_gpu`). **Predicted**: by us,
while nothing ran. No two of them stand in one table."""


def _trainer_section(folder: Path) -> str:
    rows = rows_of(folder, "gpu-trainer-cuda")
    if not rows:
        return ""
    runs = {key.removeprefix("trainer, "): row for key, row in rows.items()}
    said = (
        f"BERT-base, batch 32, length 128, bf16, {trainer.STEPS} steps; growth: by how much the worst peak of the\n"
        f"last {trainer.FLAT // 2} steps exceeds the worst of the {trainer.FLAT // 2} before them."
    )
    parts = ["## Under the Hugging Face Trainer", said, trainer.as_table(runs, "github"), *machines(rows.values())]
    return "\n\n".join(parts)


def _front_section(folder: Path) -> str:
    parts = []
    for path in sorted(folder.glob("front-*.json")):
        document = json.loads(path.read_text())
        points = [front.Point(**point) for point in document["points"]]
        beyond = ", ".join(point.rival for point in front.beyond_ours(points)) or "none"
        said = f"Rivals' points beyond ours: {beyond}."
        parts += [document["title"], front.front_table(points, "github"), said, *document["sources"]]
    return "\n\n".join(["## Memory against throughput", *parts]) if parts else ""


def _compile_section(folder: Path) -> str:
    rows = rows_of(folder, "gpu-compile-cuda")
    body = [
        [key.removeprefix("compile, "), row.get("cold_compile_s"), row.get("warm_compile_s")]
        for key, row in rows.items()
    ]
    if not body:
        return ""
    heads = ["BERT-base, batch 32, seconds to compile", "cold", "warm"]
    table = tabulate(body, headers=heads, tablefmt="github", floatfmt=("", ".1f", ".1f"), missingval="failed")
    return "\n\n".join(["## Compile time on a GPU", str(table), *machines(rows.values())])


def _peaks_section(folder: Path) -> str:
    bert, vit = _bert_documents(folder), {"MB": _memory_document(folder, "vit-4layers-batch8-res224-fp32-cpu")}
    return "\n\n".join([
        "## Step peak of one BERT",
        "Width 768, batch 16, length 128, fp32, SDPA, hidden dropout 0.1, freeze rate 0.9 under ILS; MB above\n"
        "parameters and optimizer state, the worst step, **measured** on a CPU.",
        _peak_table(bert),
        *machines(bert.values()),
        "The same of a ViT-B/16 cut to 4 layers, batch 8, 224 pixels:",
        _peak_table(vit),
        *machines(vit.values()),
    ])  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files, or check them; return 1 if ``--check`` finds one out of date."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    options = parser.parse_args(arguments)
    wanted = {README: filled(README.read_text(), report.RESULTS), PAGE: page(report.RESULTS)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.name}: {'out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(wanted[path])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
