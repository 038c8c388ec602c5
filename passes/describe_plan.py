"""Read the finished pair of graphs and say, value by value, what was done: the rows of the memory plan.

Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import STATIC, GateLayout, hint, module_path, nbytes
from slimfit_fx.passes.find_cones import ConePlan
from slimfit_fx.passes.insert_codecs import ENCODED, STATIC_STORED
from slimfit_fx.passes.insert_gates import GATES
from slimfit_fx.passes.liveness import SERVES
from slimfit_fx.passes.partition import DECISION
from slimfit_fx.passes.saved import Seam
from slimfit_fx.planning.decisions import Decision
from slimfit_fx.planning.planner import Planning
from slimfit_fx.planning.rows import WHOLE, GraphPlan, PlanRow
from slimfit_fx.presets import PARTS


def describe_plan(seam: Seam, cones: ConePlan, planning: Planning | None, layout: GateLayout) -> GraphPlan:
    """One row per value that crosses the seam (its encoded parts summed up), then one per value that is recomputed."""
    forward = {n.name: n for n in seam.forward.graph.nodes}
    groups: dict[str, list[fx.Node]] = {}
    for value, _ in seam.saved():
        source = value.args[0] if GATES in value.meta and value.op == "call_function" else value
        assert isinstance(source, fx.Node)
        name = source.meta[ENCODED][0] if ENCODED in source.meta else source.name
        groups.setdefault(name, []).append(value)
    rows = [
        _saved_row(forward[name], parts) for name, parts in groups.items() if forward[name].meta.get("val") is not None
    ]
    rows = [r for r in rows if r.kind not in ("gate", "input")]
    if planning is not None and planning.cut is not None:
        rows += [_recomputed_row(n) for n in planning.recomputed_reads if _is_worth_a_row(n)]
    gated = tuple(sorted({gate for cone in cones.cones if cone.output is not None for gate in cone.gates}))
    missing = tuple((f"gate {g}", _why_missing(cones, g)) for g in range(len(layout.params)) if g not in gated)
    refusals = tuple(cones.refusals) + missing
    if planning is not None and planning.refusal:
        refusals += (("the graph", planning.refusal),)
    told = planning or Planning(None)
    inputs = seam.forward.graph.find_nodes(op="placeholder")
    return GraphPlan(
        tuple(rows), refusals, gated, note=told.note, time=told.time, blocks=told.blocks, faster=told.faster,
        gate_bytes=tuple(sum(nbytes(inputs[i]) for i in params) for params in layout.params),
    )  # fmt: skip


def _why_missing(cones: ConePlan, gate: int) -> str:
    return "; ".join(sorted(set(cones.ungated.get(gate, ())))) or "it receives no gradient in this graph"


def _saved_row(value: fx.Node, parts: list[fx.Node]) -> PlanRow:
    gates = frozenset().union(*(p.meta.get(GATES, frozenset()) for p in parts))
    size = nbytes(value)
    stored = sum(nbytes(p) for p in parts)
    closed = sum(nbytes(p) for p in parts if GATES not in p.meta)
    if value.op == "placeholder":
        size = stored = closed = 0
    kind, codec, beside, reason = _how_stored(value, parts)
    return PlanRow(
        graph=0,
        name=value.name,
        module=module_path(value),
        op=ops.op_name(value),
        kind=kind,
        dynamic=bool(gates),
        gates=tuple(str(g) for g in sorted(gates)),
        shape=_shape(value),
        dtype=str(value.meta["val"].dtype).removeprefix("torch."),
        decision=("keep" if codec is None else "codec") + ("+gate" if gates else ""),
        codec=codec,
        reason=reason,
        bytes_before=size,
        bytes_open=stored,
        bytes_closed=closed,
        beside=beside,
    )


def _how_stored(value: fx.Node, parts: Sequence[fx.Node]) -> tuple[str, str | None, str | None, str]:
    """Kind of the value, name of its codec, how it is stored beside that for units, and why."""
    decision: Decision | None = value.meta.get(DECISION)
    if value.op == "placeholder":
        kind = "gate" if "slimfit_gate" in value.meta else "input"
        return kind, None, None, "an input or parameter: alive anyway"
    if decision is None:
        return "other", None, None, "chosen by torch's partitioner"
    name = None if decision.codec is None else decision.codec.name
    static = [p for p in parts if _is_static_part(p)]
    if decision.parts is not None and static:
        kind, codec = PARTS[decision.kind][0], decision.parts[0].name
        return kind, codec, (name or WHOLE) if len(static) < len(parts) else None, f"{kind}: {codec}"
    return decision.kind, name if any(ENCODED in p.meta for p in parts) else None, None, decision.reason


def _is_static_part(saved: fx.Node) -> bool:
    node = saved.args[0] if GATES in saved.meta and saved.op == "call_function" else saved
    assert isinstance(node, fx.Node)
    return ENCODED in node.meta and node.meta[ENCODED][1] == STATIC_STORED


def _recomputed_row(node: fx.Node) -> PlanRow:
    serves = node.meta.get(SERVES, frozenset())
    dynamic = bool(serves) and STATIC not in serves
    return PlanRow(
        graph=0,
        name=node.name,
        module=module_path(node),
        op=ops.op_name(node),
        kind="recomputed",
        dynamic=dynamic,
        gates=tuple(str(g) for g in sorted(serves)) if dynamic else (),
        shape=_shape(node),
        dtype=str(node.meta["val"].dtype).removeprefix("torch."),
        decision="recompute",
        codec=None,
        reason="computed again from what is saved",
        bytes_before=nbytes(node),
        bytes_open=0,
        bytes_closed=0,
    )


def _is_worth_a_row(node: fx.Node) -> bool:
    return ops.is_tensor(node) and not ops.is_view(node) and nbytes(node) >= 4096


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(hint(s) for s in node.meta["val"].shape)
