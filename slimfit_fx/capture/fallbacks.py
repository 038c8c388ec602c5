"""Our operators as Inductor calls them, known before the first graph is lowered.

Inductor makes a fallback for an operator that it meets for the first time, but prepares the operand of that one call as
if the operator had no constraints: neither realized nor in its traced strides. The first graph of a process would then
differ from every later one, in its memory too. So all are registered before.
"""

from __future__ import annotations

import functools

import torch

import slimfit_fx.runtime.ghosts
import slimfit_fx.runtime.hold  # noqa: F401  (both define operators)


@functools.cache
def register_fallbacks() -> None:
    """Make all operators of ``slimfit_fx`` fallbacks with the layout that its tag asks for. Cheap when done before."""
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    ops = torch.ops.slimfit_fx
    for op in (ops.hold, ops.release, ops.laid_out, ops.stash, ops.ghost):
        if op.default not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op.default, with_default=True))
            make_fallback(op.default, layout_constraint=constraint, warn=False)
