"""What the benchmarks share: the options, the machine, the bounds of the note, tables and result files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.models import DTYPES, MODELS, Case, make_case
from bench.rivals import Settings, preset_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Bound:
    """A ratio that must be reached: ``rival`` against ``against``; None for a figure of the rival alone."""

    rival: str
    against: str | None
    limit: float
    at_least: bool

    def verdict(self, value: float | None) -> str:
        """``PASS``, or ``SHORT`` with the distance in percent; ``-`` if there is no value."""
        if value is None:
            return "-"
        if value >= self.limit if self.at_least else value <= self.limit:
            return "PASS"
        if self.limit == 0:
            return f"SHORT by {value:g}"
        return f"SHORT by {abs(value / self.limit - 1):.1%}"

    @property
    def text(self) -> str:
        """The limit as the table shows it."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the case and slimfit_fx's settings."""
    parser.add_argument("--model", choices=MODELS, default="bert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, help="default: 16 for bert, 8 for vit")
    parser.add_argument("--length", type=int, help="tokens per example (bert); default 128")
    parser.add_argument("--resolution", type=int, help="pixels per side (vit); default 224")
    parser.add_argument("--width", type=int, help="default 768")
    parser.add_argument("--heads", type=int, help="default 12")
    parser.add_argument("--vocab", type=int, help="default 30522")
    parser.add_argument("--dropout", type=float, help="default: 0.1 for bert, 0 for vit")
    parser.add_argument("--attention-dropout", type=float, help="default 0 (see bench/models.py)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--freeze-rate", type=float, default=0.9)
    parser.add_argument("--scheduler", default="ils")
    parser.add_argument("--executor", choices=("inductor", "interpreter"), default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--tag", default="", help="appended to the name of the result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed or a rival failed")


def case_of(options: argparse.Namespace) -> Case:
    """Return the case that the command line describes."""
    return make_case(**vars(options))


def settings_of(options: argparse.Namespace) -> Settings:
    """Return slimfit_fx's settings of the command line."""
    return Settings(options.freeze_rate, options.scheduler, options.executor, options.seed)


def check_rivals(names: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """End with a usage error that lists every unknown rival."""
    problems = []
    for name in names:
        try:
            preset_of(name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        parser.error("; ".join(problems))


def run_worker(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Run ``python -m module arguments --out FILE`` in a process of its own; return what it wrote.

    A worker that fails gives ``{"error": what its stderr ends with, "stderr": ...}``; one that takes too long is ended
    with all that it started, and gives ``"timed_out"`` as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
        inherited = {**os.environ, "KINETO_LOG_LEVEL": "99", **(environment or {})}
        process = subprocess.Popen(
            command, cwd=ROOT, env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout_s:.0f} s", "timed_out": True}
        finally:
            _end(process)
        if out.exists():
            return dict(json.loads(out.read_text()))
        return {"error": f"exit status {process.returncode}: {_cause(stderr)}", "stderr": stderr[-4000:]}


def _end(process: subprocess.Popen[str]) -> None:
    """End a worker and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cause(stderr: str) -> str:
    """Return the line that names the last exception, else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(("USDT:", " "))]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Fault|Unsupported)\b", line)]
    return (named or lines or ["no message"])[-1]


def print_errors(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line for each rival that failed."""
    for name, result in results.items():
        if "error" in result:
            print(f"{name} failed: {result['error']}")


def write_out(path: str, result: Mapping[str, Any]) -> None:
    """Hand a worker's result to the process that started it."""
    Path(path).write_text(json.dumps(result))


def forward_options(options: argparse.Namespace, *, leave_out: Sequence[str]) -> list[str]:
    """Return ``options`` as a command line again, but for those named."""
    arguments: list[str] = []
    for name, value in vars(options).items():
        if name in leave_out or value is None or value is False or value == "":
            continue
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list) else [value]
        arguments += [flag] if value is True else [flag, *map(str, values)]
    return arguments


def machine(device: str) -> dict[str, Any]:
    """Describe what the figures were measured on: processor, accelerator, versions."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "slimfit_fx", "numpy", "triton")},
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the hash of the tree's commit, with "+" behind it if files differ from it; None outside of git.

    ``BENCH_COMMIT`` goes first: a copy of the tree on another machine may have another history, or none.
    """
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        return head + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def now() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stamp(device: str, module: str) -> dict[str, Any]:
    """Return where figures come from: the command, the time, the commit, the machine."""
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": now(),
        "commit": commit(),
        "machine": machine(device),
    }


def save(name: str, document: Mapping[str, Any], *, device: str, module: str) -> Path:
    """Write ``document`` with the machine, the command and the time to ``bench/results/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**stamp(device, module), **document}, indent=1) + "\n")
    return path


def stored(name: str) -> dict[str, Any]:
    """Return what lies in ``bench/results/NAME.json``; nothing if there is no such file."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def rows_in(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of a file; one that says nothing of its commit, date or machine has those of the file."""
    whole = {key: document[key] for key in ("commit", "date", "machine") if key in document}
    return [{**whole, **row} for row in document["results"]]
