"""Memory against time: what kernels do, how long that takes, and who is on the front."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import optimized
from small_models import Tiny, tokens
from torch import nn

import slimfit_fx
from slimfit_fx.capture.captured import step_trace
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.roofline import Roofline, Work, measure, operator_flops, roofline_of
from slimfit_fx.tradeoff import FrontPoint, mark_front

ROOF = Roofline({"float32": 100.0, "bfloat16": 400.0}, 10.0)


def test_a_kernel_takes_the_longer_of_computing_and_reading():
    assert ROOF.seconds(Work(200.0, 5, "float32")) == 2.0
    assert ROOF.seconds(Work(200.0, 50, "float32")) == 5.0
    assert ROOF.seconds(Work(200.0, 1, "bfloat16")) == 0.5
    assert ROOF.seconds(Work(400.0, 1, "float64")) == 1.0, "an unknown dtype counts as the fastest"


def test_branches_count_where_their_gate_is_open():
    work = (Work(100.0, 0, "float32"), Work(200.0, 0, "float32", frozenset([1])))
    assert ROOF.step_ms(work, ()) == 1000.0 and ROOF.step_ms(work, [1]) == 3000.0
    assert ROOF.expected_ms(work, 0.5) == 2000.0


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("aten::mm", [(4, 5), (5, 6)], 2 * 4 * 5 * 6),
        ("aten::addmm", [(6,), (4, 5), (5, 6)], 2 * 4 * 5 * 6),
        ("aten::bmm", [(3, 4, 5), (3, 5, 6)], 3 * 2 * 4 * 5 * 6),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [(2, 3, 8, 4)] * 3, 2 * 2 * (2 * 3 * 8 * 8 * 4)),
        ("aten::relu", [(4, 5)], 0),
        ("aten::mm", [(4, 5)], 0),
    ],
)
def test_operations_of_an_operator(name, shapes, flops):
    assert operator_flops(name, None, shapes, None) == flops


def test_the_rates_of_this_machine_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    device = torch.device("cpu")
    found = roofline_of(device)
    assert found.bytes_per_s > 1e8 and all(rate > 1e8 for rate in found.flops_per_s.values())
    monkeypatch.setattr("slimfit_fx.planning.roofline.measure", lambda _: pytest.fail("measured twice"))
    assert roofline_of(device) == found and callable(measure)


def test_products_of_a_step_are_counted_by_gate():
    """With the interpreter: forward always, what only the gradient of one weight needs if it is open."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    model, session = optimized(layers, preset="exact", scheduler="none", min_bytes=0, units="*")
    model(torch.randn(32, 8)).sum().backward()
    traced = step_trace(session.backend.graphs)
    assert not isinstance(traced, str)
    trace, names = traced
    by_gate = {None: 0.0} | {k: 0.0 for k in range(len(names))}
    for work in trace.work:
        by_gate[next(iter(work.gates), None)] += work.flops
    small, large = 2 * 32 * 8 * 16, 2 * 32 * 16 * 4
    assert by_gate[None] == small + large
    found = {names[k]: by_gate[k] for k in range(len(names))}
    assert found == {"0.weight": small + large, "1.weight": large}, "the first needs the gradient between the two"


def test_work_survives_json():
    trace = StepTrace((), 0, {}, 1, (Work(3.0, 4, "float32", frozenset([0])), Work(0.0, 8, "int8")))
    assert StepTrace.from_dict(trace.to_dict()) == trace


def test_the_front_is_what_nothing_else_beats():
    points = [FrontPoint(n, True, peak, ms) for n, peak, ms in (("a", 10, 5.0), ("b", 20, 3.0), ("c", 20, 4.0))]
    twin = dataclasses.replace(points[0], name="d")
    marked = {p.name: p.on_front for p in mark_front([*points, twin])}
    assert marked == {"a": True, "b": True, "c": False, "d": True}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.inductor
def test_a_front_of_a_small_model(tmp_path):
    model, said = Tiny(depth=3), []
    found = slimfit_fx.front(model, tokens(batch=64), presets=("exact",), shares=(0.5,), say=said.append, min_bytes=0)
    names = {p.name for p in found.points}
    assert names == set(said) and {"preset exact", "torch.compile", "activation_memory_budget 0.5"} < names
    by_name = {p.name: p for p in found.points}
    assert by_name["preset exact, recompute products"].peak_bytes < by_name["preset exact"].peak_bytes
    assert by_name["preset exact"].peak_bytes < by_name["torch.compile"].peak_bytes
    assert any(p.on_front for p in found.points) and "front" in str(found) and found.to_dict()["points"]
    found.save_picture(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
