"""The other processes of a distributed job: one decision for all of them, and a check that it was one.

Every rank decides by itself, from the same seed and the same distances: what rank 0 measured is sent to all (a few
numbers, on the device, without waiting for it). Each ``CHECK_EVERY`` steps the ranks compare a hash of what they
decided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimfit_fx.runtime.bindings import is_sharded

CHECK_EVERY = 50
"""Steps between two comparisons; the first decision is always compared."""


class Peers:
    """The ranks that train one model together."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, sharded: bool = False) -> None:
        self.group = group
        self.device = device
        self.sharded = sharded
        """Whether parameters are shards: then a unit's distance is of all of its shards."""

    def agree(self, distances: Tensor) -> Tensor:
        """The distances that rank 0 measured (float32, on the device), on every rank; no host sync."""
        if not self.sharded:  # sums over shards are the same everywhere already
            dist.broadcast(distances, dist.get_global_rank(self.group, 0), group=self.group)
        return distances

    def check(self, step: int, names: Sequence[str], opened: frozenset[str], distances: dict[str, float]) -> None:
        """Raise on every rank if the ranks do not decide alike.

        Raises:
            RuntimeError: they differ; names the first rank and unit.
        """
        mine = torch.tensor([_hash(step, opened, distances)], dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine, group=self.group)
        if len({int(other) for other in everyone}) == 1:
            return
        states: list[Any] = [None] * len(everyone)
        dist.all_gather_object(states, (step, sorted(opened), distances), group=self.group)
        raise RuntimeError(_difference(names, states))


def is_distributed() -> bool:
    """Whether this process may have peers."""
    return dist.is_available() and dist.is_initialized()


def find_peers(model: nn.Module) -> Peers | None:
    """The processes that train ``model`` with this one; None if it trains alone. To be called in a forward of it."""
    wrapper = active_wrapper(model)
    if wrapper is not None:
        return Peers(wrapper.process_group, next(model.parameters()).device)
    shard: Any = next((param for param in model.parameters() if is_sharded(param)), None)
    if shard is None:
        return None
    mesh = shard.device_mesh
    group: Any = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    return Peers(group, shard.device, sharded=True)


def active_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` in whose forward we are, if it is one around ``model``."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper if wrapper is not None and any(m is model for m in wrapper.modules()) else None


def sum_over_shards(parts: Tensor, param: Any) -> Tensor:
    """Add up what each rank measured on its shard of ``param``; ``parts`` is changed in place."""
    for dim, placement in enumerate(param.placements):
        if not placement.is_replicate():  # shards of any kind
            dist.all_reduce(parts, group=param.device_mesh.get_group(dim))
    return parts


def _hash(step: int, opened: frozenset[str], distances: dict[str, float]) -> int:
    text = repr((step, sorted(opened), sorted(distances.items())))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _difference(names: Sequence[str], states: Sequence[tuple[int, list[str], dict[str, float]]]) -> str:
    """The first rank that differs from rank 0, and in what."""
    advice = (
        "every rank must use the same settings (seed, freeze_rate, units), call freeze and unfreeze alike, and load "
        "the same state"
    )
    step, opened, distances = states[0]
    for rank, (other_step, other_opened, other_distances) in enumerate(states):
        for name in names:
            if (name in opened) != (name in other_opened):
                here, there = ("open", "closed") if name in opened else ("closed", "open")
                return (
                    f"ranks disagree after step {step}: unit {name!r} is {here} on rank 0, {there} on rank {rank}; "
                    f"{advice}"
                )
            if distances.get(name) != other_distances.get(name):
                return (
                    f"ranks disagree after step {step}: the distance of unit {name!r} is {distances.get(name)} on rank "
                    f"0, {other_distances.get(name)} on rank {rank}; {advice}"
                )
        if other_step != step:
            return f"ranks disagree: rank 0 is at step {step}, rank {rank} at step {other_step}; {advice}"
    raise AssertionError("hashes differ, states do not")
