"""Wording of "unknown name" errors: the value, what exists, the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(value: object, options: Iterable[str], *, count: int = 3) -> tuple[str, ...]:
    """Return up to ``count`` of ``options`` that look most like ``value``, best first (case is ignored)."""
    by_lower: dict[str, str] = {}
    for option in options:
        by_lower.setdefault(option.lower(), option)
    found = difflib.get_close_matches(str(value).lower(), list(by_lower), n=count, cutoff=0.5)
    return tuple(by_lower[name] for name in found)


def did_you_mean(value: object, options: Iterable[str], *, count: int = 1) -> str:
    """Return ``" (did you mean 'x'?)"``, or an empty string when nothing is near."""
    found = nearest(value, options, count=count)
    return f" (did you mean {' or '.join(repr(name) for name in found)}?)" if found else ""


def unknown(what: str, value: object, options: Iterable[str]) -> str:
    """Return the message for an unknown name: what it is, the value, the legal ones, the nearest."""
    legal = sorted(options)
    return f"{what} must be one of {legal}, got {value!r}{did_you_mean(value, legal)}"
