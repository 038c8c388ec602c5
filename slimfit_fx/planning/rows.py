"""The memory plan as data: one row per value that crosses from forward to backward, one per unit, and their totals.

Formatting lives in ``table.py``. All sizes are bytes; a symbolic size counts with the size it was traced with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimfit_fx.planning.peak import PeakForecast
from slimfit_fx.planning.sensitivity import expected_of
from slimfit_fx.planning.timeline import Timeline
from slimfit_fx.presets import WHOLE_OF

WHOLE = "whole"


@dataclass(frozen=True)
class PlanRow:
    """One value that backward needs. ``gates`` names the units that read it (none: static, read whatever is frozen)."""

    graph: int
    name: str
    module: str
    op: str
    kind: str
    dynamic: bool
    gates: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    decision: str
    """``keep``, ``codec``, ``recompute``; with ``+gate`` when it is dropped while all its gates are closed."""
    codec: str | None
    reason: str
    bytes_before: int
    """As it is, uncompressed."""
    bytes_open: int
    """Held between forward and backward when a gate is open (or the value is static)."""
    bytes_closed: int
    """Held when all its gates are closed."""
    beside: str | None = None
    """How it is stored as well, for its gates: a codec, or ``WHOLE``. What ``codec`` stores is then always held."""


@dataclass(frozen=True)
class UnitRow:
    """One freezable unit: did it get a gate, and if not why."""

    name: str
    numel: int
    grad_bytes: int
    gated: bool
    reason: str


@dataclass(frozen=True)
class Totals:
    """Bytes by kind.

    ``torch_compile_saved`` is what plain torch.compile saves for the same graphs; None when not compared.
    """

    parameters: int
    gradients_open: int
    gradients_expected: int
    optimizer_state: int
    saved_before: int
    saved_open: int
    saved_closed: int
    saved_expected: int
    torch_compile_saved: int | None


@dataclass(frozen=True)
class ExpectedTime:
    """Milliseconds by the device's roofline, rounded (prices.py); of a step with gates closed by their chance."""

    again_ms: float
    """For operators that forward ran and backward runs again."""
    codecs_ms: float
    """For encoding and decoding."""
    spared_ms: float
    """Of matrix products that only closed units need."""

    def __add__(self, other: ExpectedTime) -> ExpectedTime:
        """That of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return ExpectedTime(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Faster:
    """A level of recompute that was not taken because it saves more: what it would cost, and spare."""

    recompute: str
    more_bytes: int
    """At the peak of backward, expected, beyond what the level that was taken has there."""
    less_ms: float
    """By the device's roofline, of recompute and codecs."""
    gradient_error: float
    """The relative gradient error to expect of its codecs; 0 where that is not known."""


