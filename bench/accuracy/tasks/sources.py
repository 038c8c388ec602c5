"""Installed libraries as data: their modules, split so that no file is on two sides, and what their functions say."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PARTS = ("train", "validation", "test")
SHARES = (0.6, 0.15, 0.25)
"""Of the modules."""
MIN_CHARACTERS, MAX_CHARACTERS = 60, 600
"""Shorter docstrings say too little; what stands behind the first 600 characters is beyond every length used here."""


@dataclass(frozen=True)
class Documented:
    """A function or method with its docstring."""

    module: str
    """Path of its file."""
    part: str
    """The part of the data that this file belongs to."""
    signature: str
    docstring: str


def library_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed, or has no folder.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"this task reads the sources of {name}, which is not installed: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def modules(root: Path) -> list[Path]:
    """The source files under ``root`` in a stable order, tests and installed packages left out."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if "test" not in (inside := path.relative_to(root).as_posix()) and "site-packages" not in inside
    )


def parts_of(files: Sequence[Path], root: Path, seed: int = 0) -> list[tuple[Path, str]]:
    """Give each file a part of the data, by its path and ``seed`` alone, and return them in random order."""
    chance = random.Random(seed)
    shuffled = sorted(files)
    chance.shuffle(shuffled)
    return [(path, _part(random.Random(f"{seed} {path.relative_to(root).as_posix()}").random())) for path in shuffled]


def _part(fraction: float) -> str:
    for part, share in zip(PARTS, SHARES, strict=True):
        if fraction < share:
            return part
        fraction -= share
    return PARTS[-1]


def documented(library: str, *, per_module: int, seed: int = 0) -> Iterator[Documented]:
    """Yield the documented functions of a library, at most ``per_module`` of a file, each docstring once."""
    root = library_folder(library)
    seen: set[str] = set()
    for path, part in parts_of(modules(root), root, seed):
        fresh = [(signature, text) for signature, text in functions_of(path) if text not in seen]
        seen.update(text for _, text in fresh)
        chosen = random.Random(f"{seed} {path.name}").sample(fresh, min(len(fresh), per_module))
        for signature, text in chosen:
            yield Documented(str(path), part, signature, text)


def functions_of(path: Path) -> list[tuple[str, str]]:
    """(signature, docstring) of each function in a file; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                found.setdefault(text[:MAX_CHARACTERS], f"def {node.name}({_arguments(node)})")
    return [(signature, text) for text, signature in found.items()]


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The names of the arguments; defaults and annotations say little and are long."""
    given = node.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return ", ".join(name for name in names if name not in ("self", "cls"))


def blank_names(text: str, names: Sequence[str]) -> str:
    """``text`` with each of ``names``, as a whole word, replaced by ``library``."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(map(re.escape, longest_first))})\b", "library", text, flags=re.IGNORECASE)
