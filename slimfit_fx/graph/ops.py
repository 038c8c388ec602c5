"""What the passes know of single operators: is it a view, cheap to repeat, random, a matrix product.

Everything here is derived from the operator itself (its schema and its tags), with short lists only for
what those do not say. An operator that nobody knows is never repeated and never split: it stays whole.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_scaled_mm", "_int_mm", "mkldnn_linear"}
_REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "var_mean",
    "var",
    "any",
    "all",
    "prod",
    "argmax",
    "argmin",
    "logsumexp",
    "_softmax",
}
_REARRANGE = {
    "clone",
    "cat",
    "constant_pad_nd",
    "index_select",
    "gather",
    "embedding",
    "index",
    "stack",
    "select_scatter",
    "slice_scatter",
    "repeat",
    "roll",
    "flip",
    "_unsafe_view",
    "_to_copy",
    "convert_element_type",
    "new_zeros",
    "as_strided_copy",
    "_unsafe_index",
    "_unsafe_masked_index",
    "copy",
}
_CREATE = {
    "full",
    "full_like",
    "zeros",
    "ones",
    "arange",
    "iota",
    "scalar_tensor",
    "empty",
    "zeros_like",
    "ones_like",
    "new_full",
    "lift_fresh_copy",
}
_SOFTMAX_LIKE = {"exp", "exp2", "sigmoid", "tanh", "_softmax", "clamp", "erf"}


def op_name(node: fx.Node) -> str:
    """The operator's bare name ("mm", "view", "getitem"), or "" for what is not a call."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    return getattr(node.target, "_schema", None)


def is_tensor(node: fx.Node) -> bool:
    """Whether the value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_view(node: fx.Node) -> bool:
    """True when the result shares its argument's storage (``view``, ``permute``, ``expand``, ``slice``, ...)."""
    schema = _schema(node)
    if schema is None or schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in schema.returns)


def view_base(node: fx.Node) -> fx.Node:
    """The node that owns the storage of ``node``: follows views to their source."""
    while node.op == "call_function" and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_random(node: fx.Node) -> bool:
    """Whether running it again would draw other numbers."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or op_name(node) in {
        "inductor_random",
        "inductor_seeds",
        "inductor_seed",
        "inductor_lookup_seed",
        "inductor_randint",
    }


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the elements at its place only."""
    if node.op != "call_function":
        return False
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    return op_name(node) in {"fma", "convert_element_type", "mul", "add", "sub", "div", "where", "logical_not", "neg"}


def is_reduction(node: fx.Node) -> bool:
    """Whether it sums up (or finds the largest, ...) along dimensions."""
    return op_name(node) in _REDUCTIONS


def is_creation(node: fx.Node) -> bool:
    """Whether it makes a tensor of constants."""
    return op_name(node) in _CREATE


def is_matrix_product(node: fx.Node) -> bool:
    """Whether it is a matrix product: costly to run a second time."""
    return op_name(node) in _MATRIX_PRODUCTS


def is_getitem(node: fx.Node) -> bool:
    """Whether it picks one result of an operator with several."""
    return node.op == "call_function" and node.target is operator.getitem


def is_symbol(node: fx.Node) -> bool:
    """A node whose value is a number or a symbolic number, not a tensor."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def picks_its_layout(node: fx.Node) -> bool:
    """Whether the compiler may lay its results out in other strides than were traced (channels last)."""
    return op_name(node) in {"convolution_backward", "convolution", "_convolution"}


def reads_shape_only(node: fx.Node) -> bool:
    """Whether it asks for sizes or strides and reads no element: it may read a ghost."""
    return op_name(node) in {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset"}


def is_cheap(node: fx.Node) -> bool:
    """True for what costs memory traffic only, no matrix product: safe and inexpensive to run a second time."""
    if node.op != "call_function" or is_random(node):
        return False
    schema = _schema(node)
    if schema is not None and schema.is_mutable:
        return False
    return (
        is_view(node)
        or is_pointwise(node)
        or is_reduction(node)
        or is_creation(node)
        or is_getitem(node)
        or op_name(node) in _REARRANGE
        or is_symbol(node)
    )


def is_decision(node: fx.Node) -> bool:
    """True for a yes/no answer about floating-point numbers (``x > 0``): it may flip when they are off by a little."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dtype != torch.bool or is_view(node):
        return False
    inputs = [i.meta.get("val") for i in node.all_input_nodes]
    return any(isinstance(i, torch.Tensor) and i.dtype.is_floating_point for i in inputs)


def softens(node: fx.Node) -> bool:
    """True for operators that map huge mask constants into a bounded range (``exp``, ``sigmoid``, ...)."""
    return op_name(node) in _SOFTMAX_LIKE


def scalar_arguments(node: fx.Node) -> list[float]:
    """The plain numbers among its positional arguments."""
    found: list[float] = []

    def visit(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(float(value))
        return value

    fx.node.map_aggregate(node.args, visit)
    return found
