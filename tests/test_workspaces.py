"""What operators take for themselves: measured where that is cheap, and never less than the truth where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slimfit_fx.planning import workspaces
from slimfit_fx.planning.blocks import Meter, TensorSpec, contiguous_strides
from slimfit_fx.planning.call_memory import device_of, measure_call
from slimfit_fx.planning.stand_ins import DryRun
from slimfit_fx.planning.workspaces import call_memory, workspace_bytes

A = torch.ops.aten
CPU = torch.device("cpu")
Call = tuple[str, Callable[..., Any], tuple[Any, ...]]


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(shape, contiguous_strides(shape), dtype, CPU)


def heads(batch: int, count: int, length: int, width: int, dtype: torch.dtype) -> TensorSpec:
    """(batch, heads, length, width), as models have it: a view of (batch, length, heads, width)."""
    strides = (length * count * width, width, count * width, 1)
    return TensorSpec((batch, count, length, width), strides, dtype, CPU)


def convolution(batch: int, image: int, channels: int, dtype: torch.dtype) -> tuple[Call, Call]:
    value, weight = spec(batch, 3, image, image, dtype=dtype), spec(channels, 3, 16, 16, dtype=dtype)
    result = spec(batch, channels, image // 16, image // 16, dtype=dtype)
    common = ([16, 16], [0, 0], [1, 1], False, [0, 0], 1)
    forward = ("aten::convolution", A.convolution.default, (value, weight, spec(channels, dtype=dtype), *common))
    backward = (result, value, weight, [channels], *common, [False, True, True])
    return forward, ("aten::convolution_backward", A.convolution_backward.default, backward)


def attention(batch: int, count: int, length: int, width: int, dtype: torch.dtype) -> tuple[Call, Call]:
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    q, scores = heads(batch, count, length, width, dtype), (batch, count, length)
    sums = TensorSpec(scores, (count * length, 1, count), torch.float32, CPU)
    forward = (name, A._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q))
    backward = A._scaled_dot_product_flash_attention_for_cpu_backward.default
    return forward, (f"{name}_backward", backward, (q, q, q, q, q, sums, 0.0, False))


def product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Call]:
    return (("aten::mm", A.mm.default, (spec(rows, inner, dtype=dtype), spec(inner, columns, dtype=dtype))),)


FP32, BF16 = torch.float32, torch.bfloat16
CALLS: list[Call] = [
    call
    for dtype in (FP32, BF16)
    for calls in (
        convolution(4, 64, 64, dtype),
        convolution(7, 48, 100, dtype),
        attention(3, 4, 96, 64, dtype),
        attention(2, 3, 200, 32, dtype),
        attention(1, 2, 800, 64, dtype),
        product(512, 256, 1024, dtype),
        product(256, 2100, 64, dtype),
    )
    for call in calls
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_is_not_measured_is_never_less_than_the_truth(call, threads, monkeypatch):
    name, func, args = call
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = measure_call(func, args, {}).workspace_bytes
        from_less = workspace_bytes(name, func, args, {})
        monkeypatch.setattr(workspaces, "can_measure", lambda: False)
        from_formula = workspace_bytes(name, func, args, {})
    finally:
        torch.set_num_threads(before)
    assert found <= from_less <= 1.5 * found + 4096
    assert found <= from_formula


def test_a_measured_call_is_replayed_block_by_block():
    (name, func, args), _ = convolution(4, 64, 64, FP32)
    found = call_memory(name, func, args, {})
    run = DryRun(Meter())
    result = run.call_operator(func, tuple(run.of(a, None) if isinstance(a, TensorSpec) else a for a in args), {})
    deltas = [event.delta_bytes for event in run.meter.events]
    assert deltas == [size for _, size in found.events] and sum(deltas) == result.block.size == 4 * 64 * 16 * 4


def test_results_know_whose_memory_they_are():
    x = spec(4, 6)
    run = DryRun(Meter())
    given = run.of(x, run.meter.allocate(96, "x"))
    assert run.call_operator(A.transpose.int, (given, 0, 1), {}).block is given.block
    first, second = run.call_operator(A.split.Tensor, (given, 2), {})
    assert first.block is given.block is second.block and first.shape == (2, 6)
    values, places = run.call_operator(A.sort.default, (given,), {})
    assert values.block is not places.block and (values.block.size, places.block.size) == (96, 192)
    made = run.call_operator(A.arange.default, (5,), {"device": CPU})
    assert made.shape == (5,)


def test_random_state_is_left_alone_and_others_are_never_run():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert call_memory("aten::rand_like", A.rand_like.default, (spec(8),), {}) is not None
    assert torch.equal(torch.rand(2), expected)
    refused = lambda *_: pytest.fail("an operator of others was run")  # noqa: E731
    assert call_memory("their_library::send", refused, (spec(8),), {}) is None
    assert workspace_bytes("their_library::send", refused, (spec(8),), {}) == 0


def test_what_zeros_cannot_run_is_taken_to_need_nothing():
    def fails(*_: Any) -> Any:
        raise RuntimeError("singular")

    assert call_memory("aten::inverse_of_zeros", fails, (spec(3, 3),), {}) is None


# ---- what is on a GPU


def on(device: str, *shape: int) -> TensorSpec:
    return TensorSpec(shape, contiguous_strides(shape), FP32, torch.device(device))


@pytest.mark.parametrize(
    "given, here",
    [
        ([on("cuda:0", 4, 4), on("cuda:0")], True),
        ([on("cuda:0", 4, 4), on("cpu"), on("cpu")], True),  # seed and offset of a dropout
        ([on("cuda:0", 4, 4), on("cpu", 4)], False),
        ([on("cpu", 4), on("cpu")], True),
        ([on("meta", 4), on("cpu")], False),
    ],
)
def test_a_call_runs_where_its_tensors_are_numbers_aside(monkeypatch, given, here):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workspaces._runs_here("aten::mm", given) is here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workspaces._runs_here("aten::mm", given) is (here and given[0].device.type == "cpu")


def test_the_device_of_a_call_is_that_of_more_than_numbers():
    assert device_of([on("cpu"), on("cuda:0", 4)]) == torch.device("cuda:0")
    assert device_of([on("cuda:0"), 3.0]) == torch.device("cuda:0")
    assert device_of([1]) == device_of([]) == torch.device("cpu")
