"""The blocks that CUDA's caching allocator hands out, which may be larger than what was asked for.

A request takes the smallest free block that it fits in. What is left of a block from the large pool stays with it,
unless that is more than 1 MiB: so each large value may hold up to 1 MiB that nobody asked for, and all of it counts as
allocated. This is the allocator as it stands by default (c10/cuda/CUDACachingAllocator.cpp of torch 2.11 to 2.13), on
one stream; with expandable segments every block is split.
"""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass

ROUND = 512
"""Sizes are multiples of so many bytes."""
_MIB = 1 << 20
_LARGEST_SMALL = _MIB
"""Requests up to this size come from the small pool, in segments of 2 MiB."""
_SEGMENT_SMALL, _SEGMENT_LARGE, _OWN_SEGMENT = 2 * _MIB, 20 * _MIB, 10 * _MIB
"""A large request gets a segment of 20 MiB, or, from 10 MiB on, one of its own size in steps of 2 MiB."""


@dataclass
class _Block:
    address: int
    size: int
    small: bool
    free: bool = True
    before: _Block | None = None
    behind: _Block | None = None
    """Its neighbours in the segment."""


class CachingAllocator:
    """An empty allocator. ``allocated_bytes`` is what the blocks take that are handed out."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        """(size, address) of what is free, in order, by pool."""
        self._blocks: dict[int, _Block] = {}

    def take(self, size: int) -> int:
        """Hand out a block of at least ``size`` bytes; returns its address."""
        wanted = max(1, -(-size // ROUND)) * ROUND
        small = wanted <= _LARGEST_SMALL
        free = self._free[small]
        place = bisect.bisect_left(free, (wanted, 0))
        block = self._blocks[free.pop(place)[1]] if place < len(free) else self._new_segment(wanted, small)
        left = block.size - wanted
        if left >= ROUND if small else left > _MIB:
            self._split(block, wanted)
        block.free = False
        self.allocated_bytes += block.size
        return block.address

    def size_of(self, address: int) -> int:
        """Bytes of a block that is handed out."""
        return self._blocks[address].size

    def let_go(self, address: int) -> None:
        """Take a block back, and join it with its free neighbours."""
        block = self._blocks[address]
        self.allocated_bytes -= block.size
        block.free = True
        for other in (block.before, block.behind):
            if other is not None and other.free:
                free = self._free[block.small]
                free.pop(bisect.bisect_left(free, (other.size, other.address)))
                block = self._join(other, block) if other is block.before else self._join(block, other)
        bisect.insort(self._free[block.small], (block.size, block.address))

    def _new_segment(self, wanted: int, small: bool) -> _Block:
        size = _SEGMENT_SMALL if small else _SEGMENT_LARGE
        if wanted >= _OWN_SEGMENT:
            size = -(-wanted // (2 * _MIB)) * 2 * _MIB
        block = _Block(self.reserved_bytes, size, small)
        self.reserved_bytes += size
        self._blocks[block.address] = block
        return block

    def _split(self, block: _Block, wanted: int) -> None:
        rest = _Block(block.address + wanted, block.size - wanted, block.small, before=block, behind=block.behind)
        if block.behind is not None:
            block.behind.before = rest
        block.behind, block.size = rest, wanted
        self._blocks[rest.address] = rest
        bisect.insort(self._free[block.small], (rest.size, rest.address))

    def _join(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.behind = second.behind
        if second.behind is not None:
            second.behind.before = first
        first.free = True
        del self._blocks[second.address]
        return first


def hands_out_more() -> bool:
    """Whether CUDA's allocator is the one above: not if it was told to split every block, or another is in place."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    said = dict(part.partition(":")[::2] for part in settings.replace(" ", "").split(","))
    return said.get("expandable_segments", "False") != "True" and said.get("backend", "native") == "native"
