"""Labelled text that is on every machine: docstrings of installed libraries, read from their sources.

A module's docstrings are all for training or all for testing. The libraries' own names are blanked out, or the answer
would often be one word of the text.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from slimfit_fx.demo.data import Examples
from slimfit_fx.demo.models import minilm_folder

LIBRARIES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
"""The classes. All of them come with the extra ``text``."""
_ALIASES = ("np", "plt", "mpl", "nx", "scikit-learn", "pytorch", "hugging face", "huggingface")
_MIN_CHARACTERS = 80
_MAX_PER_MODULE = 6


def docstrings(
    libraries: Sequence[str], *, per_library: int = 400, length: int = 64, seed: int = 0
) -> tuple[Examples, Examples]:
    """Return (train, test): three quarters and one quarter of ``per_library`` docstrings of each library.

    ``input_ids`` and ``attention_mask`` are (examples, ``length``) int64, by MiniLM's tokenizer; the label is the index
    in ``libraries``.

    Raises:
        ModuleNotFoundError: one of the libraries or MiniLM's tokenizer is not installed.
    """
    folder = minilm_folder()
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, library in enumerate(libraries):
        found = _texts(library, libraries, random.Random(f"{seed} {library}"))
        wanted = {False: per_library - per_library // 4, True: per_library // 4}
        for is_test, text in found:
            if wanted[is_test] > 0:
                wanted[is_test] -= 1
                (test if is_test else train).append((text, label))
            elif not any(wanted.values()):
                break
    return _encode(train, folder, length), _encode(test, folder, length)


def _texts(library: str, blanked: Sequence[str], chance: random.Random) -> Iterator[tuple[bool, str]]:
    """Yield (is it for testing, text), modules in random order."""
    names = sorted((*blanked, *_ALIASES), key=len, reverse=True)
    name = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b", re.IGNORECASE)
    seen: set[str] = set()
    modules = _modules(library)
    chance.shuffle(modules)
    for module in modules:
        is_test = chance.random() < 0.25
        fresh = [text for text in _docstrings_of(module) if text not in seen]
        seen.update(fresh)
        for text in chance.sample(fresh, min(len(fresh), _MAX_PER_MODULE)):
            yield is_test, name.sub("library", text)


def _modules(library: str) -> list[Path]:
    """Return the source files of a library, tests left out, in a stable order. The library is not imported."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the text demo reads the docstrings of {library}: pip install 'slimfit-fx[text]'")
    root = Path(spec.origin).parent
    return sorted(path for path in root.rglob("*.py") if "test" not in path.relative_to(root).as_posix())


def _docstrings_of(module: Path) -> list[str]:
    """Return the docstrings of a source file's functions and classes, each once; none if it cannot be read."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return list(dict.fromkeys(text for text in texts if text and len(text) >= _MIN_CHARACTERS))


def _encode(labelled: Sequence[tuple[str, int]], folder: Path, length: int) -> Examples:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch([text for text, _ in labelled])
    inputs = {
        "input_ids": torch.tensor([one.ids for one in encoded]),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
    }
    return Examples(inputs, torch.tensor([label for _, label in labelled]))
