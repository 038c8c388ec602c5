"""The measurement itself: known allocations must come back to the byte."""

from __future__ import annotations

import gc

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.measure import Block, Event, replay, step_peak

# blocks to allocate (> 0: that many bytes) and to release (<= 0: the block of that rank among those alive)
_ACTIONS = st.lists(st.integers(-4, 5000), max_size=40)


def _play(actions: list[int]) -> list[torch.Tensor]:
    alive: list[torch.Tensor] = []
    for action in actions:
        if action > 0:
            alive.append(torch.empty(action, dtype=torch.uint8))
        elif alive:
            alive.pop(-action % len(alive))
    return alive


def _expected(actions: list[int]) -> tuple[int, list[int]]:
    """Peak and the sizes alive at the end, by plain arithmetic."""
    alive: list[int] = []
    peak = 0
    for action in actions:
        if action > 0:
            alive.append(action)
        elif alive:
            alive.pop(-action % len(alive))
        peak = max(peak, sum(alive))
    return peak, alive


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(_ACTIONS)
def test_peak_equals_arithmetic(actions: list[int]) -> None:
    peak, alive = _expected(actions)
    found = step_peak(lambda: _play(actions))
    assert (found.peak_bytes, found.end_bytes) == (peak, sum(alive))
    assert sum(block.size_bytes for block in found.alive_at_peak) == peak
    assert max(total for _, total in found.timeline) == peak
    assert found.timeline[-1][1] == found.end_bytes


@settings(max_examples=examples(20), deadline=None, derandomize=True)
@given(_ACTIONS, _ACTIONS)
def test_halves_equal_arithmetic(first: list[int], second: list[int]) -> None:
    forward_peak, alive = _expected(first)
    later_peak, _ = _expected(second)
    found = step_peak(lambda: _play(first), backward=lambda kept: _play(second))
    assert found.saved_bytes == sum(alive)
    assert found.forward_peak_bytes == forward_peak
    assert found.backward_peak_bytes == sum(alive) + later_peak
    assert found.peak_bytes == max(forward_peak, sum(alive) + later_peak)
    assert found.peak_phase == ("forward" if forward_peak >= sum(alive) + later_peak else "backward")


def test_a_linear_step_is_known_to_the_byte() -> None:
    layer = nn.Linear(32, 8, bias=False)
    x = torch.randn(16, 32)
    found = step_peak(lambda: layer(x).sum(), backward=lambda loss: loss.backward())
    output, loss, weight_grad = 16 * 8 * 4, 4, 8 * 32 * 4
    assert found.forward_peak_bytes == output + loss
    assert found.saved_bytes == loss  # the sum saves no value, and x was there before
    assert found.end_bytes == loss + weight_grad


def test_the_op_that_allocated_is_named() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert step_peak(lambda: a @ b).alive_at_peak == (Block(64 * 64 * 4, "aten::mm"),)


def test_a_storage_resized_to_zero_counts_as_released() -> None:
    def ghost() -> torch.Tensor:
        out = torch.empty(1000, dtype=torch.uint8)
        out.untyped_storage().resize_(0)
        return out

    found = step_peak(ghost)
    assert (found.peak_bytes, found.end_bytes) == (1000, 0)


def test_blocks_from_before_the_step_do_not_count() -> None:
    held = [torch.empty(5000, dtype=torch.uint8)]
    step_peak(lambda: held.append(torch.empty(7000, dtype=torch.uint8)))  # outlives its own step

    def release_then_allocate() -> torch.Tensor:
        held.clear()
        return torch.empty(3000, dtype=torch.uint8)

    found = step_peak(release_then_allocate)
    assert (found.peak_bytes, found.end_bytes) == (3000, 3000)


def test_garbage_from_before_is_collected_first() -> None:
    gc.disable()
    try:
        cycle: list[object] = [torch.empty(5000, dtype=torch.uint8)]
        cycle.append(cycle)
        del cycle
        found = step_peak(lambda: (gc.collect(), torch.empty(10, dtype=torch.uint8))[1])
    finally:
        gc.enable()
    assert (found.peak_bytes, found.foreign_frees) == (10, 0)


def test_measuring_does_not_change_what_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(256), nn.Linear(256, 8))
    x = torch.randn(128, 64)

    def gradients(measured: bool) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        if measured:
            step_peak(lambda: model(x).square().mean(), backward=lambda loss: loss.backward())
        else:
            model(x).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, measured in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, measured)


def test_the_same_step_measures_the_same_every_time() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    x = torch.randn(128, 64)
    peaks = set()
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        found = step_peak(lambda: model(x).square().mean(), backward=lambda loss: loss.backward())
        peaks.add((found.peak_bytes, found.saved_bytes, found.end_bytes, found.foreign_frees))
    assert len(peaks) == 1


def test_replay_of_nothing_is_zero() -> None:
    found = replay([], boundary_ns=5)
    assert (found.peak_bytes, found.saved_bytes, found.backward_peak_bytes, found.timeline) == (0, 0, 0, ((0, 0),))


def test_replay_ignores_releases_of_unknown_blocks_and_says_so() -> None:
    found = replay([Event(1, 100, 7, ""), Event(2, -50, 8, ""), Event(3, -100, 7, "")])
    assert (found.peak_bytes, found.end_bytes, found.foreign_frees) == (100, 0, 1)


def test_replay_takes_an_address_handed_out_again_as_released() -> None:
    found = replay([Event(1, 100, 7, "first"), Event(2, 30, 7, "second")])
    assert (found.peak_bytes, found.end_bytes) == (100, 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("timeline", [True, False])
def test_cuda_counters(timeline: bool) -> None:
    def forward() -> torch.Tensor:
        torch.empty(4 << 20, dtype=torch.uint8, device="cuda")  # released at once
        return torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

    def backward(kept: torch.Tensor) -> None:
        torch.empty(2 << 20, dtype=torch.uint8, device="cuda")

    found = step_peak(forward, backward=backward, device="cuda", timeline=timeline)
    assert (found.forward_peak_bytes, found.saved_bytes) == (4 << 20, 1 << 20)
    assert (found.backward_peak_bytes, found.peak_bytes, found.end_bytes) == (3 << 20, 4 << 20, 1 << 20)
    if timeline:
        assert max(total for _, total in found.timeline) == found.peak_bytes
