"""``slimfit_fx::put_part(whole, part, dim, start)``: write what one tile of the batch gave into where it belongs.

The parts of a value are written into memory that is there for all of them, one after the other: joined at the end they
would all be there twice. See passes/tile_blocks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slimfit_fx", "FRAGMENT")
_LIBRARY.define("put_part(Tensor(a!) whole, Tensor part, int dim, int start) -> ()")


def _put_part(whole: Tensor, part: Tensor, dim: int, start: int) -> None:
    """Write ``part`` into elements ``start`` and following of ``whole`` along ``dim``."""
    whole.narrow(dim, start, part.shape[dim]).copy_(part)


_LIBRARY.impl("put_part", _put_part, "CompositeExplicitAutograd")
_LIBRARY.impl("put_part", lambda *_: None, "Meta")
