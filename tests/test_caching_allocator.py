"""What CUDA's caching allocator hands out (slimfit_fx/planning/caching_allocator.py)."""

from __future__ import annotations

import random

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_fx.planning.caching_allocator import CachingAllocator, hands_out_more
from slimfit_fx.planning.peak import Event, StepTrace

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (0, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # what is left of a segment is not split off up to 1 MiB
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
    ],
)
def test_one_request(asked, allocated, reserved):
    one = CachingAllocator()
    address = one.take(asked)
    assert (one.allocated_bytes, one.size_of(address), one.reserved_bytes) == (allocated, allocated, reserved)
    one.let_go(address)
    assert (one.allocated_bytes, one.reserved_bytes) == (0, reserved)


def test_the_smallest_block_that_fits_is_taken():
    one = CachingAllocator()
    held = [one.take(size * MIB) for size in (40, 30, 14, 30)]
    for address in held[1:3]:
        one.let_go(address)
    assert one.take(13 * MIB) == held[2] and one.size_of(held[2]) == 14 * MIB, "1 MiB more than was asked for"
    assert one.take(12 * MIB) == held[1] and one.size_of(held[1]) == 12 * MIB, "split, as more would be left"
    assert one.take(18 * MIB) == held[1] + 12 * MIB


def test_neighbours_join_when_they_are_free():
    one = CachingAllocator()
    first, second, third = (one.take(6 * MIB) for _ in range(3))
    assert one.reserved_bytes == 20 * MIB
    for address in (first, third, second):
        one.let_go(address)
    assert one.take(9 * MIB) == first and one.take(9 * MIB) == first + 9 * MIB and one.reserved_bytes == 20 * MIB


requests = st.lists(st.tuples(st.integers(0, 24 * MIB), st.integers(0, 1 << 30)), max_size=60)


@settings(max_examples=examples(60))
@given(requests=requests)
def test_blocks_never_overlap_and_all_comes_back(requests):
    """Each request is followed by giving back the block that its second number picks, every other time."""
    one, held = CachingAllocator(), dict[int, int]()
    for turn, (size, pick) in enumerate(requests):
        address = one.take(size)
        assert address not in held and size <= one.size_of(address) < max(size, 1) + MIB + 512
        held[address] = one.size_of(address)
        if turn % 2:
            gone = sorted(held)[pick % len(held)]
            one.let_go(gone)
            del held[gone]
        ends = 0
        for start in sorted(held):
            assert start >= ends
            ends = start + held[start]
        assert one.allocated_bytes == sum(held.values()) <= one.reserved_bytes
    for address in held:
        one.let_go(address)
    left = list(one._blocks.values())
    assert all(block.free and block.before is block.behind is None for block in left), "whole segments"
    assert sum(block.size for block in left) == one.reserved_bytes and one.allocated_bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; an emulated one will do")
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_allocator_of_torch(seed):
    numbers, one = random.Random(seed), CachingAllocator()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    held: list[tuple[torch.Tensor, int]] = []
    for _ in range(200):
        if held and numbers.random() < 0.45:
            one.let_go(held.pop(numbers.randrange(len(held)))[1])
        else:
            most = numbers.choice([4096, 2 * MIB, 12 * MIB, 60 * MIB])
            size = numbers.randint(1, most)
            held.append((torch.empty(size, dtype=torch.uint8, device="cuda"), one.take(size)))
        now = torch.cuda.memory_allocated() - before[0], torch.cuda.memory_reserved() - before[1]
        assert now == (one.allocated_bytes, one.reserved_bytes)


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("", True),
        ("max_split_size_mb:64", True),
        ("expandable_segments:True", False),
        ("max_split_size_mb:64, expandable_segments:True", False),
        ("backend:cudaMallocAsync", False),
    ],
)
def test_settings_of_the_allocator_are_read(said, more, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
    assert hands_out_more() is more


def test_a_step_takes_what_is_handed_out_the_worse_of_two_times():
    """13 MiB come out of the 14 that were given back."""
    events = (Event(14 * MIB, 0), Event(-14 * MIB, 0), Event(13 * MIB, 1), Event(2 * MIB, 2, frozenset([0])))
    asked, handed = StepTrace(events, 2, {1: "x"}, 1), StepTrace(events, 2, {1: "x"}, 1, caching=True)
    assert asked.peak(()).timeline == (14 * MIB, 0, 13 * MIB, 13 * MIB)
    assert handed.peak(()).timeline == (14 * MIB, 0, 14 * MIB, 14 * MIB) and handed.peak(()).end_bytes == 14 * MIB
    assert asked.worst(1) == (15 * MIB, {0}) and handed.worst(1) == (16 * MIB, {0})
    assert StepTrace.from_dict(handed.to_dict()) == handed


@settings(max_examples=examples(60))
@given(requests=requests)
def test_no_step_is_handed_out_less_than_it_asks_for(requests):
    """Each block but every third is given back at once or behind the next one."""
    events, late = list[Event](), list[Event]()
    for block, (size, pick) in enumerate(requests):
        events += [Event(size + 1, block), *late]
        late = [Event(-size - 1, block)] if block % 3 else []
        if pick % 2:
            events += late
            late = []
    asked, handed = (StepTrace(tuple(events), 0, {}, 0, caching=caching) for caching in (False, True))
    first, times = CachingAllocator(), [0, 0]
    for turn in range(2):
        held = dict[int, int]()
        for event in events:
            if event.delta_bytes > 0:
                held[event.block] = first.take(event.delta_bytes)
            else:
                first.let_go(held.pop(event.block))
            times[turn] = max(times[turn], first.allocated_bytes)
        for address in held.values():
            first.let_go(address)
    assert asked.peak(()).peak_bytes <= handed.peak(()).peak_bytes == max(times)
    assert handed.worst(0)[0] == max(times) if events else True
