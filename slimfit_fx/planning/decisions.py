"""What may be done with one saved value, and what its codec must know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimfit_fx.codecs import Codec, ValueSpec
from slimfit_fx.graph.joint import hint


@dataclass(frozen=True)
class Decision:
    """What is done with one saved value. ``codec`` None: it crosses as it is; ``reason`` says why."""

    kind: str
    codec: Codec | None
    reason: str
    parts: tuple[Codec, Codec | None] | None = None
    """Codecs, if it is stored twice: for who reads it whatever is frozen, and for units, while one of them trains.
    ``codec`` holds if its readers do not allow that."""


def dense_order(val: torch.Tensor) -> tuple[int, ...] | None:
    """The permutation of dimensions that makes ``val`` contiguous, or None when it has gaps or overlaps."""
    if val.is_contiguous():
        return tuple(range(val.dim()))
    order = tuple(sorted(range(val.dim()), key=lambda d: -hint(val.stride()[d])))
    return order if val.permute(order).is_contiguous() else None


def value_spec(val: torch.Tensor) -> ValueSpec | None:
    """The value as codecs see it (contiguous), or None when it cannot be seen so."""
    order = dense_order(val)
    if order is None:
        return None
    return ValueSpec(tuple(val.shape[d] for d in order), val.dtype, val.device)


def refuse_codec(codec: Codec, spec: ValueSpec, size: int) -> str | None:
    """Why ``codec`` does not serve for a value of ``size`` bytes, whatever it says of itself; None if it does."""
    if codec.random:
        return "it draws random numbers, which cannot be inserted into a graph whose own are already numbered"
    encoded = hint(codec.encoded_bytes(spec))
    return f"it would not make the value smaller ({encoded} bytes, {size} as it is)" if encoded >= size else None
