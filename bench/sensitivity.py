"""What each codec does to the gradients, kind of value by kind of value: ``python -m bench.sensitivity``.

A real model on real text (the pretrained MiniLM on docstrings of installed libraries) or real images (the demo's ViT on
scikit-learn's digits, trained for a moment first). For every kind of saved value and every codec, that kind alone is
stored by that codec and everything else is exact; the figure is the relative error of the gradient,
|g - g_exact| / |g_exact|, over all parameters together, and the largest over single units. No gate is closed, dropout
keeps its random state, so the codec is the only difference. Results go to ``bench/results/sensitivity-*.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench import report

KINDS = ("gelu_input", "attention_qkv", "attention_probs", "normalised", "linear_input", "float")
CODECS = ("int8", "int4", "int4-sr", "int2", "topk", "fixed_int8", "fixed_gelu4")
TOGETHER = ("balanced", "max", "paper")
Gradients = dict[str, Tensor]


def make_text(batch: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """MiniLM with a new classifier, and batches of docstrings (``batch``, 64 tokens)."""
    from slimfit_fx.demo.models import minilm
    from slimfit_fx.demo.text import docstrings

    libraries = ("networkx", "numpy", "sklearn", "torch")
    train, _ = docstrings(libraries, per_library=200)
    return minilm(len(libraries)), _batches(train, batch)


def make_image(batch: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The demo's ViT, and batches of digits (``batch``, 1, 8, 8)."""
    from slimfit_fx.demo.data import digits
    from slimfit_fx.demo.models import vision_transformer

    train, _ = digits()
    return vision_transformer(10), _batches(train, batch)


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


def gradients(model: nn.Module, batches: Sequence[dict[str, Tensor]], **settings: Any) -> list[Gradients]:
    """Gradients of each batch with every gate open, under ``settings``; the model is restored afterwards."""
    import slimfit_fx

    torch._dynamo.reset()
    slimfit_fx.optimize(model, scheduler="none", executor="interpreter", strict=True, **settings)
    found = []
    for number, batch in enumerate(batches):
        model.zero_grad()
        torch.manual_seed(number)
        model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    slimfit_fx.restore(model)
    return found


def errors(exact: Sequence[Gradients], found: Sequence[Gradients]) -> dict[str, float]:
    """Relative error over all parameters, and the largest of a single matrix; means over the batches."""
    whole, worst = [], []
    for want, have in zip(exact, found, strict=True):
        off = {n: (have[n] - g).norm().item() for n, g in want.items()}
        size = {n: g.norm().item() for n, g in want.items()}
        whole.append(sum(o**2 for o in off.values()) ** 0.5 / sum(s**2 for s in size.values()) ** 0.5)
        worst.append(max(off[n] / size[n] for n, g in want.items() if g.dim() > 1 and size[n] > 0))
    return {"gradient_error": sum(whole) / len(whole), "worst_unit_error": sum(worst) / len(worst)}


def variants(kinds: Sequence[str], codecs: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, codec, settings): one kind alone under one codec; then whole presets."""
    for kind in kinds:
        for codec in codecs:
            alone: dict[str, str | None] = dict.fromkeys(("float", *KINDS))
            yield kind, codec, {"preset": "balanced", "codecs": {**alone, kind: codec}}
    for preset in TOGETHER:
        yield "all", preset, {"preset": preset}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("text", "image"), default="text")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2, help="batches that the errors are averaged over")
    parser.add_argument("--warm-up", type=int, default=8, help="training steps before")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="CODEC")
    parser.add_argument("--no-save", action="store_true", help="write no result file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every variant, print the table, store the results."""
    options = parse(arguments)
    model, batches = (make_text if options.task == "text" else make_image)(options.batch)
    model.train()
    warm_up(model, batches, options.warm_up)
    chosen = batches[: options.batches]
    exact = gradients(model, chosen, preset="exact")
    rows = []
    for kind, codec, settings in variants(options.kinds, options.codecs):
        print(f"{kind}: {codec} ...", file=sys.stderr, flush=True)
        rows.append({"kind": kind, "codec": codec, **errors(exact, gradients(model, chosen, **settings))})
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    if not options.no_save:
        document = {"task": options.task, "batch": options.batch, "batches": options.batches, "rows": rows}
        path = report.save(f"sensitivity-{options.task}", document, device="cpu", module="bench.sensitivity")
        print(f"\nwritten: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
