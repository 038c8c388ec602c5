"""Timelines: read off a trace, drawn as text, PNG and HTML; plain torch.compile's against the allocator."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from test_peak import Encoder, encoder_batch

import slimfit_fx
from bench.measure import step_peak
from slimfit_fx.config import Config
from slimfit_fx.planning.chart import draw_chart
from slimfit_fx.planning.labels import GRADIENT, Label, read_label, saved_label
from slimfit_fx.planning.peak import Event, StepTrace
from slimfit_fx.planning.picture import check_picture, curve_points, save_picture
from slimfit_fx.planning.table import alive_lines
from slimfit_fx.planning.timeline import AliveRow, Timeline, read_timeline
from slimfit_fx.rehearsal import Rehearsal
from slimfit_fx.units import find_units

TRACE = StepTrace(
    (Event(30, 0), Event(20, 1, frozenset([0])), Event(40, 2), Event(-40, 2), Event(60, 3), Event(-30, 0)),
    3,
    {0: "mul @ layer.0.norm", 1: "mul @ layer.1.norm", 2: "4x5 float32", 3: GRADIENT},
    1,
)


def test_labels_say_what_a_block_is():
    assert read_label(saved_label("mul_12", "layer.0.norm", encoded=False)) == Label("saved", "mul", "layer.0.norm")
    assert read_label(saved_label("addmm_3", "", encoded=True)) == Label("saved", "addmm encoded", "(model)")
    assert read_label(GRADIENT).kind == "gradient"
    assert read_label("4x5 float32") == Label("temporary", "4x5 float32", "")


def test_a_timeline_is_the_pattern_that_was_asked_for():
    found = read_timeline(TRACE, [0], update_bytes=200)
    assert (found.forward, found.backward) == ((30, 50, 90), (50, 110, 80))
    assert found.update == (80, 200) and found.highest_bytes == 200 and found.phase == "optimizer step"
    assert (found.peak_bytes, found.saved_bytes) == (110, 90)
    assert [(r.kind, r.module, r.size_bytes) for r in found.alive] == [
        ("gradient", "", 60),
        ("saved", "layer.0.norm", 30),
        ("saved", "layer.1.norm", 20),
    ]
    closed = read_timeline(TRACE, [])
    assert closed.forward == (30, 30, 70) and closed.update == () and closed.phase == "backward"


def test_who_is_alive_is_folded_by_layer():
    rows = [AliveRow("saved", "mul", f"layer.{i}.norm", 2, 1000) for i in range(5)]
    rows += [AliveRow("gradient", GRADIENT, "", 3, 700), AliveRow("temporary", "2x2 float32", "", 1, 16)]
    lines = alive_lines(Timeline((), (), (), 0, 0, tuple(rows)))
    assert lines[0] == ["saved mul, layer.0-4.norm (x5)", "10", "0.005"]
    assert lines[1][0] == "gradients" and lines[2][0] == "temporary 2x2 float32"
    many = [AliveRow("temporary", f"{i}x2 float32", "", 1, 1000 * i) for i in range(1, 31)]
    lines = alive_lines(Timeline((), (), (), 0, 0, tuple(many)))
    assert lines[-1] == ["all others", "18", "0.2"] and len(lines) == 13


@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_chart_has_the_height_of_its_values(ascii_only):
    step = Timeline((0, 50, 100), (100, 50, 0), (25, 25), 100, 100, ())
    lines = draw_chart(step, top_bytes=200, width=60, height=4, ascii_only=ascii_only)
    assert len(lines) == 5 and all(len(line) <= 76 for line in lines)
    assert re.fullmatch(r" +\|forward +\|backward +\|optimizer step", lines[-1])
    full = "#" if ascii_only else "█"
    assert full not in lines[0] + lines[1] and full in lines[2] and full in lines[3]
    assert all(line.isascii() for line in lines) == ascii_only
    assert draw_chart(Timeline((), (), (), 0, 0, ()), top_bytes=0)


def test_points_of_a_curve_keep_every_value():
    step = Timeline((1, 5, 3), (9, 2), (2, 4), 9, 3, ())
    points = curve_points(step)
    assert [size for _, size in points] == [0, 1, 5, 3, 9, 2, 2, 4, 4]
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@pytest.fixture(scope="module")
def compared():
    torch.manual_seed(0)
    return slimfit_fx.plan(Encoder(), *encoder_batch(), compare=True, preset="max")


@pytest.mark.inductor
def test_saved_values_are_named_by_module_and_encoding():
    model = Encoder()
    (graph,) = Rehearsal(model, find_units(model).units).graphs(Config(preset="max"), encoder_batch(), {}, peak=True)
    named = [read_label(label) for label in graph.trace().labels.values()]
    assert {"qkv", "up"} <= {label.module for label in named if label.kind == "saved"}
    assert any(label.what.endswith(" encoded") for label in named), "int4 codes and their scales"


@pytest.mark.inductor
@pytest.mark.slow
def test_plain_torch_compile_is_what_the_allocator_says(compared):
    torch.manual_seed(0)
    model, batch = Encoder(), encoder_batch()
    compiled = torch.compile(model)
    compiled(*batch).backward()
    model.zero_grad(set_to_none=True)
    found = step_peak(lambda: compiled(*batch), backward=lambda loss: loss.backward()).peak_bytes
    assert compared.before.peak_bytes == pytest.approx(found, rel=0.02)
    assert compared.timeline.peak_bytes == compared.peak.worst_bytes < compared.before.peak_bytes


@pytest.mark.inductor
@pytest.mark.slow
def test_a_plan_shows_both_steps(compared, tmp_path):
    text = str(compared)
    assert "plain torch.compile: " in text and "slimfit_fx: " in text and "█" in text
    assert "alive at the peak, plain torch.compile" in text and "alive at the peak, slimfit_fx" in text
    assert "<pre>slimfit_fx" in compared._repr_html_()
    assert compared.to_dict()["before"]["peak_bytes"] == compared.before.peak_bytes

    page = tmp_path / "step.html"
    save_picture(compared, page)
    html = page.read_text()
    assert html.count("<polyline") == 2 and "http" not in html
    pytest.importorskip("matplotlib")
    save_picture(compared, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must be a .png or .html file, got "):
        save_picture(compared, tmp_path / "step.pdf")
    with pytest.raises(ValueError, match="this plan has no timeline: make it with peak=True"):
        save_picture(dataclasses.replace(compared, timeline=None), page)


def test_pictures_are_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be a .png or .html file, got 'x.svg'"):
        check_picture(tmp_path.__class__("x.svg"))
    with pytest.raises(ValueError, match="there is no folder"):
        check_picture(tmp_path / "no" / "x.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib is needed for a PNG: install it, or ask for a .html"):
        check_picture(tmp_path / "x.png")
    check_picture(tmp_path / "x.html")
