"""The core promises on a GPU: gradients, gates, no host sync, no recompile, predicted memory. Skipped without one."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import Watch, shard
from reference import compile_reference, cosine, differences, equal_bits, optimized, step
from small_models import Block, Tiny, tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

import slimfit_fx
from slimfit_fx.codecs import get_codec
from slimfit_fx.planning.workspaces import library_bytes

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PATTERNS = [(), ("blocks.0.qkv.weight",), ("blocks.1.up.weight", "norm.weight", "embed.weight"), ("*",)]
ROUTES = ("interpreter", "inductor")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Attention whose backward adds up in one order, so that two runs of one graph agree to the bit."""
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        yield


def tiny(**settings: Any) -> nn.Module:
    return Tiny(**settings).to(DEVICE)


def batch(seed: int = 0, **sizes: int) -> tuple[Tensor, Tensor]:
    return tuple(x.to(DEVICE) for x in tokens(seed, **sizes))


def close(session: slimfit_fx.Session, patterns: tuple[str, ...]) -> frozenset[str]:
    session.unfreeze()
    if patterns:
        session.freeze(patterns)
    return frozenset(n for n in session.gates.names if n in patterns or "*" in patterns)


def relative_errors(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    both = [n for n in expected if expected[n] is not None and found[n] is not None]
    return {n: float((expected[n] - found[n]).norm() / expected[n].norm().clamp_min(1e-20)) for n in both}


def without_atomics(*grads: dict[str, Any]) -> list[dict[str, Any]]:
    """All but the embedding's gradient, which a GPU adds up in any order."""
    return [{n: g for n, g in one.items() if n != "embed.weight"} for one in grads]


@pytest.mark.parametrize("executor", ROUTES)
def test_open_units_have_the_gradients_of_the_graph_without_us(executor):
    reference = tiny(dropout=0.0)
    expected_loss, expected = step(compile_reference(reference, executor=executor), reference, batch())
    model, session = optimized(tiny(dropout=0.0), executor=executor, preset="exact", scheduler="none")
    first = None
    for pattern in PATTERNS:
        closed = close(session, pattern)
        loss, grads = step(model, model, batch())
        assert session.executor == executor and session.gates.closed == closed
        assert all((grads[n] is None) == (n in closed) for n in grads)
        first = first or grads
        assert differences(*without_atomics(first, grads), closed=closed) == [], "one graph: to the bit"
        if executor == "interpreter":
            assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=closed) == []
        else:  # kernels are fused otherwise and add up in another order
            torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
            assert max(relative_errors(expected, grads).values(), default=0.0) < 1e-4
    assert (session.compiles, session.recompiles) == (1, 0)


@pytest.mark.parametrize("executor", ROUTES)
def test_dropout_masks_survive_as_bits(executor):
    model, session = optimized(tiny(dropout=0.5), executor=executor, preset="exact", scheduler="none")
    _, opened = step(model, model, batch())
    closed = close(session, ("blocks.0.up.weight", "blocks.1.qkv.weight"))
    _, grads = step(model, model, batch())
    assert differences(*without_atomics(opened, grads), closed=closed) == []


@pytest.mark.parametrize("preset", ["balanced", "max", "paper"])
def test_compressed_gradients_are_close(preset):
    reference = tiny(dropout=0.0)
    _, expected = step(compile_reference(reference, executor="inductor"), reference, batch())
    model, session = optimized(tiny(dropout=0.0), executor="inductor", preset=preset, scheduler="none")
    _, grads = step(model, model, batch())
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads.values())
    assert cosine(expected, grads) > (0.999 if preset == "balanced" else 0.9)


def test_no_ghost_is_read_in_nan_mode():
    model, session = optimized(tiny(), executor="inductor", preset="balanced", scheduler="none", debug=True)
    _, expected = step(model, model, batch())
    closed = close(session, PATTERNS[2])
    _, grads = step(model, model, batch())
    assert differences(*without_atomics(expected, grads), closed=closed) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_never_recompiles_and_closed_units_stand_still(dtype):
    model, session = optimized(tiny(), executor="inductor", preset="balanced", freeze_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for number in range(20):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype):
            loss = model(*batch(number % 2))
        loss.backward()
        closed = session.gates.closed
        assert closed and {n for n, p in model.named_parameters() if p.grad is None} == closed
        before = {n: model.get_parameter(n).detach().clone() for n in closed}
        optimizer.step()
        assert all(torch.equal(before[n], model.get_parameter(n)) for n in closed)
        losses.append(loss.item())
    assert (session.compiles, session.recompiles, session.steps) == (1, 0, 20)
    assert len({chosen for _, chosen in session.gates.history}) > 1 and losses[-1] < losses[0]


