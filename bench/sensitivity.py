"""What each codec does to the gradients, kind of value by kind of value: ``python -m bench.sensitivity``.

Three tasks: the pretrained MiniLM on docstrings of installed libraries (``text``), the demo's ViT on scikit-learn's
digits (``image``), and a small Llama, whose gated MLP and RMSNorm the others lack, on the same docstrings (``llama``);
the last two are trained for a moment first. For every kind of saved value and every codec, that kind alone is stored by
that codec and everything else is exact; the figure is the relative error of the gradient, |g - g_exact| / |g_exact|,
over all parameters together, and the largest over single units. No gate is closed, dropout keeps its random state, so
the codec is the only difference. Where a kind would be computed again and not stored, computing again is made dear
(``recompute_price`` in the row). Results go to ``bench/results/sensitivity-*.json``.

``python -m bench.sensitivity --table`` measures nothing: it writes ``slimfit_fx/planning/sensitivity.json``, which the
package reads, from all result files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench import report
from slimfit_fx.presets import BLOCK_INPUT, WHOLE_OF

KINDS = (
    *("gelu_input", "gelu_input_static", "attention_qkv", "attention_probs", "normalised", "normalised_static"),
    *("linear_input", "float", "block_input"),
)
CODECS = ("int8", "int8-sr", "int4", "int4-sr", "int2", "int2-sr")
ONLY_FOR = {
    "gelu_input": ("fixed_gelu4",),
    "attention_qkv": ("fixed_int8",),
    "attention_probs": ("fixed_uint8",),
    "normalised": ("topk",),
    "normalised_static": ("topk",),
    "linear_input": ("fixed_int8",),
}
"""Formats that were made for one kind: their ranges are those of its values."""


def _milder(*kinds: str) -> dict[str, str | None]:
    """``max`` with these kinds and any other float at eight bits; the rest has to be named, or it would go with it."""
    fours = dict.fromkeys(("gelu_input", "attention_qkv", "linear_input"), "int4")
    return {**fours, "float": "int8", **dict.fromkeys(kinds, "int8")}


TOGETHER: dict[str, dict[str, Any]] = {
    "balanced": {"preset": "balanced"},
    "max": {"preset": "max"},
    "paper": {"preset": "paper"},
    "balanced, blocks": {"preset": "balanced", "recompute": "blocks"},
    "max, blocks": {"preset": "max", "recompute": "blocks"},
    "max, normalised int8": {"preset": "max", "codecs": {"normalised": "int8"}},
    "max, normalised and float int8": {"preset": "max", "codecs": _milder("normalised")},
    "max, normalised, float and gelu_input int8": {"preset": "max", "codecs": _milder("normalised", "gelu_input")},
}
"""Several kinds at once, to hold the rule that combines single kinds against."""
DEAR = 1000.0
"""A ``recompute_price`` at which next to nothing is computed again."""
TABLE = report.ROOT / "slimfit_fx" / "planning" / "sensitivity.json"
_LIBRARIES = ("networkx", "numpy", "sklearn", "torch")
Gradients = dict[str, Tensor]


def make_text(batch: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """MiniLM with a new classifier, and batches of docstrings (``batch``, 64 tokens)."""
    from slimfit_fx.demo.models import minilm

    return minilm(len(_LIBRARIES)), _docstrings(batch)


def make_llama(batch: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A Llama of 4 layers, width 192, with a classifier, and the batches of ``make_text``."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512}
    config = LlamaConfig(vocab_size=30522, pad_token_id=0, num_labels=len(_LIBRARIES), **sizes)
    config.problem_type = "single_label_classification"
    return LlamaForSequenceClassification(config), _docstrings(batch)


def make_image(batch: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The demo's ViT, and batches of digits (``batch``, 1, 8, 8)."""
    from slimfit_fx.demo.data import digits
    from slimfit_fx.demo.models import vision_transformer

    train, _ = digits()
    return vision_transformer(10), _batches(train, batch)


TASKS: dict[str, Callable[[int], tuple[nn.Module, list[dict[str, Tensor]]]]] = {
    "text": make_text,
    "image": make_image,
    "llama": make_llama,
}


def _docstrings(batch: int) -> list[dict[str, Tensor]]:
    from slimfit_fx.demo.text import docstrings

    train, _ = docstrings(_LIBRARIES, per_library=200)
    return _batches(train, batch)


def _batches(examples: Any, batch: int) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(0))
    return [
        {**{k: v[rows] for k, v in examples.inputs.items()}, "labels": examples.labels[rows]}
        for rows in order.split(batch)
        if len(rows) == batch
    ]


