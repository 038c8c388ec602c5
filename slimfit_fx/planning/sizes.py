"""Inputs of a graph with symbolic sizes, and what they are at other sizes than those it was compiled for.

One compiled graph serves every batch and every length when its sizes are symbols. Its generated code takes them as
numbers, so the same code can be run dry (dry_run.py) at any size: nothing has to be compiled to know the peak of a
larger batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class SymbolicTensor:
    """A tensor whose sizes and strides are expressions."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device


Symbolic: TypeAlias = "SymbolicTensor | int | sympy.Expr | None"


def describe_inputs(inputs: Sequence[Any]) -> tuple[Symbolic, ...] | None:
    """The inputs with symbols for sizes; None if every size is a plain number."""
    found = tuple(map(_describe, inputs))
    return found if any(_has_symbols(x) for x in found) else None


def read_symbols(symbolic: Sequence[Symbolic], arguments: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """What the symbols stand for in a call with these ``arguments``: symbols are inputs of their own."""
    pairs = zip(symbolic, arguments, strict=False)
    return {s: int(a) for s, a in pairs if isinstance(s, sympy.Symbol) and isinstance(a, int)}


def value_at(size: Size, values: Mapping[sympy.Symbol, int]) -> int:
    """The size as a number.

    Raises:
        LookupError: it has a symbol that ``values`` does not know.
    """
    if isinstance(size, int):
        return size
    unknown = size.free_symbols - set(values)
    if unknown:
        raise LookupError(f"{sorted(map(str, unknown))} in the size {size} is no input of the graph")
    return int(size.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()}))


def _describe(value: Any) -> Symbolic:
    if isinstance(value, torch.Tensor):
        shape, strides = tuple(map(_size, value.shape)), tuple(map(_size, value.stride()))
        return SymbolicTensor(shape, strides, value.dtype, value.device)
    return _size(value) if isinstance(value, (int, torch.SymInt)) else None


def _size(size: int | torch.SymInt) -> Size:
    if isinstance(size, int):
        return size
    expression: sympy.Expr = size.node.expr
    return int(expression) if expression.is_number else expression


def _has_symbols(value: Symbolic) -> bool:
    if isinstance(value, SymbolicTensor):
        return any(isinstance(size, sympy.Expr) for size in (*value.shape, *value.strides))
    return isinstance(value, sympy.Expr)
