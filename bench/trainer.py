"""The Hugging Face Trainer with and without us on a model of BERT-base's size: ``python -m bench.trainer``.

Every rival trains the same number of steps under bf16, each in a process of its own: samples per second behind the
warm-up, the peak of every step by the caching allocator's counters (allocator events are too slow for whole runs, so
this takes a GPU), by how much the worst of them grew late in the run, recompiles. Results go to
``bench/results/trainer-*``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import Dataset

from bench import report
from bench.models import Case, build_model, make_batch, make_case
from bench.time import noted_compiles

RIVALS = ("eager", "compile", "balanced", "max")
STEPS, FLAT = 200, 150
"""All steps, and the last ones, over which memory must not grow."""
_WARM_UP = 10


class _Examples(Dataset[Any]):
    """The rows of one synthetic batch, again and again."""

    def __init__(self, case: Case, count: int) -> None:
        self._batch, self._count, self._size = make_batch(case), count, case.batch

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index % self._size] for name, value in self._batch.items()}


@dataclass(frozen=True)
class Run:
    """What one rival's training showed. Peaks are of whole steps, with everything that lies on the device."""

    samples_per_s: float
    peaks: tuple[int, ...]
    """Bytes, one per step."""
    growth_bytes: int | None
    """See ``growth``."""
    recompiles: int
    first_loss: float
    last_loss: float


def growth(peaks: Sequence[int]) -> int | None:
    """Return by how much the worst of the second half of the last ``FLAT`` peaks exceeds the worst of the first half.

    Of a shorter run those behind its warm-up count; None if they are fewer than two.
    """
    last = peaks[_WARM_UP:][-FLAT:]
    half = len(last) // 2
    return max(0, max(last[half:]) - max(last[:half])) if half else None


def train(rival: str, case: Case, steps: int, freeze_rate: float) -> Run:
    """Train with the real Trainer, in this process."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Notes when steps ended, and their peaks."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.peaks: list[int] = []
            self.first = 0
            """Compilations of the first step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available() and state.global_step > 0:
                self.peaks.append(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.first = len(compiles)
            if state.global_step in (_WARM_UP, steps):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.times.append(perf_counter())
            if state.global_step == steps and torch.cuda.is_available():
                self.peaks.append(torch.cuda.max_memory_allocated())

    callbacks: list[TrainerCallback] = []
    if rival not in ("eager", "compile"):
        from slimfit_fx.integrations import SlimFitCallback

        callbacks.append(SlimFitCallback(preset=rival, freeze_rate=freeze_rate, strict=True))
    with tempfile.TemporaryDirectory() as folder, noted_compiles() as compiles:
        watch = Watch()
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=case.batch, max_steps=steps, bf16=True, learning_rate=5e-5,
            logging_steps=20, save_strategy="no", report_to=[], disable_tqdm=True, torch_compile=rival == "compile",
            use_cpu=torch.device(case.device).type == "cpu", dataloader_drop_last=True,
        )  # fmt: skip
        trainer = Trainer(
            build_model(case), arguments, callbacks=[*callbacks, watch],
            train_dataset=_Examples(replace(case, device="cpu"), case.batch * steps),
        )  # fmt: skip
        trainer.train()
        recompiles = len(compiles) - watch.first
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = case.batch * (steps - _WARM_UP) / (watch.times[1] - watch.times[0])
    return Run(rate, tuple(watch.peaks), growth(watch.peaks), recompiles, losses[0], losses[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every rival, print the table, store it."""
    parser = argparse.ArgumentParser("python -m bench.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--freeze-rate", type=float, default=0.9)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--rival", choices=RIVALS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    case = make_case("bert", layers=given.layers, batch=given.batch, length=given.length, width=given.width,
                     dtype="bf16", device=given.device)  # fmt: skip
    if given.rival:
        report.write_out(given.out, asdict(train(given.rival, case, given.steps, given.freeze_rate)))
        return 0
    passed_on = report.forward_options(given, leave_out=("rivals", "rival", "no_save", "out"))
    runs = {
        name: report.run_worker("bench.trainer", [*passed_on, "--rival", name], timeout_s=600) for name in given.rivals
    }
    print(as_table(runs))
    report.print_errors(runs)
    if not given.no_save:
        document = {"case": case.to_dict(), "steps": given.steps, "freeze_rate": given.freeze_rate, "runs": runs}
        path = report.save(f"trainer-{case.name}", document, device=given.device, module="bench.trainer")
        print(f"written: {path.name}")
    return int(any("error" in run for run in runs.values()))


def as_table(runs: Mapping[str, Mapping[str, Any]], tablefmt: str = "simple") -> str:
    """Return one line per rival."""
    lines = []
    for name, run in runs.items():
        if "error" in run:
            lines.append([name, None, None, None, None, None])
            continue
        peaks, grown = run["peaks"], run["growth_bytes"]
        sizes = [max(peaks) / 1e6, statistics.median(peaks) / 1e6] if peaks else [None, None]
        lines.append([name, run["samples_per_s"], *sizes, None if grown is None else grown / 1e6, run["recompiles"]])
    headers = ["Trainer with", "samples/s", "largest peak MB", "median peak MB", "growth MB", "recompiles"]
    return str(tabulate(lines, headers=headers, tablefmt=tablefmt, floatfmt=".1f", missingval="-"))


if __name__ == "__main__":
    sys.exit(main())
