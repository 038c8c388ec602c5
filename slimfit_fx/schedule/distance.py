"""How far an optimizer step moved a tensor, relative to where it was.

``relative_mean``: mean over the elements of ``|(before - after) / before|`` (the SlimFit authors' code). An element
that was 0, or so small that dividing by it overflows, has no meaningful ratio and is left out of the mean.

``relative_norm``: ``|after - before| / |before|`` with the Euclidean norm; one near-zero weight cannot dominate it.

For both, a tensor with nothing to compare against (all of it 0 before the step, as LoRA's B matrices are) is at
distance infinity if it moved and 0 if it did not. NaN or infinity in either tensor gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from slimfit_fx._suggest import unknown

DistanceMetric = Literal["relative_mean", "relative_norm"]
DISTANCES: tuple[str, ...] = get_args(DistanceMetric)

_CHUNK_NUMEL = 1 << 22
_CPU_CHUNK_NUMEL = 1 << 15
"""On a CPU the ten passes over a chunk are several times faster while it stays in the cache."""
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def update_distance(
    before: Tensor, after: Tensor, *, metric: DistanceMetric = "relative_mean", device: torch.device | None = None
) -> Tensor:
    """Return how far ``after`` is from ``before``: a 0-dim float32 tensor on their device, with no host sync.

    Work is done in float32 (float64 for float64 tensors), a chunk of elements at a time, so that the temporaries of
    a large embedding stay small. An empty tensor has distance 0. ``device``: that of the real tensors, if these stand
    for them on the meta device; the chunks are those.

    Raises:
        ValueError: unknown metric, or shapes that differ.
    """
    return combine_parts(distance_parts(before, after, metric=metric, device=device), metric=metric)


@torch.no_grad()
def distance_parts(
    before: Tensor, after: Tensor, *, metric: DistanceMetric = "relative_mean", device: torch.device | None = None
) -> Tensor:
    """Return the three sums that the distance is made of: those of the shards of a tensor add up to its own.

    A tensor of shape (3,), float32 or float64; see ``update_distance``.
    """
    if metric not in DISTANCES:
        raise ValueError(unknown("metric", metric, DISTANCES))
    if before.shape != after.shape:
        raise ValueError(f"before and after must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    measure = _mean_parts if metric == "relative_mean" else _norm_parts
    return torch.stack([measure(b, a) for b, a in _chunks(before, after, device or before.device)]).sum(0)


@torch.no_grad()
def combine_parts(parts: Tensor, *, metric: DistanceMetric = "relative_mean") -> Tensor:
    """Return the distance (0-dim, float32) that these sums of ``distance_parts`` amount to."""
    total, base, moved = parts.unbind()
    if metric == "relative_norm":
        total, base = total.sqrt(), base.sqrt()
    unmeasured = torch.where(moved > 0, torch.inf, 0.0)
    distance = torch.where(base > 0, total / base, unmeasured)
    return (distance + 0.0 * moved).to(torch.float32)  # NaN and infinity in either tensor give NaN


def _chunks(before: Tensor, after: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield matching slices along the first dimension, about ``chunk`` elements each, in working precision."""
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    chunk = _CPU_CHUNK_NUMEL if device.type == "cpu" else _CHUNK_NUMEL
    if before.dim() == 0 or before.numel() <= chunk:
        yield before.to(dtype), after.to(dtype)
        return
    rows = max(1, chunk * before.shape[0] // before.numel())
    for b, a in zip(before.split(rows), after.split(rows), strict=True):
        yield b.to(dtype), a.to(dtype)


def _mean_parts(before: Tensor, after: Tensor) -> Tensor:
    """Return (sum of the ratios, how many elements have one, sum of the movements)."""
    moved, size = (after - before).abs_(), before.abs()
    usable = size >= _TINY
    ratios = (moved / size).masked_fill_(~usable, 0.0)
    counted = torch.count_nonzero(usable).to(before.dtype)  # a sum of booleans would first make numbers of them
    return torch.stack((ratios.sum(), counted, moved.sum()))


def _norm_parts(before: Tensor, after: Tensor) -> Tensor:
    """Return (squared norm of the movement, squared norm of ``before``, sum of the movements)."""
    moved = after - before
    return torch.stack((moved.square().sum(), before.square().sum(), moved.abs_().sum()))
