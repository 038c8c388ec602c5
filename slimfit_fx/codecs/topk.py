"""The largest elements of every row and their places; the others come back as zero.

    x (..., inner)  ->  values (..., k) in x's dtype,  places (..., k) int16 or int32

For normalised activations, whose gradient of the scale parameter lives off their outliers: SlimFit (arXiv 2305.18513)
keeps the top 10% of a frozen LayerNorm's normalised input, with int32 places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from slimfit_fx.codecs.base import Codec, Size, ValueSpec, refuse_dtype, refuse_shape

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the ``fraction`` of every row that is largest by magnitude; at least one element.

    NaN counts as largest, infinities come next: they survive as long as a row has no more of them than places.

    Args:
        fraction: Share of the innermost dimension to keep, in (0, 1].
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    @property
    @override
    def name(self) -> str:
        return "topk" if self.fraction == 0.1 else f"topk-{self.fraction:g}"

    @override
    def refuses(self, spec: ValueSpec) -> str | None:
        return refuse_dtype(spec, _DTYPES) or refuse_shape(spec)

    @override
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = x.shape[-1]
        places = x.abs().topk(self._kept(inner), dim=-1, sorted=False).indices
        return x.gather(-1, places), places.to(_place_dtype(inner))

    @override
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        values, places = parts
        return values.new_zeros((*values.shape[:-1], inner)).scatter(-1, places.to(torch.int64), values)

    @override
    def encoded_bytes(self, spec: ValueSpec) -> Size:
        return spec.rows * self._kept(spec.inner) * (spec.dtype.itemsize + _place_dtype(spec.inner).itemsize)

    @override
    def error_bound(self, x: Tensor) -> Tensor:
        """``|x|`` where the element is, or by a tie may be, dropped: the least kept magnitude bounds it."""
        magnitude = x.abs()
        if x.shape[-1] == 0:
            return magnitude.float()
        least = magnitude.topk(self._kept(x.shape[-1]), dim=-1).values[..., -1:]
        return torch.where(magnitude > least, 0.0, magnitude).float()

    def _kept(self, inner: int) -> int:
        return min(inner, max(1, round(self.fraction * inner)))


def _place_dtype(inner: int) -> torch.dtype:
    return torch.int16 if inner <= 2**15 else torch.int32
