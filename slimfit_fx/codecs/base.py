"""The codec protocol and the registry of codecs.

A codec stores one saved value in fewer bytes: ``encode`` runs in the forward graph, ``decode`` in the backward graph.

    before:  forward  x -------------------------> saved      backward  saved ----------------------> reader
    after:   forward  x -> encode -> (codes, ...)  saved      backward  (codes, ...) -> decode -> x~ -> reader

Both halves are pure ATen, so a compiler fuses them into the neighbouring kernels. They touch the innermost dimension
only, which must be static; leading dimensions may be symbolic and never enter arithmetic.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from slimfit_fx._suggest import unknown

Size: TypeAlias = "int | torch.SymInt"


@dataclass(frozen=True)
class ValueSpec:
    """What a codec may know of a saved value, which is always handed over contiguous.

    Attributes:
        shape: Sizes; every one but the innermost may be symbolic.
        dtype: Element type of the value.
        device: Where the value lives.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> ValueSpec:
        """The spec of a real, fake or symbolic tensor."""
        return cls(tuple(x.shape), x.dtype, x.device)

    @property
    def rows(self) -> Size:
        """Number of innermost rows: the product of the leading sizes."""
        return math.prod(self.shape[:-1])

    @property
    def inner(self) -> int:
        """The innermost size. Every codec refuses a value without a static one."""
        inner = self.shape[-1]
        assert isinstance(inner, int), f"not refused: {self}"
        return inner


class Codec(abc.ABC):
    """Encode a saved value in forward, decode it in backward.

    Implementations are frozen dataclasses: hashable, pickleable and with a stable ``repr``, because they enter the
    keys of compile caches.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name users write, such as ``"int8"``."""

    @property
    def lossless(self) -> bool:
        """True if ``decode(encode(x))`` equals ``x`` bit for bit."""
        return False

    @property
    def keeps_nonfinite(self) -> bool:
        """True if NaN, +inf and -inf come back as such. They may spoil the elements grouped with them."""
        return self.lossless

    @property
    def random(self) -> bool:
        """True if ``encode`` draws random numbers."""
        return False

    @abc.abstractmethod
    def refuses(self, spec: ValueSpec) -> str | None:
        """Why this codec cannot encode such a value, or None if it can."""

    @abc.abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode ``x``, of any leading sizes, into one or more contiguous tensors with the same leading sizes.

        Functional, without data-dependent control flow. What ``refuses`` rejects is undefined here.
        """

    @abc.abstractmethod
    def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
        """Rebuild the value from ``parts = encode(x)``: contiguous, of ``x``'s shape.

        Args:
            parts: What ``encode`` returned.
            spec_dtype: ``x.dtype``.
            inner: ``x.shape[-1]``.
        """

    @abc.abstractmethod
    def encoded_bytes(self, spec: ValueSpec) -> Size:
        """Bytes of ``encode(x)``, exactly: the sum of ``numel * itemsize`` over its parts."""

    def error_bound(self, x: Tensor) -> Tensor:
        """Bound on ``|decode(encode(x)) - x|``, elementwise: fp32, of ``x``'s shape; zeros here (lossless).

        Where ``x`` is NaN or infinite the bound means nothing; ``keeps_nonfinite`` speaks for those elements. It is inf
        where a finite element is lost because a non-finite one shares its group.
        """
        return torch.zeros_like(x, dtype=torch.float32)


def refuse_shape(spec: ValueSpec) -> str | None:
    """The refusals that all codecs share: no innermost dimension, or one whose size is not known."""
    if not spec.shape:
        return "the value is a scalar (0-dim): there is nothing to compress"
    if not isinstance(spec.shape[-1], int):
        return f"the innermost dimension is symbolic ({spec.shape[-1]}): its layout must be known when compiling"
    return None


def refuse_dtype(spec: ValueSpec, legal: tuple[torch.dtype, ...]) -> str | None:
    """Refuse an element type that is not in ``legal``."""
    if spec.dtype in legal:
        return None
    return f"dtype {_short(spec.dtype)} is not one of {', '.join(map(_short, legal))}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_REGISTRY: dict[str, Codec] = {}


def register_codec(codec: Codec) -> Codec:
    """Make ``codec`` available under its name, and return it.

    Raises:
        TypeError: ``codec`` is not an instance of :class:`Codec`.
        ValueError: its name is empty, or taken by a different codec.
    """
    if not isinstance(codec, Codec):
        hint = " (pass an instance, not the class)" if isinstance(codec, type) else ""
        raise TypeError(f"register_codec expects a Codec instance, got {codec!r}{hint}")
    if not isinstance(codec.name, str) or not codec.name:
        raise ValueError(f"a codec needs a non-empty string as its name, got {codec.name!r}")
    known = _REGISTRY.setdefault(codec.name, codec)
    if known != codec:
        raise ValueError(f"the codec name {codec.name!r} is taken by {known!r}; choose another name")
    return known


def get_codec(name: str) -> Codec:
    """The codec registered under ``name``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: no such codec; the message lists the legal names and suggests the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"the codec must be a string, one of {list(codec_names())}, got {name!r}")
    if name in _REGISTRY:
        return _REGISTRY[name]
    raise ValueError(unknown("the codec", name, _REGISTRY))


def codec_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_REGISTRY))