@dataclass(frozen=True)
class GraphPlan:
    """The plan of one captured graph; gates are numbers (a graph names no layer) until ``merge_plans`` names them."""

    rows: tuple[PlanRow, ...]
    refusals: tuple[tuple[str, str], ...]
    gated: tuple[int, ...]
    """Gates whose gradient sits behind a branch."""
    torch_compile_saved: int | None = None
    fallback: str | None = None
    """Why the graph was left as it was, if it was."""
    note: str | None = None
    """What a user should know of how it was planned."""
    time: ExpectedTime | None = None
    """What recompute and codecs cost and closed units spare; None where nothing was planned."""
    blocks: int = 0
    """How many repeated blocks were found; 0 also where nobody looked, since only cheap work runs again."""
    faster: Faster | None = None
    """What ``recompute="auto"`` left for less memory; None if it took the fastest level."""
    gate_bytes: tuple[int, ...] = ()
    """Of the gradients of what each gate freezes; empty if that is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphPlan:
        """The plan that ``to_dict`` described, also after a trip through JSON."""
        rows = tuple(PlanRow(**{**r, "gates": tuple(r["gates"]), "shape": tuple(r["shape"])}) for r in data["rows"])
        return cls(
            rows,
            tuple((a, b) for a, b in data["refusals"]),
            tuple(data["gated"]),
            data["torch_compile_saved"],
            data["fallback"],
            data["note"],
            None if data["time"] is None else ExpectedTime(**data["time"]),
            data["blocks"],
            None if data["faster"] is None else Faster(**data["faster"]),
            tuple(data.get("gate_bytes", ())),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """What is done with every saved value of one training step, and why.

    ``print(plan)`` shows it as a table, ``_repr_html_`` as HTML; ``to_dict``/``to_json`` give all of it as data.
    """

    rows: tuple[PlanRow, ...]
    units: tuple[UnitRow, ...]
    preset: str
    freeze_rate: float
    parameter_bytes: int
    optimizer_bytes: int
    torch_compile_saved: int | None = None
    refusals: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())
    peak: PeakForecast | None = None
    """The physical peak of the step, from the compiled code; None if it is not known, see ``peak_unknown``."""
    peak_unknown: str = ""
    timeline: Timeline | None = None
    """The worst step: bytes over time, and who is alive at its peak."""
    before: Timeline | None = None
    """The same step under plain torch.compile, if it was compared."""
    before_unknown: str = ""
    expected_gradient_error: float | None = None
    """Relative error of the gradient to expect of the codecs in use (sensitivity.py); None if it is not known."""
    time: ExpectedTime | None = None
    """What recompute and codecs are expected to cost, and closed units to spare, in all graphs."""
    faster: Faster | None = None
    """What ``recompute="auto"`` left for less memory, in all graphs; None if it took the fastest level."""

    def with_comparison(self, before: Timeline | str) -> MemoryPlan:
        """The same plan with plain torch.compile's step beside it, or the reason why that is not known."""
        if isinstance(before, str):
            return dataclasses.replace(self, before_unknown=before)
        return dataclasses.replace(self, before=before)

    def totals(self) -> Totals:
        """Sum the rows. *expected*: each unit open with probability ``1 - freeze_rate``."""
        open_share = 1.0 - self.freeze_rate
        grads = sum(u.grad_bytes for u in self.units)
        expected = sum(_expected(r, self.freeze_rate) for r in self.rows)
        return Totals(
            self.parameter_bytes,
            grads,
            round(grads * open_share),
            self.optimizer_bytes,
            sum(r.bytes_before for r in self.rows),
            sum(r.bytes_open for r in self.rows),
            sum(r.bytes_closed for r in self.rows),
            round(expected),
            self.torch_compile_saved,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dictionaries and lists."""
        return {**dataclasses.asdict(self), "totals": dataclasses.asdict(self.totals())}

    def to_json(self, *, indent: int | None = None) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        from slimfit_fx.planning.table import format_plan

        return format_plan(self)

    def _repr_html_(self) -> str:
        from slimfit_fx.planning.table import format_plan

        return format_plan(self, html=True)


def _expected(row: PlanRow, freeze_rate: float) -> float:
    if not row.gates:
        return row.bytes_open
    chance = 1.0 - freeze_rate ** len(row.gates)
    return row.bytes_open * chance + row.bytes_closed * (1.0 - chance)


def merge_plans(
    graphs: Sequence[GraphPlan],
    unit_names: Sequence[Sequence[str]],
    units: Sequence[tuple[str, int, int]],
    *,
    preset: str,
    freeze_rate: float,
    parameter_bytes: int,
    optimizer_bytes: int,
) -> MemoryPlan:
    """One plan for a model of several graphs.

    ``unit_names[i][k]`` names gate ``k`` of graph ``i``; ``units`` are (name, numel, bytes).
    """
    rows: list[PlanRow] = []
    gated: set[str] = set()
    why: dict[str, str] = {}
    for index, (graph, names) in enumerate(zip(graphs, unit_names, strict=True)):
        rows += [dataclasses.replace(r, graph=index, gates=tuple(names[int(g)] for g in r.gates)) for r in graph.rows]
        gated |= {names[g] for g in graph.gated}
        for what, reason in graph.refusals:
            if what.startswith("gate "):
                why[names[int(what.split()[1])]] = reason
    unit_rows = tuple(
        UnitRow(
            name,
            numel,
            size,
            name in gated,
            "" if name in gated else why.get(name, "no gradient of it was found in any captured graph"),
        )
        for name, numel, size in units
    )
    compared = [g.torch_compile_saved for g in graphs if g.torch_compile_saved is not None]
    notes = tuple(f"graph {i} was left as it was: {g.fallback}" for i, g in enumerate(graphs) if g.fallback)
    notes += tuple(f"graph {i}: {g.note}" for i, g in enumerate(graphs) if g.note)
    refusals = tuple(r for g in graphs for r in g.refusals if not r[0].startswith("gate "))
    times = [g.time for g in graphs if g.time is not None]
    return MemoryPlan(
        tuple(rows),
        unit_rows,
        preset,
        freeze_rate,
        parameter_bytes,
        optimizer_bytes,
        sum(compared) if compared and len(compared) == len(graphs) else None,
        refusals,
        notes,
        expected_gradient_error=_expected_error(rows),
        time=functools.reduce(operator.add, times) if times else None,
        faster=_faster([g.faster for g in graphs if g.faster is not None]),
    )


def _faster(left: Sequence[Faster]) -> Faster | None:
    if not left:
        return None
    more, less = sum(f.more_bytes for f in left), math.fsum(f.less_ms for f in left)
    return Faster(left[0].recompute, more, less, max(f.gradient_error for f in left))


def _expected_error(rows: Sequence[PlanRow]) -> float | None:
    stored: dict[tuple[str, str | None], int] = {}
    for row in rows:
        if not row.decision.startswith("recompute"):
            stored[row.kind, row.codec] = stored.get((row.kind, row.codec), 0) + row.bytes_before
        if row.beside not in (None, WHOLE):
            units = (WHOLE_OF[row.kind], row.beside)  # not measured apart: it loses less than all of them
            stored[units] = stored.get(units, 0) + row.bytes_before
    return expected_of(stored)