def warm_up(model: nn.Module, batches: Sequence[dict[str, Tensor]], steps: int) -> None:
    """Train for a moment, so that weights and gradients are those of a run and not of a start."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for number in range(steps):
        model(**batches[number % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(model: nn.Module, batches: Sequence[dict[str, Tensor]], **settings: Any) -> tuple[list[Gradients], Any]:
    """Gradients of each batch with every gate open, under ``settings``, and the plan.

    The model is restored afterwards.
    """
    import slimfit_fx

    torch._dynamo.reset()
    slimfit_fx.optimize(model, scheduler="none", executor="interpreter", strict=True, **settings)
    found = []
    for number, batch in enumerate(batches):
        model.zero_grad()
        torch.manual_seed(number)
        model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plan = slimfit_fx.session(model).plan
    slimfit_fx.restore(model)
    return found, plan


def errors(exact: Sequence[Gradients], found: Sequence[Gradients]) -> dict[str, float]:
    """Relative error over all parameters, and the largest of a single matrix; means over the batches."""
    whole, worst = [], []
    for want, have in zip(exact, found, strict=True):
        off = {n: (have[n] - g).norm().item() for n, g in want.items()}
        size = {n: g.norm().item() for n, g in want.items()}
        whole.append(sum(o**2 for o in off.values()) ** 0.5 / sum(s**2 for s in size.values()) ** 0.5)
        worst.append(max(off[n] / size[n] for n, g in want.items() if g.dim() > 1 and size[n] > 0))
    return {"gradient_error": sum(whole) / len(whole), "worst_unit_error": sum(worst) / len(worst)}


def stored_bytes(rows: Sequence[Any], kind: str, codec: str) -> dict[str, int]:
    """What the values of ``kind`` that ``codec`` stores take as they are, and encoded.

    A static part, which is stored beside the rest, counts for itself.
    """
    chosen = [row for row in rows if row.kind == kind and row.codec == codec]
    after = sum(r.bytes_closed if kind in WHOLE_OF else r.bytes_open for r in chosen)
    return {"bytes_before": sum(r.bytes_before for r in chosen), "bytes_after": after}


def alone(kind: str, codec: str) -> dict[str, Any]:
    """Settings under which ``kind`` is stored by ``codec`` and everything else as it is."""
    nothing: dict[str, str | None] = dict.fromkeys(("float", *KINDS))
    level = "blocks" if kind == BLOCK_INPUT else "cheap"
    return {"preset": "balanced", "codecs": {**nothing, kind: codec}, "recompute": level}


def measure(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], kinds: Sequence[str], codecs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each kind under each codec, if the codec can store it; then those of several kinds at once."""
    exact, _ = gradients(model, batches, preset="exact")
    for kind in kinds:
        prices = [1.0, DEAR]
        for codec in (*codecs, *ONLY_FOR.get(kind, ())):
            found, stored = [], {"bytes_before": 0}
            while not stored["bytes_before"] and prices:
                found, plan = gradients(model, batches, **alone(kind, codec), recompute_price=prices[0])
                stored = stored_bytes(plan.rows, kind, codec)
                prices = prices if stored["bytes_before"] else prices[1:]
            if not prices:
                print(f"{kind}: none of this model is ever stored", file=sys.stderr, flush=True)
                break
            yield {"kind": kind, "codec": codec, **errors(exact, found), "recompute_price": prices[0], **stored}
    for name, settings in TOGETHER.items():
        found, plan = gradients(model, batches, **settings)
        yield {"kind": "all", "codec": name, **errors(exact, found), "expected": plan.expected_gradient_error}


def table_of(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the package keeps of the result files: per task where its figures are from, and rows."""
    columns = ("gradient_error", "bytes_before", "bytes_after", "recompute_price")
    singles = [(d["task"], row) for d in documents for row in d["rows"] if row["kind"] != "all"]
    together = [(d["task"], row) for d in documents for row in d["rows"] if row["kind"] == "all"]
    return {
        "what": "relative error of the gradient when one kind of saved value alone is stored by one codec",
        "tasks": [
            {
                **{key: d[key] for key in ("task", "command", "date", "batch", "batches")},
                "versions": d["machine"]["versions"],
            }
            for d in documents
        ],
        "rows": [
            {"task": task, "kind": row["kind"], "codec": row["codec"], **{name: row[name] for name in columns}}
            for task, row in singles
        ],
        "together": [
            {"task": task, "name": row["codec"], "gradient_error": row["gradient_error"]} for task, row in together
        ],
    }


def write_table(folder: Path, target: Path) -> None:
    """Write the package's table from the result files in ``folder``."""
    paths = sorted(folder.glob("sensitivity-*.json"))
    table = table_of([json.loads(path.read_text()) for path in paths])
    head = json.dumps({key: table[key] for key in ("what", "tasks")}, indent=1).removesuffix("\n}")
    lines = [
        f'\n "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in table[key]) + "\n ]"
        for key in ("rows", "together")
    ]
    target.write_text(",".join([head, *lines]) + "\n}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=tuple(TASKS), default="text")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2, help="batches that the errors are averaged over")
    parser.add_argument("--warm-up", type=int, default=8, help="training steps before")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), metavar="KIND", help="none: presets only")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="CODEC", help="and those of a kind")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the package's table from results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every variant, print the table, store the results."""
    options = parse(arguments)
    if options.table:
        write_table(report.RESULTS, TABLE)
        print(f"written: {TABLE.relative_to(report.ROOT)}")
        return 0
    model, batches = TASKS[options.task](options.batch)
    model.train()
    warm_up(model, batches, options.warm_up)
    rows = []
    for row in measure(model, batches[: options.batches], options.kinds, options.codecs):
        print(f"{row['kind']}: {row['codec']} {row['gradient_error']:.4f}", file=sys.stderr, flush=True)
        rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    if not options.no_save:
        document = {"task": options.task, "batch": options.batch, "batches": options.batches, "rows": rows}
        path = report.save(f"sensitivity-{options.task}", document, device="cpu", module="bench.sensitivity")
        print(f"\nwritten: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
