"""The sample that distances are measured on: which elements it has, what it copies, and how near it comes to all."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from effort import first
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from small_models import Tiny, tokens
from torch import nn

from bench.measure import recorded_step, replay
from slimfit_fx.runtime import peers
from slimfit_fx.schedule import (
    Sample,
    combine_parts,
    distance_parts,
    distance_parts_of_all,
    update_distance,
)

SHAPES = st.lists(st.integers(1, 12), max_size=4)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def peak_of(function) -> int:
    return replay(recorded_step(lambda: None, lambda _: function())).peak_bytes


# ---- which elements


@given(numel=st.integers(0, 10**6), most=st.integers(1, 10**5))
def test_the_spacing_is_the_smallest_that_shares_no_divisor(numel, most):
    sample = Sample.of(numel, most)
    if numel <= most:
        assert sample.everything and sample.numel == numel
        return
    run = 16 if most >= 1024 else 1
    factor = sample.spacing // run
    assert sample.run == run and sample.spacing == run * factor and math.gcd(factor, numel) == 1
    least = math.ceil(numel / (most // run * run))
    assert all(math.gcd(smaller, numel) > 1 for smaller in range(least, factor))
    assert sample.numel == len(places_of(sample)) <= most


def places_of(sample: Sample) -> list[int]:
    """By the definition: runs that are whole."""
    starts = range(0, sample.whole - sample.run + 1, sample.spacing)
    return [start + k for start in starts for k in range(sample.run)]


def test_no_limit_is_all():
    x = numbered(30, 40)
    sample = Sample.of(1200, None)
    assert sample.everything and sample.numel == 1200
    assert sample.take(x) is x


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (30522, 768), (2, 768), (1024, 4096)])
@pytest.mark.parametrize("most", [1 << 16, 1000])
def test_rows_and_columns_are_met_equally_often(shape, most):
    sample = Sample.of(math.prod(shape), most)
    places = torch.tensor(places_of(sample))
    columns, rows = torch.bincount(places % shape[1], minlength=shape[1]), torch.bincount(places // shape[1])
    assert columns.max() - columns.min() <= 1
    assert rows.max() - rows.min() <= sample.run


@given(shape=SHAPES, run=st.integers(1, 5), factor=st.integers(2, 9))
@settings(deadline=None, max_examples=100)
def test_a_contiguous_tensor_is_sampled_in_order(shape, run, factor):
    x = numbered(*shape)
    sample = Sample(x.numel(), run, run * factor)
    assert sample.take(x).flatten().tolist() == places_of(sample)


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbered(300, 200),
        lambda: numbered(300, 200).t(),
        lambda: numbered(20, 30, 10, 10).to(memory_format=torch.channels_last),
        lambda: numbered(400, 200)[100:],
        lambda: numbered(1, 60000).expand(1, 60000).t(),
    ],
    ids=["contiguous", "transposed", "channels_last", "with an offset", "a dimension of 1"],
)
def test_a_tensor_without_gaps_is_read_in_memory_order_and_never_copied(make):
    x = make()
    in_order = torch.as_strided(x, (60000,), (1,))
    for sample in (Sample(60000, 1, 7), Sample(60000, 16, 112)):
        found = sample.take(x)
        assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(found.flatten(), in_order[places_of(sample)])
        assert peak_of(lambda s=sample: s.take(x).clone()) <= 4 * sample.numel + 64


@pytest.mark.parametrize("make", [lambda: numbered(30, 20)[:, ::2], lambda: numbered(30, 1).expand(30, 10)])
def test_a_tensor_with_gaps_or_overlaps_is_flattened(make):
    flat = make().flatten()
    for sample in (Sample(300, 1, 7), Sample(300, 16, 48)):
        assert torch.equal(sample.take(make()).flatten(), flat[places_of(sample)])


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1,), (1, 1)])
def test_tensors_of_one_element_or_none(shape):
    x = torch.ones(shape)
    for sample in (Sample.of(x.numel(), 1), Sample(x.numel(), 1, 5)):
        found = sample.take(x)
        assert found.numel() == sample.numel == x.numel()
        assert update_distance(found.clone(), found).item() == 0.0


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    ranks=st.integers(1, 6),
    run=st.integers(1, 20),
    factor=st.integers(2, 9),
)
@settings(deadline=None, max_examples=200)
def test_shards_have_the_sample_of_the_whole(rows, columns, ranks, run, factor):
    """Cut as FSDP2 does: by ``torch.chunk``, with fewer rows or none at the end; runs may go over several shards."""
    before = numbered(rows, columns) + 1
    after = before + torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    sample = Sample(before.numel(), run, run * factor)
    chunk = -(-rows // ranks)
    cuts = [(min(r * chunk, rows), min((r + 1) * chunk, rows)) for r in range(ranks)]
    shards = [[sample.take(x[a:b], offset=a * columns) for a, b in cuts] for x in (before, after)]
    assert torch.equal(torch.cat([s.flatten() for s in shards[0]]), sample.take(before).flatten())
    for metric in ("relative_mean", "relative_norm"):
        parts = [distance_parts(b, a, metric=metric) for b, a in zip(*shards, strict=True)]
        whole = update_distance(sample.take(before), sample.take(after), metric=metric)
        torch.testing.assert_close(combine_parts(torch.stack(parts).sum(0), metric=metric), whole)


# ---- how near it comes


def adamw_step(shape: tuple[int, ...], seed: int, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as they are initialised, and the same after a step of AdamW some steps into a run."""
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
    optimizer = torch.optim.AdamW([param], lr=lr, weight_decay=0.01)
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return before, param.detach()


