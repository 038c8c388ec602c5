"""Several small codes in one byte, by slices: byte i holds element i of every slice, the first slice in the low bits.

    elements  [ a0 a1 a2 a3 | b0 b1 b2 b3 ]   ->   bytes  [ a0+16*b0  a1+16*b1  a2+16*b2  a3+16*b3 ]      (two slices)

Packing neighbours instead would need strided loads, which do not fill vectors. Reductions over fewer than 8 elements
are unrolled by Inductor: packing is pointwise, and takes as few graph nodes for eight slices as for two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """Pack ``codes`` (..., fields, n), integers (of any dtype that holds 255) below ``2**(8 / fields)``.

    Returns uint8 (..., n).
    """
    weighted = codes * _places(codes.shape[-2], codes.device)
    if codes.shape[-2] == 8:
        weighted = weighted.unflatten(-2, (2, 4)).sum(-2, dtype=weighted.dtype)
    return weighted.sum(-2, dtype=weighted.dtype).to(torch.uint8)


def unpack(packed: Tensor, fields: int) -> Tensor:
    """Codes, uint8 (..., fields, n), of ``packed``, uint8 (..., n): each slice is a row of the result."""
    bits = 8 // fields
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    # Not `>>`, which has no kernel for fake tensors of symbolic size.
    return torch.bitwise_right_shift(packed.unsqueeze(-2), shifts) & (2**bits - 1)


def _places(fields: int, device: torch.device) -> Tensor:
    """The value of one in each field of a byte: int32 (fields, 1)."""
    return (1 << torch.arange(0, 8, 8 // fields, dtype=torch.int32, device=device)).unsqueeze(-1)


def unpack_mask(packed: Tensor) -> Tensor:
    """Bits, bool (..., 8, n), of ``packed``, uint8 (..., n).

    Compared as floats, because Inductor for CPUs turns a comparison of bytes into a mask for floats very slowly.
    """
    return (packed.unsqueeze(-2) & _places(8, packed.device).to(torch.uint8)).float() > 0.5


def pad_row(x: Tensor, pad: int) -> Tensor:
    """Append ``pad`` zeros to every innermost row; ``x`` itself if there are none.

    Not ``F.pad``, whose fake kernel fixes symbolic leading sizes to their hints, nor ``cat``, which copies.
    """
    if not pad:
        return x
    inner = x.shape[-1]
    return x.new_zeros((*x.shape[:-1], inner + pad)).slice_scatter(x, -1, 0, inner)


def round_up(n: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``n``."""
    return -(-n // multiple) * multiple
