"""What time is worth: milliseconds by a roofline, the bytes that stand for them, and where the rates come from."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import stopped_after
from hypothesis import given
from hypothesis import strategies as st
from small_models import Tiny, tokens
from torch._subclasses import FakeTensorMode

import slimfit_fx
from slimfit_fx.capture import partitioner
from slimfit_fx.capture.partitioner import GatedPartitioner
from slimfit_fx.config import Config
from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import GateLayout, nbytes
from slimfit_fx.planning import prices, roofline
from slimfit_fx.planning.prices import BYTES_PER_BYTE_MOVED, REFERENCE, Prices, inner_size, rounded
from slimfit_fx.planning.roofline import Roofline
from slimfit_fx.planning.rows import ExpectedTime, GraphPlan

MEASURED = prices._measured
"""As it is: tests have the reference in its place (conftest.py)."""
RATES = st.floats(1e6, 1e16)


@given(flops=RATES, bandwidth=RATES)
def test_rates_are_rounded_to_powers_of_two_and_are_then_as_they_are(flops, bandwidth):
    found = rounded(Roofline({"float32": flops}, bandwidth))
    assert math.log2(found.bytes_per_s).is_integer() and math.log2(found.flops_per_s["float32"]).is_integer()
    off = [found.bytes_per_s / bandwidth, found.flops_per_s["float32"] / found.bytes_per_s / (flops / bandwidth)]
    assert all(2**-0.5001 <= ratio <= 2**0.5001 for ratio in off)
    assert rounded(found) == found


def forward_nodes():
    graph = stopped_after("split_joint", Tiny(), tokens()).work.pair().forward.graph
    return [n for n in graph.nodes if ops.is_tensor(n)]


def test_a_product_takes_its_operations_and_anything_else_its_bytes():
    nodes, ours = forward_nodes(), Prices(Roofline({"float32": 8e9}, 2e9))
    products = [n for n in nodes if ops.is_matrix_product(n)]
    pointwise = [n for n in nodes if ops.op_name(n) == "mul" and n.meta["val"].dtype == torch.float32]
    assert products and pointwise
    for node in products:
        assert ours.operator_ms(node) == pytest.approx(2e3 * node.meta["val"].numel() * inner_size(node) / 8e9)
    for node in pointwise:
        assert ours.operator_ms(node) == pytest.approx(1e3 * nbytes(node) / 2e9)


def test_bytes_that_must_be_saved_do_not_depend_on_the_bandwidth_but_on_the_balance():
    """Twice as fast in both: the same plan. Faster products: they are run again for fewer bytes."""
    (node, *_) = (n for n in forward_nodes() if ops.is_matrix_product(n))
    slow, fast, strong = (
        Prices(Roofline({"float32": flops}, bandwidth)) for flops, bandwidth in ((4e9, 1e9), (8e9, 2e9), (8e9, 1e9))
    )
    bytes_of = [each.bytes_for(each.operator_ms(node)) for each in (slow, fast, strong)]
    assert bytes_of[0] == pytest.approx(bytes_of[1]) == pytest.approx(2 * bytes_of[2])
    assert slow.bytes_for(slow.traffic_ms(1000)) == pytest.approx(1000 * BYTES_PER_BYTE_MOVED)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Rates are measured, once for all and into an empty folder; a list of the devices that were."""
    devices = []

    def measure(device):
        devices.append(device)
        return Roofline({"float32": 6e9, "bfloat16": 1e9}, 1e9)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(roofline, "measure", measure)
    monkeypatch.setattr(prices, "_measured", MEASURED)
    MEASURED.cache_clear()
    yield devices
    MEASURED.cache_clear()


def test_rates_are_measured_once_for_each_device_and_kept(asked):
    found = prices.prices_of(torch.device("cpu"))
    assert found.roofline == rounded(Roofline({"float32": 6e9, "bfloat16": 1e9}, 1e9))
    MEASURED.cache_clear()  # another process
    assert prices.prices_of(torch.device("meta")) == found, "a plan on the meta device is one for the CPU"
    assert asked == [torch.device("cpu")]


def test_what_cannot_be_measured_is_planned_by_the_reference(asked, monkeypatch, caplog):
    def fails(_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(roofline, "measure", fails)
    assert prices.prices_of(torch.device("cpu")).roofline == REFERENCE
    assert "could not be measured" in caplog.text


def test_rates_can_be_measured_in_the_middle_of_a_trace(monkeypatch):
    monkeypatch.setattr(roofline, "_SIZES", {"cpu": (32, 1 << 16)})
    with FakeTensorMode(), torch.enable_grad():
        found = roofline.measure(torch.device("cpu"))
    assert 0 < found.bytes_per_s < 1e15 and all(0 < rate < 1e18 for rate in found.flops_per_s.values())


def test_other_prices_name_another_partition(monkeypatch):
    ours = GatedPartitioner(Config(), GateLayout(3, ((0,), (1,))))
    before = ours.uuid()
    monkeypatch.setattr(partitioner, "prices_of", lambda device: Prices(Roofline({"float32": 1e12}, 1e9)))
    assert ours.uuid() != before


def test_faster_products_run_again_where_slower_ones_do_not(monkeypatch):
    def products_again(balance: float) -> int:
        monkeypatch.setattr(partitioner, "prices_of", lambda device: Prices(Roofline({"float32": balance}, 1.0)))
        bench = stopped_after(
            "split_joint", Tiny(depth=3), tokens(batch=8), preset="exact", recompute="products", min_bytes=0
        )
        assert bench.work.planning is not None and bench.work.planning.cut is not None
        return sum(map(ops.is_matrix_product, bench.work.planning.cut.recomputed))

    assert products_again(1e-3) < products_again(1e6)


@pytest.mark.parametrize("recompute", ["cheap", pytest.param("blocks", marks=pytest.mark.thorough)])
def test_a_plan_tells_the_time_it_expects(recompute):
    def time_of(**settings) -> ExpectedTime:
        config = Config(recompute=recompute, min_bytes=0, **settings)
        found = slimfit_fx.plan(Tiny(depth=2), *tokens(batch=8), config=config)
        assert found.time is not None and f"{found.time.again_ms:.3g} ms more for what runs again" in str(found)
        return found.time

    frozen, open_, exact = time_of(), time_of(freeze_rate=0.0), time_of(preset="exact")
    assert frozen.spared_ms > 0 and open_.spared_ms == 0
    assert frozen.codecs_ms > exact.codecs_ms >= 0 and frozen.again_ms > 0


def test_expected_times_add_up_and_survive_a_file():
    one, other = ExpectedTime(1.0, 2.0, 3.0), ExpectedTime(0.5, 0.5, 0.5)
    assert one + other == ExpectedTime(1.5, 2.5, 3.5)
    for time in (one, None):
        plan = GraphPlan((), (), (), time=time, blocks=4)
        assert GraphPlan.from_dict(plan.to_dict()) == plan
