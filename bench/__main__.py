"""All benchmarks: ``python -m bench COMMAND``; ``python -m bench`` lists them, each has its own ``--help``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "memory": ("bench.paper_table", "the paper's twelve settings, all rivals: memory, step time, recompiles"),
    "accuracy": ("bench.accuracy.__main__", "fine-tuning results, all rivals"),
    "front": ("bench.front", "memory against throughput on BERT-base and ViT-B, with plots"),
    "gpu": ("bench.gpu", "everything that a GPU can tell, in calls of a few minutes"),
    "emulated-gpu": ("bench.emulated_gpu.__main__", "run Python on a GPU that computes nothing: memory, without a GPU"),
    "report": ("bench.render", "write README's tables and docs/results.md from bench/results/*.json"),
    "smoke": ("bench.smoke", "step peaks and recompiles of a small BERT, with hard bounds"),
    "step-peak": ("bench.memory", "step peak of one model, all presets"),
    "time": ("bench.time", "step time, compile time and recompiles of one model"),
    "host-time": ("bench.host_time", "how long a process needs to issue a step to a GPU, on an emulated one"),
    "profile": ("bench.profile", "where the time of a step goes"),
    "peak": ("bench.peak", "predicted against measured peaks"),
    "levels": ("bench.levels", "levels of recompute: expected peaks against those of Inductor's code"),
    "budget": ("bench.budget", "accepted budgets against what steps then take"),
    "lossless": ("bench.lossless", "recompute without loss against activation_memory_budget and checkpointing"),
    "schedule": ("bench.schedule", "what choosing the open units costs"),
    "sensitivity": ("bench.sensitivity", "error of each codec for each kind of value"),
    "plan-big": ("bench.plan_big", "time and host memory of planning big models"),
    "suite": ("bench.suite", "the single-model benchmarks on a list of cases"),
}
"""Command -> (module with a ``main(arguments)``, what it does)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named first with the rest of the arguments; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n" + "\n".join(f"  {name:12} {what}" for name, (_, what) in COMMANDS.items()))
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"python -m bench: unknown command: got {name!r}; legal: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    try:
        run = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # something that the benchmark itself needs
        print(f"python -m bench {name}: {module} is not part of this tree", file=sys.stderr)
        return 2
    return int(run(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
