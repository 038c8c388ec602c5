"""How far an optimizer step moved a tensor, relative to where it was.

``relative_mean``: mean over the elements of ``|(before - after) / before|`` (the SlimFit authors' code). An element
that was 0, or so small that dividing by it overflows, has no meaningful ratio and is left out of the mean.

``relative_norm``: ``|after - before| / |before|`` with the Euclidean norm; one near-zero weight cannot dominate it.

For both, a tensor with nothing to compare against (all of it 0 before the step, as LoRA's B matrices are) is at
distance infinity if it moved and 0 if it did not. NaN or infinity in either tensor gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from slimfit_fx._suggest import unknown

DistanceMetric = Literal["relative_mean", "relative_norm"]
DISTANCES: tuple[str, ...] = get_args(DistanceMetric)

_CHUNK_NUMEL = 1 << 22
_CPU_CHUNK_NUMEL = 1 << 16
"""On a CPU the ten passes over a chunk are several times faster while it stays in the cache; torch shares a chunk of
this size among threads, one of half of it not."""
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
    chunks = _chunks(before, after, device or before.device)
    return torch.stack([torch.stack([t.sum() for t in _TERMS[metric](b, a)]) for b, a in chunks]).sum(0)


@torch.no_grad()
def distance_parts_of_all(
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
    *,
    metric: DistanceMetric = "relative_mean",
    device: torch.device | None = None,
) -> list[Tensor]:
    """Return ``distance_parts`` of each pair; small tensors are laid end to end and measured in one go.

    A step compares dozens of them, each with some twenty operators: started one by one they would keep a GPU waiting.
    """
    found: list[Tensor] = []
    for batch in _batches(befores, device):
        pairs = [(befores[i], afters[i]) for i in batch]
        if len(pairs) == 1:
            found.append(distance_parts(*pairs[0], metric=metric, device=device))
            continue
        dtype = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
        before, after = (torch.cat([pair[k].reshape(-1) for pair in pairs]).to(dtype) for k in (0, 1))
        terms = torch.stack(_TERMS[metric](before, after))
        found += [piece.sum(1) for piece in terms.split([b.numel() for b, _ in pairs], dim=1)]
    return found


def _batches(tensors: Sequence[Tensor], device: torch.device | None) -> Iterator[list[int]]:
    """Yield runs of indices whose tensors are of one kind and together no larger than a chunk."""
    batch: list[int] = []
    total = 0
    for index, tensor in enumerate(tensors):
        room = _chunk_numel(device or tensor.device)
        alike = not batch or (tensors[batch[0]].dtype, tensors[batch[0]].device) == (tensor.dtype, tensor.device)
        if batch and (not alike or total + tensor.numel() > room):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += tensor.numel()
    if batch:
        yield batch


@torch.no_grad()
def combine_parts(parts: Tensor, *, metric: DistanceMetric = "relative_mean") -> Tensor:
    """Return the distance (float32) that these sums of ``distance_parts`` amount to; of shape (..., 3), one each."""
    total, base, moved = parts.unbind(-1)
    if metric == "relative_norm":
        total, base = total.sqrt(), base.sqrt()
    unmeasured = torch.where(moved > 0, torch.inf, 0.0)
    distance = torch.where(base > 0, total / base, unmeasured)
    return (distance + 0.0 * moved).to(torch.float32)  # NaN and infinity in either tensor give NaN


def _chunk_numel(device: torch.device) -> int:
    return _CPU_CHUNK_NUMEL if device.type == "cpu" else _CHUNK_NUMEL


def _chunks(before: Tensor, after: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield matching slices along the first dimension, about ``chunk`` elements each, in working precision."""
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    chunk = _chunk_numel(device)
    if before.dim() == 0 or before.numel() <= chunk:
        yield before.to(dtype), after.to(dtype)
        return
    rows = max(1, chunk * before.shape[0] // before.numel())
    for b, a in zip(before.split(rows), after.split(rows), strict=True):
        yield b.to(dtype), a.to(dtype)


def _mean_terms(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each element its ratio, 1 if it has one, and how far it moved."""
    moved, size = (after - before).abs_(), before.abs()
    usable = size >= _TINY
    return (moved / size).masked_fill_(~usable, 0.0), usable.to(before.dtype), moved


def _norm_terms(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each element the square of the movement, its own square, and how far it moved."""
    moved = after - before
    return moved.square(), before.square(), moved.abs_()


_TERMS = {"relative_mean": _mean_terms, "relative_norm": _norm_terms}
"""What is added up over the elements of a tensor."""