def sampled_distance(before, after, most=1 << 16, metric="relative_mean") -> float:
    sample = Sample.of(before.numel(), most)
    return update_distance(sample.take(before), sample.take(after), metric=metric).item()


@pytest.mark.parametrize(("most", "tolerance"), [(1 << 16, 0.01), (1024, 0.1)])
@pytest.mark.parametrize("shape", [(768, 768), (768, 3072)])
def test_the_relative_norm_is_close(shape, most, tolerance):
    for seed in range(5):
        before, after = adamw_step(shape, seed, 5e-5)
        whole = update_distance(before, after, metric="relative_norm").item()
        assert sampled_distance(before, after, most, "relative_norm") == pytest.approx(whole, rel=tolerance)


def test_the_relative_mean_ranks_what_clearly_differs_and_does_not_grow_with_the_tensor():
    """The mean of |dw/w| has a heavy tail: one weight near 0 is as much as thousands. So factors, not percents."""
    by_rate = [[adamw_step((768, 768), seed, rate) for seed in range(5)] for rate in (5e-6, 5e-5, 5e-4)]
    found = [[sampled_distance(*move) for move in moves] for moves in by_rate]
    assert all(2 * max(slow) < min(fast) for slow, fast in zip(found, found[1:], strict=False))
    few = [statistics.median(sampled_distance(*move, 1024) for move in moves) for moves in by_rate]
    assert all(5 * slow < fast for slow, fast in zip(few, few[1:], strict=False))
    small, large = ([adamw_step(shape, seed, 5e-5) for seed in range(5)] for shape in ((256, 256), (2048, 1024)))
    of_small, of_large = (statistics.median(sampled_distance(*move) for move in moves) for moves in (small, large))
    assert of_large == pytest.approx(of_small, rel=0.3)


# ---- in training


def test_a_session_measures_the_sample():
    torch.manual_seed(0)
    model, session = optimized(Tiny(dropout=0.0), scheduler="ils_paper", freeze_rate=0.0, distance_sample=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model(*tokens(0)).backward()
    optimizer.step()
    session.before_forward()
    for name, distance in session.scheduler.distances.items():
        assert distance == sampled_distance(before[name], model.get_parameter(name).detach(), 50), name
    assert any(model.get_parameter(name).numel() > 50 for name in session.gates.names)


@pytest.mark.parametrize("most", first([1000, 2000, None, 1 << 16]))
def test_what_is_remembered_is_what_is_predicted(most):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Conv2d(40, 30, 3), nn.Linear(10, 10))
    model[2].to(memory_format=torch.channels_last)
    model, session = optimized(model, freeze_rate=0.0, distance_sample=most)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    session.before_forward()
    copied = peak_of(lambda: session._tracker.before_step(frozenset(map(id, model.parameters()))))
    units = [model.get_parameter(name).numel() for name in session.gates.names]
    assert copied == 4 * sum(Sample.of(numel, most).numel for numel in units)
    predicted = session.predict_update()
    session._tracker.begin_step()
    found = sum(4 * p.numel() for p in model.parameters()) + peak_of(optimizer.step)
    assert found <= predicted + 64 and predicted <= 1.06 * found


def test_sums_go_over_every_way_in_which_a_parameter_is_sharded(monkeypatch):
    """FSDP2 over tensor parallelism: rows are cut twice, once with a placement of its own class."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    summed: list[str] = []
    monkeypatch.setattr(peers.dist, "all_reduce", lambda parts, group: summed.append(group))
    mesh = SimpleNamespace(get_group=lambda dim: ("data", "tensor", "replicas")[dim])
    placements = (_StridedShard(0, split_factor=2), Shard(0), Replicate())
    peers.sum_over_shards(torch.ones(3), SimpleNamespace(placements=placements, device_mesh=mesh))
    assert summed == ["data", "tensor"]


@pytest.mark.parametrize("metric", ["relative_mean", "relative_norm"])
@pytest.mark.parametrize("chunk", [40, 1 << 15])
def test_many_tensors_measured_together_are_measured_alike(metric, chunk, monkeypatch):
    monkeypatch.setattr("slimfit_fx.schedule.distance._CPU_CHUNK_NUMEL", chunk)
    generator = torch.Generator().manual_seed(0)
    shapes, dtypes = [(3, 7), (5,), (), (50, 2), (0, 4), (11,), (2, 9)], [torch.float32] * 5 + [torch.bfloat16] * 2
    befores = [torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    befores[1][0] = 0.0
    afters = [b + 0.01 * torch.randn(b.shape, generator=generator).to(b.dtype) for b in befores]
    afters[0] = afters[0].t().contiguous().t()
    together = distance_parts_of_all(befores, afters, metric=metric)
    for found, before, after in zip(together, befores, afters, strict=True):
        torch.testing.assert_close(found, distance_parts(before, after, metric=metric))
