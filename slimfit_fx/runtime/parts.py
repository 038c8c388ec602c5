"""``slimfit_fx::put_part(whole, part, dim, start)``: write what one tile of the batch gave into where it belongs.

The parts of a value are written into memory that is there for all of them, one after the other: joined at the end they
would all be there twice. See passes/tile_blocks.py.

``slimfit_fx::add_part(sum, part)``: add what one tile gave to what those before it gave. A compiler makes one kernel of
all the additions of ordinary ones, behind the last tile: what every tile gave waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slimfit_fx", "FRAGMENT")
_LIBRARY.define("put_part(Tensor(a!) whole, Tensor part, int dim, int start) -> ()")
_LIBRARY.define("add_part(Tensor(a!) sum, Tensor part) -> ()")


def _put_part(whole: Tensor, part: Tensor, dim: int, start: int) -> None:
    """Write ``part`` into elements ``start`` and following of ``whole`` along ``dim``."""
    whole.narrow(dim, start, part.shape[dim]).copy_(part)


def _add_part(total: Tensor, part: Tensor) -> None:
    total.add_(part)


_LIBRARY.impl("put_part", _put_part, "CompositeExplicitAutograd")
_LIBRARY.impl("put_part", lambda *_: None, "Meta")
_LIBRARY.impl("add_part", _add_part, "CompositeExplicitAutograd")
_LIBRARY.impl("add_part", lambda *_: None, "Meta")
