"""One bit per element for boolean masks, lossless.

    mask (..., inner) bool  ->  uint8 (..., ceil(inner / 8))

A row is cut into eight slices, slice k goes to bit k (see :mod:`slimfit_fx.codecs.packing`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from slimfit_fx.codecs.base import Codec, Size, ValueSpec, refuse_dtype, refuse_shape
from slimfit_fx.codecs.packing import pack, pad_row, round_up, unpack_mask


@dataclass(frozen=True)
class Bits(Codec):
    """Eight booleans to a byte."""

    @property
    @override
    def name(self) -> str:
        return "bits"

    @property
    @override
    def lossless(self) -> bool:
        return True

    @override
    def refuses(self, spec: ValueSpec) -> str | None:
        return refuse_dtype(spec, (torch.bool,)) or refuse_shape(spec)

    @override
    def encode(self, x: Tensor) -> tuple[Tensor]:
        columns = round_up(x.shape[-1], 8) // 8
        return (pack(pad_row(x, 8 * columns - x.shape[-1]).unflatten(-1, (8, columns))),)

    @override
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        mask = unpack_mask(parts[0]).flatten(-2)
        return mask[..., :inner].contiguous() if inner % 8 else mask

    @override
    def encoded_bytes(self, spec: ValueSpec) -> Size:
        return spec.rows * (round_up(spec.inner, 8) // 8)
