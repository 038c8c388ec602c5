"""Language modelling: a small GPT-2, pretrained here on Python's standard library, learns another library's source."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bench.accuracy.tasks.base import PERPLEXITY, Recipe, Splits, Task, for_all_seeds, remembered
from bench.accuracy.tasks.sources import PARTS, library_folder, modules, parts_of
from slimfit_fx.demo.data import Examples, batches

LIBRARY = "networkx"
VOCABULARY, LENGTH, WIDTH, LAYERS = 1024, 128, 256, 4
"""3.7 million parameters; one token stands for about three characters."""
_RECIPES = {
    "full": Recipe(epochs=3, batch=16, learning_rate=3e-4),
    "quick": Recipe(epochs=2, batch=16, learning_rate=3e-4),
}
_EXAMPLES = {
    "full": {"train": 2000, "validation": 300, "test": 600},
    "quick": {"train": 480, "validation": 120, "test": 240},
}
_PRETRAINING = {"full": 1500, "quick": 500}
"""Steps."""
_PRETRAINING_EXAMPLES, _PRETRAINING_BATCH, _PRETRAINING_RATE = 8000, 16, 1e-3


def code_task(scale: str, cache: Path) -> Task:
    """Build the task; tokenizer and pretrained weights lie in ``cache`` and are made when first asked for."""
    steps = _PRETRAINING[scale]
    tokenizer_file = cache / f"code-{VOCABULARY}.json"

    @functools.cache
    def weights() -> dict[str, Tensor]:
        path = cache / f"code-{WIDTH}x{LAYERS}-{steps}.pt"
        found: dict[str, Tensor] = remembered(path, lambda: pretrain(load_pretraining(tokenizer_file), steps))
        return found

    def make_model(seed: int) -> nn.Module:
        model = language_model(VOCABULARY, seed=seed)
        model.load_state_dict(weights())
        return model

    load = for_all_seeds(lambda: load_library(tokenizer_file, _EXAMPLES[scale]))
    title = f"a small GPT-2 that read Python's standard library learns the source of {LIBRARY}"
    return Task("code", scale, title, _RECIPES[scale], PERPLEXITY, 0.90, make_model, load)


def language_model(vocabulary: int, *, seed: int, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    """A GPT-2 with weights drawn with ``seed``; its output matrix is its own, so that it is a head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def standard_library() -> list[Path]:
    """The source files of Python's standard library."""
    return modules(Path(sysconfig.get_paths()["stdlib"]))


def tokenizer_of(path: Path, texts: Iterable[str]) -> Any:
    """The byte-level BPE tokenizer in ``path``; trained on ``texts`` and saved there if it does not exist."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def read_all(files: Sequence[Path]) -> list[str]:
    """The text of each file, less those that are not UTF-8."""
    found = []
    for path in files:
        try:
            found.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return found


def windows(texts: Iterable[str], tokenizer: Any, count: int, length: int = LENGTH) -> Examples:
    """The first ``count`` pieces of ``length`` tokens; files follow each other, each ended by token 0.

    Raises:
        ValueError: the texts are too short for one piece.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, 0]
        if len(ids) >= count * length:
            break
    whole = min(count, len(ids) // length)
    if not whole:
        raise ValueError(f"the sources give {len(ids)} tokens, fewer than one piece of {length}")
    pieces = torch.tensor(ids[: whole * length]).reshape(whole, length)
    return Examples({"input_ids": pieces}, pieces)


def load_pretraining(tokenizer_file: Path) -> Examples:
    """Pieces of the standard library, from files in random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = read_all([path for path, _ in parts_of(standard_library(), root)])
    return windows(texts, tokenizer_of(tokenizer_file, texts), _PRETRAINING_EXAMPLES)


def load_library(tokenizer_file: Path, counts: dict[str, int]) -> Splits:
    """Pieces of the other library, each part from files of its own."""
    root = library_folder(LIBRARY)
    tokenizer = tokenizer_of(tokenizer_file, read_all(standard_library()))
    files = parts_of(modules(root), root)
    return Splits(
        *(windows(read_all([path for path, own in files if own == part]), tokenizer, counts[part]) for part in PARTS)
    )


def pretrain(examples: Examples, steps: int) -> dict[str, Any]:
    """Train a language model on ``examples`` and return its weights."""
    model = language_model(VOCABULARY, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    bar = tqdm(range(steps), desc="code: pretraining on the standard library", unit="step", dynamic_ncols=True)
    for _, batch in zip(bar, batches(examples, _PRETRAINING_BATCH, seed=0), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    found: dict[str, Any] = model.state_dict()
    return found
