"""Every published figure in one command: ``python -m bench.suite`` (CPU) or ``python -m bench.suite --device cuda``.

Runs the memory and the time benchmark on a list of cases, one after the other, each in a process of its own, and ends
with one line per run. What they write lies in ``bench/results/``. ``--list`` only prints the commands.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from time import perf_counter

from bench.report import ROOT

CPU = (
    ("bench.memory", "--layers 4"),
    ("bench.memory", "--layers 12"),
    ("bench.memory", "--model vit --layers 4"),
    ("bench.time", "--layers 4"),
    ("bench.time", "--layers 12 --what compile"),
    ("bench.peak", ""),
    ("bench.sensitivity", "--task text"),
)
_BERT_BASE = "--model bert --layers 12"
_VIT_BASE = "--model vit --layers 12"
CUDA = tuple(
    (module, f"{size} --dtype {dtype} --device cuda")
    for dtype in ("tf32", "bf16")
    for size in (
        f"{_BERT_BASE} --batch 32 --length 128",
        f"{_BERT_BASE} --batch 128 --length 384",
        f"{_VIT_BASE} --batch 128 --resolution 224",
        f"{_VIT_BASE} --batch 128 --resolution 384",
    )
    for module in ("bench.memory", "bench.time")
) + (("bench.peak", "--device cuda"),)


def commands(device: str) -> list[list[str]]:
    """Return the command lines of one device, without the interpreter."""
    return [[module, *options.split()] for module, options in (CUDA if device == "cuda" else CPU)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; return 1 if a run failed."""
    parser = argparse.ArgumentParser("python -m bench.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="run only the commands that contain this text")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(arguments)
    chosen = [command for command in commands(options.device) if options.only in " ".join(command)]
    lines, failed = [], False
    for command in chosen:
        shown = "python -m " + " ".join(command)
        print(f"\n$ {shown}", flush=True)
        if options.list:
            continue
        began = perf_counter()
        status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
        failed |= status != 0
        lines.append(
            f"{'ok' if status == 0 else f'exit status {status}':>14}  {perf_counter() - began:7.0f} s  {shown}"
        )
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
