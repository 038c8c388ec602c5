"""Our operators as Inductor calls them, known before the first graph is lowered.

Inductor makes a fallback for an operator that it meets for the first time, but prepares the operand of that one call as
if the operator had no constraints: neither realized nor in its traced strides. The first graph of a process would then
differ from every later one, in its memory too. So all are registered before.

A step calls hundreds of them, and each call of an operator that is written in Python takes some ten microseconds: as
long as a kernel on a GPU. In the code that Inductor writes they are therefore no calls: ``buf5 = buf4`` for the views,
and a ghost is a view of an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import slimfit_fx.runtime.ghosts
import slimfit_fx.runtime.grouped
import slimfit_fx.runtime.hold
import slimfit_fx.runtime.parts  # noqa: F401  (all four define operators)

HAND_ON = tuple(f"torch.ops.slimfit_fx.{name}.default" for name in ("hold", "release", "laid_out"))
"""Operators that give their first operand, as Inductor calls them."""
WRITES_GHOST = "torch.ops.slimfit_fx.ghost.default"
_ALLOCATORS = ("cpu", "cuda")
"""Devices for which Inductor's code has an ``empty_strided_*`` of its own."""


@functools.cache
def register_fallbacks() -> None:
    """Make every operator of ``slimfit_fx`` a fallback with the layout that its tag asks for."""
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    ops = torch.ops.slimfit_fx
    ours = (ops.hold, ops.release, ops.laid_out, ops.stash, ops.any_open, ops.ghost, ops.put_part, ops.add_part)
    for op in (*ours, ops.grouped_weight_gradient):
        if op.default not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op.default, with_default=True))
            make_fallback(op.default, layout_constraint=constraint, warn=False)
    _write_without_calls()


def _write_without_calls() -> None:
    """Tell Inductor how its Python code is to be written for operators that compute nothing."""
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen

    for name in HAND_ON:
        CUSTOM_EXTERN_KERNEL_CODEGEN[name] = CustomCodegen(python=_write_operand)
    CUSTOM_EXTERN_KERNEL_CODEGEN[WRITES_GHOST] = CustomCodegen(python=_write_ghost)


def _write_operand(node: Any, writeline: Callable[[str], None]) -> None:
    writeline(f"{node.get_name()} = {node.codegen_args()[0]}")


def _write_ghost(node: Any, writeline: Callable[[str], None]) -> None:
    """As ``slimfit_fx.runtime.ghosts`` makes one."""
    size, stride, dtype, device, debug = node.codegen_args()
    if debug == "False":
        empty = f"torch.empty(0, dtype={dtype}, device={device})"
        kind = node.get_device().type
        if kind in _ALLOCATORS:  # they ask less of Python, and take the device that the code around them has chosen
            empty = f"empty_strided_{kind}((0, ), (1, ), {dtype})"
        value = f"reinterpret_tensor({empty}, {size}, {stride}, 0)"
    else:
        value = f"torch.ops.slimfit_fx.ghost.default({size}, {stride}, {dtype}, {device}, {debug})"
    writeline(f"{node.get_name()} = {value}")