@pytest.mark.parametrize("executor", ROUTES)
def test_a_step_never_waits_for_the_device(executor):
    model, session = optimized(tiny(), executor=executor, preset="balanced", freeze_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batch()

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(*data).backward()
        optimizer.step()

    for _ in range(6):
        train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert session.recompiles == 0 and session.steps == 12


def test_a_resumed_run_equals_the_run_without_a_stop():
    def start() -> tuple[nn.Module, slimfit_fx.Session, torch.optim.Optimizer]:
        model, session = optimized(tiny(), executor="interpreter", preset="balanced", freeze_rate=0.5)
        return model, session, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            step(model, model, batch(number), seed=number)
            optimizer.step()

    whole, session, optimizer = start()
    train(whole, optimizer, range(6))
    saved = {
        "model": {k: v.clone() for k, v in whole.state_dict().items()},
        "optimizer": {**optimizer.state_dict()},
        "session": session.state_dict(),
    }
    saved["optimizer"] = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) else x, saved["optimizer"]
    )
    train(whole, optimizer, range(6, 12))
    resumed, again, other = start()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["session"])
    train(resumed, other, range(6, 12))
    assert again.gates.history[-6:] == session.gates.history[-6:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("executor", ROUTES)
def test_a_model_that_moves_to_the_device_keeps_its_gates(executor):
    model, session = optimized(Tiny(dropout=0.0), executor=executor, preset="exact", scheduler="none")
    closed = close(session, ("blocks.0.qkv.weight", "blocks.1.up.weight"))
    model.to(DEVICE)
    reference = tiny(dropout=0.0)
    _, expected = step(compile_reference(reference, executor=executor), reference, batch())
    _, grads = step(model, model, batch())
    assert {name for name, grad in grads.items() if grad is None} == closed == session.gates.closed
    assert max(relative_errors(expected, grads).values()) < 1e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    watch = Watch(model, session, optimizer)
    for number in range(3):
        step(model, model, batch(number))
        optimizer.step()
    assert session.steps == 3 and session.compiles == 1
    assert watch.looked == 3 * len(closed) and watch.moved == [] and watch.gradients == []


@pytest.fixture
def one_rank(tmp_path: pathlib.Path) -> Iterator[None]:
    """A distributed job of this process alone."""
    if not dist.is_nccl_available():
        pytest.skip("needs NCCL")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_with_nccl(kind):
    model, session = optimized(tiny(depth=1, dropout=0.0), preset="exact", scheduler="random", freeze_rate=0.6)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if kind == "ddp" else shard(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    watch = Watch(model, session, optimizer)
    for number in range(6):
        optimizer.zero_grad()
        net(*batch(number)).backward()
        optimizer.step()
    assert session.steps == 6 and session.recompiles == 0
    assert len({opened for _, opened in session.gates.history}) > 2
    assert watch.looked and watch.moved == [] and watch.gradients == []
    if kind == "ddp":
        assert session.traffic.bytes_full - session.traffic.bytes_sent == watch.closed_bytes > 0


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "bits"])
def test_codecs_give_what_they_give_on_the_cpu(name):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(7, 5, 130, generator=generator)
    value = value > 0 if name == "bits" else value
    codec = get_codec(name)
    results = []
    for device in ("cpu", DEVICE):
        there = value.to(device)
        parts = codec.encode(there)
        assert all(part.device.type == device for part in parts)
        results.append(codec.decode(parts, value.dtype, value.shape[-1]).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_attention_stays_in_one_kernel(dtype):
    """At sizes of a ViT: its 577 tokens divide by nothing, and a table of all pairs of them would be seen."""
    with torch.nn.attention.sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        model = nn.Sequential(*(Block(256, 4, dropout=0.0) for _ in range(3))).to(DEVICE)
        optimized(model, executor="inductor", preset="balanced", freeze_rate=0.5)
        x = torch.randn(16, 577, 256, device=DEVICE)
        with torch._functorch.config.patch(enable_autograd_cache=False):  # a graph from it comes without its code
            with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
                loss = model(x).square().mean()
            loss.backward()
        session = slimfit_fx.session(model)
        code = "".join(code.source for graph in session.backend.graphs for code in graph.codes)
        assert "attention" in code and "extern_kernels.bmm" not in code
        pairs = 16 * 4 * 577 * 577
        assert not any(math.prod(row.shape) >= pairs for row in session.plan.rows), session.plan.rows


def test_a_peak_is_predicted_to_the_percent():
    from bench.measure import step_peak

    with torch.nn.attention.sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        model, session = optimized(tiny(depth=3), executor="inductor", preset="balanced", freeze_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        data = batch(batch=64, length=256)
        for number in range(8):
            optimizer.zero_grad(set_to_none=True)
            if number < 4:  # every kernel runs once: Inductor times its variants then, in memory of its own
                model(*data).backward()
            else:
                found = step_peak(lambda: model(*data), backward=Tensor.backward, device=DEVICE, timeline=False)
                predicted = session.predict_peak().peak_bytes
                assert abs(predicted / found.peak_bytes - 1) <= 0.03, (number, predicted, found.peak_bytes)
                assert found.peak_bytes <= 1.01 * session.plan.peak.worst_bytes
            optimizer.step()


def test_a_memory_budget_holds(cheap_only):
    with torch.nn.attention.sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        model, data = tiny(depth=3), batch(batch=64, length=256)
        libraries = library_bytes(torch.device(DEVICE))
        config = slimfit_fx.Config(memory_budget=80 * 2**20 + libraries, preset="max", min_bytes=256)
        slimfit_fx.optimize(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.cuda.synchronize()
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        others = torch.cuda.memory_allocated() - own
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            optimizer.zero_grad(set_to_none=True)
            model(*data).backward()
            optimizer.step()
        most = torch.cuda.max_memory_allocated() - others
        assert most <= 1.01 * config.memory_budget, (most, others, slimfit_fx.session(model).plan.notes)
