"""The fixed-point formats of the SlimFit paper (arXiv 2305.18513, as its authors' code has them): no scale, no groups.

    fixed_gelu4   4 bits   -4 .. 3.5      step 1/2     input of GELU
    fixed_int8    8 bits   -8 .. 7.9375   step 1/16    inputs of the attention products, input of the second FFN linear
    fixed_uint8   8 bits    0 .. 1        step 1/255   attention probabilities (1/255, not 1/256: 0 and 1 are exact)

Values beyond the range clip to its ends without a sign of it, infinities too, and NaN becomes 0: every code of these
formats has a meaning already, there is none to spare for non-finite values (``keeps_nonfinite`` is False).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from slimfit_fx.codecs.base import Codec, Size, ValueSpec, refuse_dtype, refuse_shape
from slimfit_fx.codecs.packing import pack, pad_row, round_up, unpack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FixedPoint(Codec):
    """Unsigned codes of ``bits`` bits, code c standing for ``low + c / steps_per_unit``, rounded to nearest.

    Codes of 4 bits are packed two to a byte: the halves of a row, see :mod:`slimfit_fx.codecs.packing`.

    Args:
        label: The codec's name.
        bits: 8 or 4.
        low: The least value.
        steps_per_unit: The inverse of the step.
    """

    label: str
    bits: int
    low: float
    steps_per_unit: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"FixedPoint has codes of 4 or 8 bits, got bits={self.bits!r}")

    @property
    @override
    def name(self) -> str:
        return self.label

    @property
    def fields(self) -> int:
        """Codes per byte."""
        return 8 // self.bits

    @property
    def high(self) -> float:
        """The largest value."""
        return self.low + (2**self.bits - 1) / self.steps_per_unit

    @override
    def refuses(self, spec: ValueSpec) -> str | None:
        return refuse_dtype(spec, _DTYPES) or refuse_shape(spec)

    @override
    def encode(self, x: Tensor) -> tuple[Tensor]:
        values = pad_row(x, -x.shape[-1] % self.fields).float()
        steps = (torch.where(values == values, values, 0.0) - self.low) * self.steps_per_unit
        codes = steps.round().clamp(0, 2**self.bits - 1)
        if self.fields == 1:
            return (codes.to(torch.uint8),)
        return (pack(codes.unflatten(-1, (self.fields, codes.shape[-1] // self.fields))),)

    @override
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        codes = parts[0] if self.fields == 1 else unpack(parts[0], self.fields).flatten(-2)
        x = (codes.float() / self.steps_per_unit + self.low).to(spec_dtype)
        return x[..., :inner].contiguous() if inner % self.fields else x

    @override
    def encoded_bytes(self, spec: ValueSpec) -> Size:
        return spec.rows * (round_up(spec.inner, self.fields) // self.fields)

    @override
    def error_bound(self, x: Tensor) -> Tensor:
        """Half a step inside the range, the distance to the range outside, and the rounding of the dtype."""
        values = x.float()
        excess = torch.maximum(self.low - values, values - self.high).clamp_min(0.5 / self.steps_per_unit)
        reach = max(abs(self.low), abs(self.high))
        return excess * (1 + 2.0**-20) + reach * (torch.finfo(x.dtype).eps / 2 + 2.0**-20)


GELU4 = FixedPoint("fixed_gelu4", bits=4, low=-4.0, steps_per_unit=2)
INT8 = FixedPoint("fixed_int8", bits=8, low=-8.0, steps_per_unit=16)
UINT8 = FixedPoint("fixed_uint8", bits=8, low=0.0, steps_per_unit=255)
