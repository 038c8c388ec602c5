"""The plan as data and as a table: nothing gets lost in folding, and every number can be summed up again."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_fx import Config
from slimfit_fx.capture.backend import CapturedGraph
from slimfit_fx.planning.rows import GraphPlan, MemoryPlan, PlanRow, UnitRow, merge_plans
from slimfit_fx.planning.table import MAX_RECOMPUTED_LINES, fold_names, fold_rows, format_plan
from slimfit_fx.session import build_plan
from slimfit_fx.units import GateUnit

ROW = PlanRow(
    graph=0,
    name="addmm",
    module="encoder.layer.0.dense",
    op="addmm",
    kind="gelu_input",
    dynamic=False,
    gates=(),
    shape=(32, 128),
    dtype="float32",
    decision="codec",
    codec="int8",
    reason="gelu_input: int8",
    bytes_before=4_000_000,
    bytes_open=1_000_000,
    bytes_closed=1_000_000,
)


def row(module: str = ROW.module, **changes) -> PlanRow:
    return dataclasses.replace(ROW, module=module, **changes)


def plan(*rows: PlanRow, **changes) -> MemoryPlan:
    units = (UnitRow("encoder.layer.0.dense.weight", 100, 400, True, ""),)
    whole = MemoryPlan(tuple(rows), units, "balanced", 0.9, parameter_bytes=500, optimizer_bytes=1000)
    return dataclasses.replace(whole, **changes)


def where(*rows: PlanRow) -> list[str]:
    return [folded.where for folded in fold_rows(rows)]


# ---- lines


def test_a_value_in_two_parts_says_so_and_the_legend_explains_it():
    parts = {"kind": "gelu_input_static", "codec": "int4", "beside": "int8", "reason": "gelu_input_static: int4"}
    shown = format_plan(plan(row(dynamic=True, gates=("a", "b"), decision="codec+gate", **parts)))
    (line,) = (line for line in shown.splitlines() if "gelu_input_static" in line)
    assert "static, and 2 units" in line and "int4; int8, drop when closed" in line
    assert "static, and N units: in two parts" in shown
    assert "in two parts" not in format_plan(plan(row()))


# ---- folding


def test_identical_layers_fold_into_one_line():
    (folded,) = fold_rows(row(f"encoder.layer.{i}.dense") for i in range(12))
    assert folded.where == "encoder.layer.0-11.dense (x12)"
    assert (folded.bytes_before, folded.bytes_open, folded.bytes_closed) == (48_000_000, 12_000_000, 12_000_000)


def test_a_single_row_keeps_its_place():
    assert where(row("head")) == ["head"]
    assert where(row("")) == ["(model)"]


def test_several_values_of_one_module_count():
    rows = [row(f"layer.{i}", name=f"v{i}{j}") for i in range(2) for j in range(3)]
    assert where(*rows) == ["layer.0-1 (x6)"]


@pytest.mark.parametrize(
    "change",
    [
        {"op": "mm"},
        {"beside": "int8"},
        {"kind": "float"},
        {"decision": "codec+gate"},
        {"codec": "int4"},
        {"shape": (32, 129)},
        {"dtype": "bfloat16"},
        {"dynamic": True},
        {"gates": ("w",)},
        {"reason": "because"},
        {"bytes_before": 1},
        {"bytes_open": 1},
        {"bytes_closed": 1},
        {"graph": 1},
    ],
)
def test_rows_that_differ_in_anything_else_stay_apart(change):
    assert len(fold_rows([row("layer.0"), row("layer.1", **change)])) == 2
    assert len(fold_rows([row("layer.0"), row("layer.1", name="other")])) == 1


def test_other_paths_stay_apart():
    assert where(row("layer.0.a"), row("layer.1.b"), row("conv1"), row("conv2")) == [
        "layer.0.a",
        "layer.1.b",
        "conv1",
        "conv2",
    ]


def test_gaps_are_shown():
    assert where(*(row(f"h.{i}") for i in (0, 1, 2, 5, 7))) == ["h.0-2,5,7 (x5)"]


def test_a_range_is_said_of_two_numbers_only_if_all_pairs_are_there():
    full = [row(f"stage.{i}.block.{j}") for i in range(2) for j in range(3)]
    assert where(*full) == ["stage.0-1.block.0-2 (x6)"]
    assert where(*full[:-1]) == ["stage.0.block.0-2 (x3)", "stage.1.block.0-1 (x2)"]


def test_lines_come_in_the_order_of_the_model():
    rows = [row("b.0"), row("a.0"), row("b.1"), row("a.1")]
    assert where(*rows) == ["b.0-1 (x2)", "a.0-1 (x2)"]


def test_names_fold_like_paths():
    assert fold_names(["a.0.w", "b", "a.1.w"]) == ["a.0-1.w (x2)", "b"]
    assert fold_names([]) == []


ROWS = st.builds(
    row,
    module=st.from_regex(r"[ab](\.[0-3]){0,2}(\.c)?", fullmatch=True),
    op=st.sampled_from(["mm", "add"]),
    bytes_before=st.integers(0, 3),
    bytes_open=st.integers(0, 3),
    bytes_closed=st.integers(0, 3),
)


@settings(max_examples=examples(100, share=3))
@given(st.lists(ROWS, max_size=30))
def test_folding_loses_no_row_and_no_byte(rows):
    folded = fold_rows(rows)
    assert sorted(map(repr, (r for f in folded for r in f.rows))) == sorted(map(repr, rows))
    totals = plan(*rows).totals()
    assert sum(f.bytes_before for f in folded) == totals.saved_before
    assert sum(f.bytes_open for f in folded) == totals.saved_open
    assert sum(f.bytes_closed for f in folded) == totals.saved_closed
    for f in folded:
        assert ("(x" in f.where) == (len(f.rows) > 1)


# ---- totals


def test_expected_weighs_each_value_with_the_chance_that_one_of_its_units_is_open():
    static = row(bytes_open=100, bytes_closed=100)
    one = row(dynamic=True, gates=("a",), bytes_open=1000, bytes_closed=0)
    two = row(dynamic=True, gates=("a", "b"), bytes_open=10_000, bytes_closed=0)
    totals = plan(static, one, two, freeze_rate=0.9).totals()
    assert (totals.saved_open, totals.saved_closed) == (11_100, 100)
    assert totals.saved_expected == round(100 + 0.1 * 1000 + (1 - 0.9**2) * 10_000)
    assert (totals.gradients_open, totals.gradients_expected) == (400, 40)


def test_totals_stand_in_the_table():
    text = format_plan(plan(row("a.0"), row("a.1"), torch_compile_saved=12_000_000, optimizer_bytes=7_000_000))
    assert "saved activations, as they are" in text and "8.0" in text
    assert "plain torch.compile saves" in text and "6.00x smaller than plain torch.compile" in text
    assert "optimizer state" in text and "7.0" in text


def test_without_a_comparison_there_is_no_ratio():
    assert "torch.compile" not in format_plan(plan(row()))


# ---- what the table says


def lines_with(text: str, what: str) -> list[str]:
    return [line for line in text.splitlines() if what in line]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, " int8 "),
        ({"decision": "codec+gate"}, "int8, drop when closed"),
        ({"decision": "keep", "codec": None}, " keep "),
        ({"decision": "keep+gate", "codec": None}, "keep, drop when closed"),
        ({"decision": "recompute", "codec": None}, " recompute "),
        ({"decision": "codec", "codec": "bits"}, " bits "),
        ({"dynamic": True, "gates": ("a",)}, " dynamic "),
        ({"dynamic": True, "gates": ("a", "b")}, "dynamic (2 units)"),
        ({"shape": ()}, " scalar "),
        ({"reason": "its memory has gaps or overlaps"}, "its memory has gaps or overlaps"),
    ],
)
def test_a_row_says_what_was_decided(changes, shown):
    (line,) = lines_with(str(plan(row("some.module", **changes))), "some.module")
    assert shown in line + " "


def test_a_reason_that_repeats_the_columns_is_left_out():
    assert "gelu_input: int8" not in str(plan(row()))


def test_recomputed_values_come_last_and_are_limited():
    saved = row("saved")
    recomputed = [
        row(f"m{'x' * i}", decision="recompute", codec=None, bytes_open=0, bytes_closed=0)
        for i in range(MAX_RECOMPUTED_LINES + 3)
    ]
    text = str(plan(recomputed[0], saved, *recomputed[1:]))
    assert text.index("saved") < text.index("recompute")
    assert len(lines_with(text, " recompute ")) == MAX_RECOMPUTED_LINES + 1
    (rest,) = lines_with(text, "3 more values")
    assert "12.0" in rest


def test_several_graphs_are_told_apart():
    text = str(plan(row("a.0"), row("a.1", graph=1)))
    assert "graph 0: a.0" in text and "graph 1: a.1" in text
    assert "graph 0" not in str(plan(row()))


def test_units_and_refusals_with_their_reasons():
    units = (
        UnitRow("a.weight", 1, 4, True, ""),
        *(UnitRow(f"emb.{i}.weight", 1, 4, False, "its gradient has a symbolic shape") for i in range(3)),
    )
    refusals = (("mul", "always computed"), ("mul_1", "always computed"))
    text = str(plan(row(), units=units, refusals=refusals, notes=("graph 1 was left as it was: odd",)))
    assert "1 of 4 gate units got their gate." in text
    assert "without: emb.0-2.weight (x3): its gradient has a symbolic shape" in text
    assert "mul, mul_1: always computed" in text
    assert "graph 1 was left as it was: odd" in text


def test_many_names_with_one_reason_are_cut_short():
    refusals = tuple((f"n{'x' * i}", "why") for i in range(9))
    assert lines_with(str(plan(row(), refusals=refusals)), ": why") == ["  n, nx, nxx, nxxx and 5 more: why"]


def test_an_empty_plan_is_a_table_too():
    empty = MemoryPlan((), (), "exact", 0.0, 0, 0)
    for text in (str(empty), empty._repr_html_()):
        assert "No value is saved" in text and "0 of 0 gate units" in text
    assert empty.totals().saved_expected == 0
    assert json.loads(empty.to_json())["rows"] == []


# ---- HTML


def test_html_has_the_same_cells_and_is_escaped():
    whole = plan(row("a<b>.0", reason="x < y & z"), notes=("<script>",))
    page = whole._repr_html_()
    assert page == format_plan(whole, html=True)
    assert page.count("<table>") == page.count("</table>") == 2
    assert "a&lt;b&gt;.0" in page and "x &lt; y &amp; z" in page and "&lt;script&gt;" in page
    assert "<script>" not in page and "<b>.0" not in page


# ---- data


def test_to_dict_and_json_hold_everything():
    whole = plan(row("a.0"), row("a.1", gates=("w",), dynamic=True), refusals=(("mul", "why"),), notes=("n",))
    data = json.loads(whole.to_json(indent=2))
    assert data["totals"] == dataclasses.asdict(whole.totals())
    assert data.pop("totals") and set(data) == {field.name for field in dataclasses.fields(MemoryPlan)}
    tuples = ("shape", "gates")
    rows = [PlanRow(**{k: tuple(v) if k in tuples else v for k, v in one.items()}) for one in data["rows"]]
    assert tuple(rows) == whole.rows
    assert tuple(UnitRow(**one) for one in data["units"]) == whole.units
    assert whole.to_dict()["rows"][0]["module"] == "a.0"


def test_graph_plans_survive_json():
    graph = GraphPlan((row(gates=("0",)),), (("gate 0", "why"),), (1, 2), 7, "odd")
    assert GraphPlan.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph


def test_merging_names_the_gates_and_keeps_reasons():
    first = GraphPlan((row(gates=("1",)),), (("gate 0", "shared"), ("mul", "costly")), (1,), 10)
    second = GraphPlan((row(gates=("0",)),), (), (), None, "broken")
    merged = merge_plans(
        [first, second],
        [["a", "b"], ["c"]],
        [(name, 1, 4) for name in "abc"],
        preset="exact",
        freeze_rate=0.5,
        parameter_bytes=12,
        optimizer_bytes=24,
    )
    assert [(r.graph, r.gates) for r in merged.rows] == [(0, ("b",)), (1, ("c",))]
    assert [(u.name, u.gated) for u in merged.units] == [("a", False), ("b", True), ("c", False)]
    assert merged.units[0].reason == "shared" and "no gradient" in merged.units[2].reason
    assert merged.refusals == (("mul", "costly"),)
    assert merged.notes == ("graph 1 was left as it was: broken",)
    assert merged.torch_compile_saved is None


def test_a_graph_from_a_compile_cache_is_said_to_be_unknown():
    model = torch.nn.Linear(2, 3)
    unit = GateUnit("weight", ("weight",), 6, 24)
    seen = CapturedGraph(("weight",), False, GraphPlan((row(gates=("0",)),), (), (0,), 7))
    unseen = CapturedGraph(("weight",), False, None)
    assert build_plan(model, Config(), [unit], [seen], None, open_count=1).units[0].gated
    (known_not,) = build_plan(model, Config(), [unit], [unseen], None, open_count=1).units
    assert not known_not.gated and "came from a compile cache; slimfit_fx.plan" in known_not.reason
