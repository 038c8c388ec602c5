"""What codecs cost in accuracy: the relative error of the gradient, by kind of value and codec, as it was measured.

``sensitivity.json`` beside this file is written by ``python -m bench.sensitivity --table``: for each task that was
measured, each kind and each codec, |g - g_exact| / |g_exact| when that kind alone is stored so. Several kinds together
are expected to come to the root of the sum of squares, as independent errors do::

    {"gelu_input": "int4", "normalised": "int8"}  ->  sqrt(0.065**2 + 0.018**2) = 0.067

``block_input`` takes the place of the others where whole blocks are computed again: the worse of the two is expected.
A kind counts with the largest error of all tasks. It is an expectation for models like those that were measured and no
promise for any other.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from slimfit_fx.presets import BLOCK_INPUT, PARTS, WHOLE_OF, told_apart

CodecMap = Mapping[str, str | None]
"""Kind of value -> name of its codec, or None: kept as it is."""
_MILDER: tuple[str | None, ...] = ("int4", "int8", None)
"""What stands in for a codec whose error is too large: the first of these whose measured error is smaller."""


@dataclass(frozen=True)
class Measured:
    """One kind alone under one codec, on one task."""

    task: str
    kind: str
    codec: str
    gradient_error: float
    """|g - g_exact| / |g_exact| over all parameters."""
    bytes_before: int
    """Of the values of that kind, as they are."""
    bytes_after: int
    """Encoded."""
    recompute_price: float = 1.0
    """Where a kind is usually computed again, a price at which it was stored all the same."""


@dataclass(frozen=True)
class Table:
    """What was measured. ``kinds``: those that a planner tells apart and that can be lossy."""

    rows: tuple[Measured, ...]

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were measured."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        """What they were measured on."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    @functools.cached_property
    def _errors(self) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for row in self.rows:
            found[row.kind, row.codec] = max(row.gradient_error, found.get((row.kind, row.codec), 0.0))
        return found

    def error_of(self, kind: str, codec: str | None) -> float | None:
        """The largest error of any task; 0 where nothing is lost; None where nobody knows."""
        if codec is None or not self.knows(kind) or _is_lossless(codec):
            return 0.0
        return self._errors.get((measured_as(kind), codec))

    def knows(self, kind: str) -> bool:
        """Whether ``kind`` was measured, or what it is a part of."""
        return measured_as(kind) in self.kinds

    def codecs_of(self, kind: str) -> tuple[str, ...]:
        """The codecs whose error is known for ``kind``."""
        return tuple(codec for known, codec in self._errors if known == measured_as(kind))

    def bytes_of(self, kind: str, codec: str | None) -> float:
        """Bytes that the values of ``kind`` take under ``codec``, all tasks together."""
        kind = measured_as(kind)
        before = sum(self._largest(task, kind) for task in self.tasks)
        same = [row for row in self.rows if (row.kind, row.codec) == (kind, codec)]
        return before * (sum(r.bytes_after for r in same) / sum(r.bytes_before for r in same) if same else 1.0)

    def error_in(self, kind: str, codec: str, share: float) -> float | None:
        """The error to expect where values of ``kind`` are this share of all bytes that are saved.

        Squares of errors add up value by value, so a smaller share than on a measured task means less. None where
        nobody knows.
        """
        if kind == BLOCK_INPUT or self.error_of(kind, codec) in (None, 0.0):
            return self.error_of(kind, codec)  # few bytes, from which all of a block is computed
        found = [(r.task, r.gradient_error) for r in self.rows if (r.kind, r.codec) == (kind, codec)]
        return max(error * math.sqrt(min(1.0, share / self._share(task, kind))) for task, error in found)

    def _share(self, task: str, kind: str) -> float:
        apart = {*WHOLE_OF, BLOCK_INPUT}  # counted with what they are a part of, or stand for
        whole = sum(self._largest(task, each) for each in self.kinds if each not in apart)
        return self._largest(task, kind) / whole

    def _largest(self, task: str, kind: str) -> int:
        """The bytes of ``kind`` as they are."""
        return max((r.bytes_before for r in self.rows if (r.task, r.kind) == (task, kind)), default=0)


def measured_as(kind: str) -> str:
    """The kind that was measured for ``kind``: for the part of units all of it, which loses no less."""
    whole = WHOLE_OF.get(kind, kind)
    return whole if whole != kind and kind == PARTS[whole][1] else kind


def read_table(data: Mapping[str, Any]) -> Table:
    """The table of a file that ``bench.sensitivity`` wrote."""
    return Table(tuple(Measured(**row) for row in data["rows"]))


@functools.cache
def known() -> Table:
    """The table that comes with this package."""
    return read_table(json.loads(resources.files(__package__).joinpath("sensitivity.json").read_text("utf-8")))


def expected_error(codecs: CodecMap, table: Table | None = None) -> float | None:
    """The relative gradient error to expect of ``codecs``; None if one of them was never measured."""
    return _worst_level(codecs, table or known())[0]


def _worst_level(codecs: CodecMap, table: Table) -> tuple[float | None, CodecMap]:
    """(error to expect, the codecs that lead to it): either of block inputs, or of all others."""
    apart = told_apart(codecs)
    blocks = {kind: codec for kind, codec in apart.items() if kind == BLOCK_INPUT}
    levels = blocks, {kind: codec for kind, codec in apart.items() if kind != BLOCK_INPUT}
    found = [(combine(table.error_of(*each) for each in level.items()), level) for level in levels]
    return max(found, key=lambda each: math.inf if each[0] is None else each[0])


