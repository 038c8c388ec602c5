"""Integer codes with a scale per group along the innermost dimension: ``int8``, ``int4`` and ``int2``.

    x (..., inner)  ->  codes int8  (..., inner),              scale fp32 (..., groups)                int8
                        codes uint8 (..., inner * bits / 8),   scale, middle fp32 (..., groups)        int4, int2

NaN and the infinities come back as such. What becomes of their group:

- int8: beside an infinity, the finite elements keep their values. A NaN makes its group NaN.
- int4 and int2: beside an infinity, the finite elements are lost: infinite or NaN. A NaN as above.

Few graph nodes are the first concern, for codecs are many and every node costs compile time. Then what compilers make
of them: encoding is one reduction and one pointwise loop over the same range, decoding runs inside its reader's kernel,
with no buffer of its own. Scales are fp32, because compilers drop a cast and its inverse, and would then encode with
another scale than the rounded one that is stored.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from slimfit_fx.codecs.base import Codec, Size, ValueSpec, refuse_dtype, refuse_shape
from slimfit_fx.codecs.packing import pack, pad_row, round_up, unpack

MAX_GROUP = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TINY = torch.finfo(torch.float32).tiny  # the least scale: its reciprocal is finite, and zero needs no special case
_SHRINK = 2.0**-21  # how much codes stop short of a group's extremes, so that rounding cannot pass the largest float
_LARGEST = torch.finfo(torch.float32).max / 2  # above every finite half; the difference of two does not overflow
_INF = math.inf


@dataclass(frozen=True)
class GroupLayout:
    """How a row of ``inner`` elements falls into equal groups.

    Attributes:
        size: Elements per group.
        groups: Groups per row.
        pad: Zeros appended to the row to fill the last group.
    """

    size: int
    groups: int
    pad: int


def group_layout(inner: int, fields: int) -> GroupLayout:
    """Choose the groups of a row for codes packed ``fields`` (1, 2 or 4) to a byte.

    Up to 128 elements are one group. A longer row takes groups of 128, 64 or 32, whichever divides it first, with
    slices of at least one vector (16 lanes). If none does, codes of a byte make the row one group, and packed codes pad
    it, in groups of 64 to 256, to the fewest bytes.
    """
    lanes = 16 * fields
    divisors = [size for size in (128, 64, 32) if inner % size == 0 and size % lanes == 0]
    if inner <= MAX_GROUP or (not divisors and fields == 1):
        size = max(round_up(inner, fields), fields)
    elif divisors:
        size = divisors[0]
    else:
        size = min(range(64, 257, lanes), key=lambda g: (round_up(inner, g) * (1 + 8 * fields / g), g))
    groups = -(-inner // size)
    return GroupLayout(size, groups, groups * size - inner)


class _Groupwise(Codec):
    """What the group-wise codecs share."""

    stochastic: bool

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @property
    @override
    def name(self) -> str:
        return f"int{self.bits}-sr" if self.stochastic else f"int{self.bits}"

    @property
    @override
    def keeps_nonfinite(self) -> bool:
        return True

    @override
    def refuses(self, spec: ValueSpec) -> str | None:
        return refuse_dtype(spec, _DTYPES) or refuse_shape(spec)

    @override
    def encoded_bytes(self, spec: ValueSpec) -> Size:
        layout = self._layout(spec.inner)
        return spec.rows * layout.groups * (layout.size * self.bits // 8 + (4 if self.bits == 8 else 8))

    def _layout(self, inner: int) -> GroupLayout:
        return group_layout(inner, 8 // self.bits)

    def _round(self, x: Tensor) -> Tensor:
        """To the nearest integer, or to one of the two by chance; then never above the ceiling of an exact integer."""
        return torch.floor(x * (1 - 2.0**-15) + _dither(x)) if self.stochastic else torch.round(x)

    def _bound(self, x: Tensor, step: Tensor, largest: Tensor) -> Tensor:
        """Half a step of the code (one if stochastic) and the rounding of fp32 and of the dtype; inf in a lost group.

        Args:
            x: The value, (..., inner).
            step: The step of each group, broadcasting against (..., groups, size).
            largest: The largest finite magnitude of each group, likewise.
        """
        layout, limits = self._layout(x.shape[-1]), torch.finfo(x.dtype)
        code = step * (1.01 if self.stochastic else 0.5 + 2.0**-12)
        dtype = (largest + step) * (limits.eps / 2) + limits.tiny * limits.eps
        bound = code + dtype + largest * (2 * _SHRINK)
        bound = torch.where(bound < _INF, bound, _INF)
        return bound.expand(*x.shape[:-1], layout.groups, layout.size).flatten(-2)[..., : x.shape[-1]]


def _dither(x: Tensor) -> Tensor:
    """Numbers in [0, 1), uniform and independent of the size of ``x`` (fp32): a hash of its 32 bits.

    Not from a random generator: dropout draws the same numbers with and without the codec, a resumed run rounds as the
    uninterrupted one, and the graph stays free of random state. 64-bit products do not overflow (multipliers < 2**30).
    """
    h = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) >> 8).float() * 2.0**-24


@dataclass(frozen=True)
class Int8(_Groupwise):
    """Symmetric 8-bit codes, -126 .. 126, and one scale per group: max|x| / 126 over the finite elements.

    The codes 127 and -127 are the infinities. A NaN makes the scale NaN.

    Args:
        stochastic: Round up or down by chance, without bias, instead of to the nearest code. The chance is a hash of
            the value, so that equal tensors are encoded alike.
    """

    stochastic: bool = False

    @property
    @override
    def bits(self) -> int:
        return 8

    @override
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self._grouped(x)
        scale = self._scale(values)
        codes = self._round(values * scale.reciprocal()).clamp(-127, 127)
        return codes.to(torch.int8).flatten(-2), scale.squeeze(-1)

    @override
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        layout, device = self._layout(inner), parts[0].device
        shape: tuple[int, ...] = (layout.groups, 1, layout.size)
        limit: Tensor | int = 127
        if layout.groups > 1 and device.type == "cpu":
            # Two limits that do the same. With a remainder among its indices, the reader's loop is not split by the
            # quotient in the scale's, which loses elements when it takes a slice of the row (pytorch#195582).
            shape = (layout.groups, 2, layout.size // 2)
            limit = torch.arange(126.25, 127, 0.5, device=device).unsqueeze(-1)
        codes, scale = parts[0].unflatten(-1, shape).float(), parts[1].unflatten(-1, (layout.groups, 1, 1))
        scale = torch.where(codes.abs() < limit, scale, scale * _INF)
        return (codes * scale).to(spec_dtype).flatten(-3)

    @override
    def error_bound(self, x: Tensor) -> Tensor:
        step = self._scale(self._grouped(x))
        return self._bound(x, step, 126 * step)

    def _grouped(self, x: Tensor) -> Tensor:
        """fp32, (..., groups, size)."""
        layout = self._layout(x.shape[-1])
        return x.unflatten(-1, (layout.groups, layout.size)).float()

    def _scale(self, values: Tensor) -> Tensor:
        magnitude = values.abs()
        largest = torch.where(magnitude == _INF, 0.0, magnitude).amax(-1, keepdim=True)
        return (largest * ((1 - _SHRINK) / 126)).clamp_min(_TINY)


@dataclass(frozen=True)
class PackedInt(_Groupwise):
    """Codes of 4 or 2 bits, two or four to a byte, with a scale and a middle per group.

    Code c stands for ``2 * ((c - center) * scale + middle)``, center being 8 or 2. Everything is halved because the
    range of a group may exceed the largest float, and stops short of its ends by a 2**-21st. An infinity makes the
    scale infinite: then the center is NaN, the codes below it are -inf, those above it +inf.

    Byte i of a group holds element i of each of its slices, halves for int4 and quarters for int2
    (:mod:`slimfit_fx.codecs.packing`).

    Args:
        bits: 4 or 2.
        stochastic: See :class:`Int8`.
    """

    bits: int = 4
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ValueError(f"PackedInt packs codes of 2 or 4 bits, got bits={self.bits!r}")

    @property
    def _center(self) -> int:
        return 2 ** (self.bits - 1)

    @override
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        halves = self._halved(x)
        scale, middle, infinite = self._affine(halves)
        codes = self._round((halves - middle) * scale.reciprocal()).clamp(-self._center, self._center - 1)
        scale = torch.where(infinite, _INF, scale)
        return pack(codes + self._center).flatten(-2), scale.flatten(-3), middle.flatten(-3)

    @override
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        layout, fields = self._layout(inner), 8 // self.bits
        codes = unpack(parts[0].unflatten(-1, (layout.groups, layout.size // fields)), fields).float() - self._center
        scale, middle = (part.unflatten(-1, (layout.groups, 1, 1)) for part in parts[1:])
        x = ((codes * scale + middle) * 2).to(spec_dtype).flatten(-3)
        return x[..., :inner].contiguous() if layout.pad else x

    @override
    def error_bound(self, x: Tensor) -> Tensor:
        halves = self._halved(x)
        scale, _, infinite = self._affine(halves)
        step = torch.where(infinite, _INF, 2 * scale)
        largest = 2 * halves.abs().amax((-2, -1), keepdim=True)
        return self._bound(x, step.squeeze(-1), largest.squeeze(-1))

    def _halved(self, x: Tensor) -> Tensor:
        """fp32, (..., groups, fields, size / fields): padded, and just below half the value."""
        layout, fields = self._layout(x.shape[-1]), 8 // self.bits
        slices = pad_row(x, layout.pad).unflatten(-1, (layout.groups, fields, layout.size // fields))
        return slices.float() * ((1 - _SHRINK) / 2)

    def _affine(self, halves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Half the scale and half the middle of each group, and whether it holds an infinity: (..., groups, 1, 1).

        Reduced across the slices first, which is unrolled: the rest shares its loop with the packing. Scale and middle
        are finite whatever the group holds (but NaN): the compiler repeats their formulas once per slice, so these are
        as short as can be, and the infinities of the group take the outermost codes by clamping.
        """
        bounded = halves.clamp(-_LARGEST, _LARGEST)
        low = bounded.amin(-2, keepdim=True).amin(-1, keepdim=True)
        high = bounded.amax(-2, keepdim=True).amax(-1, keepdim=True)
        spread, steps = high - low, 2**self.bits - 1
        scale = (spread * (1 / steps)).clamp_min(_TINY)
        middle = low + spread * (self._center / steps)
        return scale, middle, torch.maximum(high, -low) == _LARGEST
