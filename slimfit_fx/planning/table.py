"""The memory plan as text or HTML: a pure function of the plan, which holds all of the data (rows.py).

::

    where                                    value  ...  decision                 MB before  MB open  MB closed
    encoder.layer.0-11.intermediate (x12)    addmm  ...  int8                         604.0    153.4      153.4
    encoder.layer.0-11.output.dense (x12)    clone  ...  int8, drop when closed       151.0     38.9        0.0

Rows that differ only in the numbers of their module paths share a line, which shows the sum of their bytes.
"""

from __future__ import annotations

import html as html_module
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tabulate import tabulate

from slimfit_fx.planning.chart import draw_chart
from slimfit_fx.planning.peak import PeakForecast
from slimfit_fx.planning.rows import MemoryPlan, PlanRow
from slimfit_fx.planning.timeline import AliveRow, Timeline

T = TypeVar("T")

MAX_RECOMPUTED_LINES = 12
"""Lines of recomputed values that are shown; the rest is summed up in one line."""
MAX_ALIVE_LINES = 12
"""Lines of what is alive at the peak."""
_MAX_REASON_NAMES = 4

_LEGEND = (
    "before: uncompressed. open: held until backward when a unit that reads it trains. closed: when none of them does.",
    "dynamic: only gradients of gate units need it, so freezing them drops it. static: needed whatever is frozen.",
    "(xN): N values whose places in the model differ by numbers only; their bytes are summed. 1 MB = 10^6 bytes.",
    "expected: each unit open with probability 1 - freeze rate.",
)
_PARTS_LEGEND = (
    "static, and N units: in two parts, one for each; that for the units is dropped while none of them trains.",
)
_PEAK_LEGEND = (
    "step peak: bytes of the allocator above what is there before the step (parameters, optimizer state, the batch), "
    "read off the compiled code.",
)


