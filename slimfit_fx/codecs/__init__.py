"""Codecs: what a saved value is stored as. One file each; :mod:`slimfit_fx.codecs.base` has protocol and registry."""

from __future__ import annotations

from slimfit_fx.codecs import fixed_point
from slimfit_fx.codecs.base import Codec, ValueSpec, codec_names, get_codec, register_codec
from slimfit_fx.codecs.bits import Bits
from slimfit_fx.codecs.fixed_point import FixedPoint
from slimfit_fx.codecs.groupwise import Int8, PackedInt
from slimfit_fx.codecs.topk import TopK

__all__ = [
    "Bits",
    "Codec",
    "FixedPoint",
    "Int8",
    "PackedInt",
    "TopK",
    "ValueSpec",
    "codec_names",
    "get_codec",
    "register_codec",
]

_BUILT_IN = (
    *(Int8(stochastic=sr) for sr in (False, True)),
    *(PackedInt(bits, stochastic=sr) for bits in (4, 2) for sr in (False, True)),
    Bits(),
    TopK(),
    fixed_point.GELU4,
    fixed_point.INT8,
    fixed_point.UINT8,
)

for _codec in _BUILT_IN:
    register_codec(_codec)
