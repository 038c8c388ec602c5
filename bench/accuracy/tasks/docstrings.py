"""Text: the pretrained MiniLM on the documented functions of installed libraries.

``docstrings``: which library is this docstring from? ``pairs``: does this docstring belong to this signature, or to
another function of the same module?
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench.accuracy.tasks.base import ACCURACY, Recipe, Splits, Task, for_all_seeds
from bench.accuracy.tasks.sources import PARTS, Documented, blank_names, documented
from slimfit_fx.demo.data import Examples
from slimfit_fx.demo.models import minilm, minilm_folder

LIBRARIES = (
    "lightning", "matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip
_ALIASES = (
    "np",
    "plt",
    "mpl",
    "nx",
    "pd",
    "scikit-learn",
    "pytorch",
    "pytorch lightning",
    "hugging face",
    "huggingface",
)
_PER_MODULE = 24


@dataclass(frozen=True)
class Size:
    """How many examples, in all libraries together, and how many tokens of each."""

    counts: Mapping[str, int]
    length: int


FULL_SIZE = {"train": 5000, "validation": 1200, "test": 2400}
QUICK_SIZE = {"train": 1280, "validation": 400, "test": 1000}
_SIZES = {
    "docstrings": {
        "full": Size(FULL_SIZE, 48),
        "quick": Size(QUICK_SIZE, 32),
    },
    "pairs": {
        "full": Size(FULL_SIZE, 64),
        "quick": Size(QUICK_SIZE, 48),
    },
}
_RECIPES = {
    "full": Recipe(epochs=3, batch=32, learning_rate=1e-4),
    "quick": Recipe(epochs=2, batch=8, learning_rate=1e-4),
}
Text = tuple[str, ...]
"""One text, or the two of a pair."""


def docstrings_task(scale: str, cache: Path) -> Task:
    """Which of ten libraries is it from? Their names are blanked out."""
    size = _SIZES["docstrings"][scale]
    load = for_all_seeds(lambda: _load(_labelled, size))
    title = f"which of {len(LIBRARIES)} libraries is this docstring from? MiniLM"
    model = functools.partial(_model, len(LIBRARIES))
    return Task("docstrings", scale, title, _RECIPES[scale], ACCURACY, 0.90, model, load)


def pairs_task(scale: str, cache: Path) -> Task:
    """Does the docstring belong to the signature? Half of the pairs do."""
    size = _SIZES["pairs"][scale]
    load = for_all_seeds(lambda: _load(_paired, size))
    title = "does this docstring belong to this signature? MiniLM"
    return Task("pairs", scale, title, _RECIPES[scale], ACCURACY, 0.90, functools.partial(_model, 2), load)


def _model(labels: int, seed: int) -> torch.nn.Module:
    return minilm(labels, seed=seed)


def _load(examples_of: object, size: Size) -> Splits:
    """Take as many examples of each library for each part, and encode them."""
    assert callable(examples_of)
    texts: dict[str, list[tuple[Text, int]]] = {part: [] for part in PARTS}
    for label, library in enumerate(tqdm(LIBRARIES, desc="reading sources", leave=False, dynamic_ncols=True)):
        quotas = {part: count // len(LIBRARIES) for part, count in size.counts.items()}
        for part, text, own_label in examples_of(documented(library, per_module=_PER_MODULE), label):
            if quotas[part] > 0:
                quotas[part] -= 1
                texts[part].append((text, own_label))
            elif not any(quotas.values()):
                break
    return Splits(*(encode(texts[part], size.length) for part in PARTS))


def _labelled(found: Iterator[Documented], label: int) -> Iterator[tuple[str, Text, int]]:
    """(part, docstring without names, library)."""
    names = (*LIBRARIES, *_ALIASES)
    for one in found:
        yield one.part, (blank_names(one.docstring, names),), label


def _paired(found: Iterator[Documented], label: int) -> Iterator[tuple[str, Text, int]]:
    """(part, (signature, docstring), whether they belong together), the two kinds in turn."""
    for _, in_module in groupby(found, key=lambda one: one.module):
        yield from pairs_of(list(in_module))


def pairs_of(in_module: Sequence[Documented]) -> Iterator[tuple[str, Text, int]]:
    """Pair the functions of one module: each second one with the docstring of the one before it, the others rightly.

    Of an odd number, the last is left out; so both labels are equally frequent in every part of the data.
    """
    for first, second in zip(in_module[::2], in_module[1::2], strict=False):
        yield first.part, (first.signature, first.docstring), 1
        yield second.part, (second.signature, first.docstring), 0


def encode(labelled: Sequence[tuple[Text, int]], length: int) -> Examples:
    """Texts by MiniLM's tokenizer, cut and padded to ``length`` tokens: int64 (examples, length) each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch([text if len(text) > 1 else text[0] for text, _ in labelled])
    inputs = {
        "input_ids": torch.tensor([one.ids for one in encoded]),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
        "token_type_ids": torch.tensor([one.type_ids for one in encoded]),
    }
    return Examples(inputs, torch.tensor([label for _, label in labelled]))
