"""Ghosts: tensors of full shape and zero-byte storage that stand for values nobody may read.

Operators: ``slimfit_fx::stash`` keeps a forward value for backward if one of its gates is open and returns a ghost
otherwise; ``slimfit_fx::ghost`` is what a closed branch returns; ``slimfit_fx::any_open`` switches a branch that
several gates may open. All are opaque to the compiler, so none can be fused with a reader. In debug mode ghosts are
real tensors full of NaN: a leak then shows as NaN and not as a crash.

They are defined without ``torch.library.custom_op``: a call takes less than half the time, and a step on a GPU whose
kernels are short takes as long as the calls that start them.

A ghost is made by Inductor's own unchecked view (``_reinterpret_tensor``) of an empty tensor: no byte is ever
allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

_LIBRARY = torch.library.Library("slimfit_fx", "FRAGMENT")
_LIBRARY.define("stash(Tensor x, Tensor[] gates, bool debug) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
_LIBRARY.define("ghost(SymInt[] size, SymInt[] stride, ScalarType dtype, Device device, bool debug) -> Tensor")
_LIBRARY.define("any_open(Tensor[] gates) -> Tensor")


def _make_ghost(size: list[int], stride: list[int], dtype: torch.dtype, device: torch.device, debug: bool) -> Tensor:
    """A ghost of the given size and strides (elements), for the gradient of a closed unit."""
    if debug:
        full = torch.empty_strided(size, stride, dtype=dtype, device=device)
        return full.fill_(float("nan")) if dtype.is_floating_point else full.fill_(True if dtype is torch.bool else 1)
    # Not empty_strided + resize_(0): that allocates the full size for a moment, and the peak would see it.
    return _reinterpret_tensor(torch.empty(0, dtype=dtype, device=device), size, stride, 0)


def is_ghost(tensor: Tensor) -> bool:
    """True for a tensor that has elements but no bytes behind them."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _stash(x: Tensor, gates: list[Tensor], debug: bool) -> Tensor:
    """Keep ``x`` for backward if any of ``gates`` (0-dim CPU bools) is open, else return a ghost of it.

    The result has the shape, strides and dtype of ``x`` and never shares its storage.
    """
    if any(bool(g) for g in gates):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return _make_ghost(list(x.shape), list(x.stride()), x.dtype, x.device, debug)


@torch.library.register_fake("slimfit_fx::stash", lib=_LIBRARY)
def _(x: Tensor, gates: list[Tensor], debug: bool) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@torch.library.register_fake("slimfit_fx::ghost", lib=_LIBRARY)
def _(size: list[int], stride: list[int], dtype: torch.dtype, device: torch.device, debug: bool) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _any_open(gates: list[Tensor]) -> Tensor:
    """Whether any of ``gates`` (0-dim CPU bools) is open, as one more of their kind."""
    return torch.tensor(any(bool(g) for g in gates), device="cpu")


@torch.library.register_fake("slimfit_fx::any_open", lib=_LIBRARY)
def _(gates: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")


_LIBRARY.impl("stash", _stash, "CompositeExplicitAutograd")
_LIBRARY.impl("ghost", _make_ghost, "CompositeExplicitAutograd")
_LIBRARY.impl("any_open", _any_open, "CompositeExplicitAutograd")