@dataclass(frozen=True)
class FoldedRow:
    """Rows that differ only in the numbers of their module paths. Bytes are sums over ``rows``."""

    where: str
    rows: tuple[PlanRow, ...]

    @property
    def bytes_before(self) -> int:
        """Uncompressed."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_open(self) -> int:
        """Held when a gate is open, or the value is static."""
        return sum(row.bytes_open for row in self.rows)

    @property
    def bytes_closed(self) -> int:
        """Held when all gates are closed."""
        return sum(row.bytes_closed for row in self.rows)


def format_plan(plan: MemoryPlan, html: bool = False) -> str:
    """Return the plan as text, or as an HTML fragment."""
    write = _Html() if html else _Text()
    several_graphs = len({row.graph for row in plan.rows}) > 1
    parts = [write.title(_title(plan))]
    if plan.rows:
        parts.append(write.table(_HEADERS, _lines(plan.rows, several_graphs), _ALIGN))
    else:
        parts.append(write.lines(["No value is saved between forward and backward."]))
    parts.append(write.table(("totals", "MB", ""), _totals(plan), ("left", "right", "left")))
    if plan.peak is not None:
        parts.append(write.table(("step peak, predicted", "MB", ""), _peak(plan.peak), ("left", "right", "left")))
        if plan.timeline is not None:
            parts += _timelines(plan, plan.timeline, write)
    elif plan.peak_unknown:
        parts.append(write.lines([f"Step peak: not known: {plan.peak_unknown}"]))
    in_parts = any(row.beside is not None for row in plan.rows)
    legend = _LEGEND + _PARTS_LEGEND * in_parts + (_PEAK_LEGEND if plan.peak is not None else ())
    ends = (_units(plan), _accuracy(plan), _time(plan), _left_alone(plan), plan.notes, legend)
    parts += [write.lines(lines) for lines in ends if lines]
    return "\n\n".join(parts)


def _timelines(plan: MemoryPlan, timeline: Timeline, write: _Text) -> list[str]:
    """Charts on one scale, then who is alive at the peak: under plain torch.compile, if compared, and here."""
    steps = [] if plan.before is None else [("plain torch.compile", plan.before)]
    steps.append(("slimfit_fx", timeline))
    top = max(step.highest_bytes for _, step in steps)
    charts = [
        write.chart([f"{name}: {_mb(step.highest_bytes)} MB in {step.phase}", *draw_chart(step, top_bytes=top)])
        for name, step in steps
    ]
    tables = [
        write.table((f"alive at the peak, {name}", "how many", "MB"), alive_lines(step), ("left", "right", "right"))
        for name, step in steps
    ]
    unknown = [write.lines([f"Plain torch.compile: not known: {plan.before_unknown}"])] if plan.before_unknown else []
    return [*charts, *tables, *unknown]


def alive_lines(step: Timeline) -> list[list[str]]:
    """Who is alive at the peak of a step, layers folded, largest first; the rest in one line."""
    groups: dict[Hashable, list[AliveRow]] = {}
    for row in step.alive:
        groups.setdefault((row.kind, row.what, _numbers_out(row.module)[0], row.size_bytes), []).append(row)
    folded = [
        (f"{rows[0].kind} {rows[0].what}, {where}" if rows[0].module else _what(rows[0]), rows)
        for group in groups.values()
        for where, rows in _fold_paths(group, lambda row: row.module)
    ]
    lines = sorted(
        ((text, sum(r.count for r in rows), sum(r.size_bytes for r in rows)) for text, rows in folded),
        key=lambda line: -line[2],
    )
    shown, rest = lines[:MAX_ALIVE_LINES], lines[MAX_ALIVE_LINES:]
    if rest:
        shown.append(("all others", sum(line[1] for line in rest), sum(line[2] for line in rest)))
    return [[text, str(count), _mb(size)] for text, count, size in shown]


def _what(row: AliveRow) -> str:
    return "gradients" if row.kind == "gradient" else f"{row.kind} {row.what}"


def fold_rows(rows: Iterable[PlanRow]) -> list[FoldedRow]:
    """Fold rows that are equal but for the numbers in their module paths, in the order of their first appearance."""
    groups: dict[Hashable, list[PlanRow]] = {}
    for row in rows:
        groups.setdefault(_fold_key(row), []).append(row)
    return [
        FoldedRow(where, tuple(rows))
        for group in groups.values()
        for where, rows in _fold_paths(group, lambda row: row.module)
    ]


def _fold_key(row: PlanRow) -> Hashable:
    path = _numbers_out(row.module)[0]
    what = (row.op, row.kind, row.decision, row.codec, row.shape, row.dtype, row.dynamic, len(row.gates), row.reason)
    return (row.graph, path, *what, row.beside, row.bytes_before, row.bytes_open, row.bytes_closed)


def _numbers_out(path: str) -> tuple[str, tuple[int, ...]]:
    """Split ``"layer.3.dense"`` into ``("layer.#.dense", (3,))``. Whole parts only: ``conv1`` stays."""
    parts = path.split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return ".".join("#" if part.isdecimal() else part for part in parts), numbers


def _fold_paths(items: Sequence[T], path_of: Callable[[T], str]) -> Iterator[tuple[str, list[T]]]:
    """Fold items whose paths differ in their numbers only: yields (path with ranges, items).

    One fold if the numbers fill their ranges, else one per value of the first number that varies:
    ``layers.0-3.blocks.0-1`` is said only when every layer has both blocks.
    """
    path, _ = _numbers_out(path_of(items[0]))
    numbers = [_numbers_out(path_of(item))[1] for item in items]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if len(set(numbers)) == math.prod(map(len, columns)):
        yield _where(path, columns, len(items)), list(items)
        return
    varying = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[varying]:
        yield from _fold_paths([i for i, own in zip(items, numbers, strict=True) if own[varying] == value], path_of)


def _where(path: str, columns: Sequence[Sequence[int]], count: int) -> str:
    ranges = iter(_range_text(column) for column in columns)
    name = ".".join(next(ranges) if part == "#" else part for part in path.split(".")) or "(model)"
    return f"{name} (x{count})" if count > 1 else name


def _range_text(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2,5"``; ascending and distinct."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ---- the table of values

_HEADERS = (
    "where",
    "value",
    "kind",
    "activation",
    "decision",
    "shape",
    "dtype",
    "MB before",
    "MB open",
    "MB closed",
    "reason",
)
_ALIGN = ("left",) * 7 + ("right",) * 3 + ("left",)


def _lines(rows: Sequence[PlanRow], several_graphs: bool) -> list[list[str]]:
    saved = fold_rows(row for row in rows if not _is_recomputed(row))
    recomputed = fold_rows(row for row in rows if _is_recomputed(row))
    lines = [_line(folded, several_graphs) for folded in (*saved, *recomputed[:MAX_RECOMPUTED_LINES])]
    rest = recomputed[MAX_RECOMPUTED_LINES:]
    if rest:
        hidden = sum(len(folded.rows) for folded in rest)
        sums = (sum(getattr(f, name) for f in rest) for name in ("bytes_before", "bytes_open", "bytes_closed"))
        lines.append([f"{hidden} more values", "", "", "", "recompute", "", "", *map(_mb, sums), ""])
    return lines


def _is_recomputed(row: PlanRow) -> bool:
    return row.decision.startswith("recompute")


def _line(folded: FoldedRow, several_graphs: bool) -> list[str]:
    row = folded.rows[0]
    where = f"graph {row.graph}: {folded.where}" if several_graphs else folded.where
    sizes = map(_mb, (folded.bytes_before, folded.bytes_open, folded.bytes_closed))
    shape = "x".join(map(str, row.shape)) or "scalar"
    return [where, row.op, row.kind, _liveness(row), _decision(row), shape, row.dtype, *sizes, _reason(row)]


def _liveness(row: PlanRow) -> str:
    if not row.dynamic:
        return "static"
    if row.beside is not None:
        return f"static, and {len(row.gates)} unit" + "s" * (len(row.gates) != 1)
    return "dynamic" if len(row.gates) <= 1 else f"dynamic ({len(row.gates)} units)"


def _decision(row: PlanRow) -> str:
    action, _, gate = row.decision.partition("+")
    action = row.codec if row.codec is not None and action == "codec" else action
    if row.beside is not None:
        return f"{action}; {row.beside}, drop when closed"
    return f"{action}, drop when closed" if gate else action


def _reason(row: PlanRow) -> str:
    """The reason, unless it repeats what the columns kind and decision say."""
    return "" if row.reason == f"{row.kind}: {row.codec}" else row.reason


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size == 0 or size >= 1e5 else f"{size / 1e6:,.3f}"


# ---- totals, units, refusals


def _title(plan: MemoryPlan) -> str:
    return f"Memory plan of one training step: preset {plan.preset}, freeze rate {plan.freeze_rate:g}"


def _totals(plan: MemoryPlan) -> list[list[str]]:
    t = plan.totals()
    table = [
        ["parameters", _mb(t.parameters), ""],
        ["gradients of gate units, all open", _mb(t.gradients_open), ""],
        ["gradients of gate units, expected", _mb(t.gradients_expected), ""],
        ["optimizer state", _mb(t.optimizer_state), ""],
        ["saved activations, as they are", _mb(t.saved_before), "those recomputed included"],
        ["saved activations, all units open", _mb(t.saved_open), _ratio(t.torch_compile_saved, t.saved_open)],
        ["saved activations, all units closed", _mb(t.saved_closed), _ratio(t.torch_compile_saved, t.saved_closed)],
        ["saved activations, expected", _mb(t.saved_expected), _ratio(t.torch_compile_saved, t.saved_expected)],
    ]
    if t.torch_compile_saved is not None:
        table.append(["plain torch.compile saves", _mb(t.torch_compile_saved), "for the same graphs"])
    return table


def _time(plan: MemoryPlan) -> list[str]:
    t = plan.time
    if t is None or not (t.again_ms or t.codecs_ms or t.spared_ms):
        return []
    return [
        f"Time to expect by the roofline of this device: {_ms(t.again_ms)} more for what runs again, "
        f"{_ms(t.codecs_ms)} more for codecs, {_ms(t.spared_ms)} less for gradients of closed units."
    ]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _peak(peak: PeakForecast) -> list[list[str]]:
    worst = fold_names(peak.worst_units)
    level = "" if peak.most_open_bytes is None else f" with at most {_mb(peak.most_open_bytes)} MB of gradients"
    more = f" and {len(worst) - _MAX_REASON_NAMES} more" if len(worst) > _MAX_REASON_NAMES else ""
    return [
        ["all units closed", _mb(peak.closed_bytes), ""],
        [
            f"worst choice of {peak.open_count} open units{level}",
            _mb(peak.worst_bytes),
            ", ".join(worst[:_MAX_REASON_NAMES]) + more,
        ],
        ["all units open", _mb(peak.open_bytes), ""],
    ]


def _ratio(theirs: int | None, ours: int) -> str:
    return "" if not theirs or not ours else f"{theirs / ours:.2f}x smaller than plain torch.compile"


def _units(plan: MemoryPlan) -> list[str]:
    gated = sum(unit.gated for unit in plan.units)
    lines = [f"{gated} of {len(plan.units)} gate units got their gate."]
    without = ((unit.name, unit.reason) for unit in plan.units if not unit.gated)
    return lines + [f"  without: {names}: {reason}" for names, reason in _by_reason(without)]


def _accuracy(plan: MemoryPlan) -> list[str]:
    error = plan.expected_gradient_error
    if error is None:
        why = "one of them was never measured, or a graph came from a compile cache"
        return [f"Relative gradient error to expect of the codecs: not known: {why}."]
    nothing = "" if error else " (nothing is lossy)"
    return [f"Relative gradient error to expect of the codecs: {error:.3f}{nothing}."]


def _left_alone(plan: MemoryPlan) -> list[str]:
    lines = [f"  {names}: {reason}" for names, reason in _by_reason(plan.refusals)]
    return ["Left alone:", *lines] if lines else []


def _by_reason(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Names with the same reason on one line; numbered ones folded."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in pairs:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        folded = fold_names(names)
        more = f" and {len(folded) - _MAX_REASON_NAMES} more" if len(folded) > _MAX_REASON_NAMES else ""
        yield ", ".join(folded[:_MAX_REASON_NAMES]) + more, reason


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ in their numbers only: ``["a.0.w", "a.1.w", "b"]`` becomes ``["a.0-1.w (x2)", "b"]``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_numbers_out(name)[0], []).append(name)
    return [folded for group in groups.values() for folded, _ in _fold_paths(group, str)]


# ---- text and HTML


class _Text:
    """Plain text."""

    table_format = "simple"

    def title(self, text: str) -> str:
        return text

    def table(self, headers: Sequence[str], lines: Sequence[Sequence[str]], align: Sequence[str]) -> str:
        return str(tabulate(lines, headers=headers, tablefmt=self.table_format, disable_numparse=True, colalign=align))

    def lines(self, lines: Sequence[str]) -> str:
        return "\n".join(lines)

    def chart(self, lines: Sequence[str]) -> str:
        return "\n".join(lines)


class _Html(_Text):
    """An HTML fragment; everything that comes from the model is escaped."""

    table_format = "html"  # escapes its cells

    def title(self, text: str) -> str:
        return f"<p><b>{html_module.escape(text)}</b></p>"

    def lines(self, lines: Sequence[str]) -> str:
        return "<p>" + "<br>".join(html_module.escape(line) for line in lines) + "</p>"

    def chart(self, lines: Sequence[str]) -> str:
        return f"<pre>{html_module.escape(chr(10).join(lines))}</pre>"