def expected_of(stored: Mapping[tuple[str, str | None], int], table: Table | None = None) -> float | None:
    """The error to expect of a plan; None if one of its codecs was never measured.

    ``stored``: (kind, codec or None) -> bytes of those values as they are. Where a kind has several codecs, the one
    that loses most counts for all of it.
    """
    table = table or known()
    kinds = {
        kind: sum(size for (k, _), size in stored.items() if k == kind) for kind, _ in stored if kind in table.kinds
    }
    total = max(1, sum(kinds.values()))

    def error(kind: str) -> float | None:
        found = [table.error_in(kind, codec, kinds[kind] / total) for k, codec in stored if k == kind and codec]
        return None if None in found else max((e for e in found if e is not None), default=0.0)

    return combine(map(error, kinds))


def combine(errors: Iterable[float | None]) -> float | None:
    """The root of the sum of squares; None if one is not known."""
    found = list(errors)
    return None if None in found else math.sqrt(sum(error**2 for error in found if error is not None))


def make_milder(codecs: CodecMap, bound: float, table: Table | None = None) -> dict[str, str | None]:
    """The codecs of the known kinds, others than in ``codecs`` where the expected error is beyond ``bound``.

    Step by step the kind changes whose error costs most per byte that it saves. No kind gets a codec that loses more
    than its own, and in the end everything may be kept as it is.

    Raises:
        ValueError: the error of one of ``codecs`` was never measured.
    """
    table = table or known()
    chosen = {kind: codec for kind, codec in told_apart(codecs).items() if table.knows(kind)}
    while (found := _worst_level(chosen, table))[0] is None or found[0] > bound:
        if found[0] is None:
            raise ValueError("; ".join(describe_unmeasured(chosen, table)))
        kind, milder = _dearest(found[1], lambda kind: _next_milder(kind, chosen[kind], table), table)
        chosen[kind] = milder
    alike = [part for part in WHOLE_OF if part in codecs and part not in chosen and WHOLE_OF[part] in chosen]
    return chosen | {part: chosen[WHOLE_OF[part]] for part in alike}


def maps_between(lower: CodecMap, upper: CodecMap, table: Table | None = None) -> list[dict[str, str | None]]:
    """The maps of measured kinds on the way from ``upper`` to ``lower``, without those two, least error first.

    Each step gives one kind the codec that it has in ``lower``, the one whose error costs most per byte that it saves.
    """
    table, found = table or known(), list[dict[str, str | None]]()
    apart = told_apart(upper).keys() | told_apart(lower).keys()
    chosen = {kind: codec for kind, codec in upper.items() if table.knows(kind) and kind in apart}

    def towards(kind: str) -> str | None:
        return lower[kind] if _loses_less(table, kind, lower[kind], chosen[kind]) else chosen[kind]

    while any(towards(kind) != chosen[kind] for kind in chosen):
        kind, milder = _dearest(chosen, towards, table)
        chosen[kind] = milder
        found.append(dict(chosen))
    return found[-2::-1]


def held_bytes(codecs: CodecMap) -> float:
    """What all values of the measured tasks would take."""
    table = known()
    return sum(table.bytes_of(kind, codec) for kind, codec in told_apart(codecs).items() if kind in table.kinds)


def describe_unmeasured(codecs: CodecMap, table: Table | None = None) -> list[str]:
    """A sentence for each of ``codecs`` whose error was never measured."""
    table = table or known()
    return [
        f"the error of {codec!r} for {kind!r} was never measured: known are {sorted(table.codecs_of(kind))}"
        for kind, codec in told_apart(codecs).items()
        if table.error_of(kind, codec) is None
    ]


def loses_less(kind: str, codec: str | None, than: str | None) -> bool:
    """Whether values of ``kind`` are known to lose less under ``codec``."""
    return _loses_less(known(), kind, codec, than)


def _loses_less(table: Table, kind: str, codec: str | None, than: str | None) -> bool:
    ours, theirs = table.error_of(kind, codec), table.error_of(kind, than)
    return ours is not None and theirs is not None and ours < theirs


def _next_milder(kind: str, codec: str | None, table: Table) -> str | None:
    return next((milder for milder in _MILDER if _loses_less(table, kind, milder, codec)), codec)


def _dearest(codecs: CodecMap, instead: Callable[[str], str | None], table: Table) -> tuple[str, str | None]:
    """(kind, what it gets instead): of all kinds that would get something else, that which costs most per byte."""

    def cost(kind: str) -> float:
        new, old = instead(kind), codecs[kind]
        gained = (table.error_of(kind, old) or 0.0) ** 2 - (table.error_of(kind, new) or 0.0) ** 2
        given_up = table.bytes_of(kind, new) - table.bytes_of(kind, old)
        return gained / given_up if given_up > 0 else math.inf

    kind = max((kind for kind in codecs if instead(kind) != codecs[kind]), key=cost)
    return kind, instead(kind)


def _is_lossless(codec: str) -> bool:
    from slimfit_fx.codecs import codec_names, get_codec  # not at the top: codecs pull in torch operators

    return codec in codec_names() and get_codec(codec).lossless
