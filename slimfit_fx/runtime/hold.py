"""``slimfit_fx::hold(x, after)``: ``x`` itself, but not before ``after`` is known.

A view operator with a second operand that it ignores. A compiler's scheduler may run what needs no gradient whenever it
likes, for twelve layers at once if that makes one kernel of them; this dependency, which costs nothing, keeps each
layer's decode and recompute in its place. See passes/hold_recompute.py.

``slimfit_fx::laid_out(x)``: ``x`` itself, in the strides it was traced with. A compiler may lay a value out otherwise,
but the inside of a branch is compiled for the traced strides. See passes/insert_gates.py.

``slimfit_fx::release(x, after)``: ``x`` itself, and a reader of the tensors ``after``. Inductor frees what a branch was
the last to read inside the branch for an open gate, and not at all otherwise: with one more reader behind the branch it
is freed there, whichever way the branch went.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slimfit_fx", "FRAGMENT")
_LIBRARY.define("hold(Tensor(a) x, Tensor after) -> Tensor(a)")
_LIBRARY.define("release(Tensor(a) x, Tensor[] after) -> Tensor(a)")
_LIBRARY.define("laid_out(Tensor(a) x) -> Tensor(a)", tags=(torch.Tag.needs_exact_strides,))


def _hold(x: Tensor, after: Tensor) -> Tensor:
    return torch.ops.aten.alias.default(x)


_LIBRARY.impl("hold", _hold, "CompositeExplicitAutograd")
_LIBRARY.impl("hold", _hold, "Meta")


def _laid_out(x: Tensor) -> Tensor:
    return torch.ops.aten.alias.default(x)


_LIBRARY.impl("laid_out", _laid_out, "CompositeExplicitAutograd")
_LIBRARY.impl("laid_out", _laid_out, "Meta")


def _release(x: Tensor, after: list[Tensor]) -> Tensor:
    return torch.ops.aten.alias.default(x)


_LIBRARY.impl("release", _release, "CompositeExplicitAutograd")
_LIBRARY.impl("release", _release, "Meta")
