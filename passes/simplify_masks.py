"""Spare attention a mask that hides nothing, or is causal: on dynamo's graph, before anything is traced further.

::

    m = (arange(577)[:, None] >= 0).expand(b, 1, 577, 577); y = sdpa(q, k, v, m)   ->  y = sdpa(q, k, v)
    m = arange(n)[None, :] <= arange(n)[:, None];           y = sdpa(q, k, v, m)   ->  y = sdpa(q, k, v, is_causal=True)

transformers leaves such masks out itself while a model runs eagerly, and makes them while it is traced: one of a
vision transformer, and one of a language model that got no padding mask. A fused kernel of a GPU refuses the first,
which is expanded along its last dimension, so that attention becomes products of all pairs of tokens, which stay in
memory; and the fastest ones refuse any mask. Softmax gives 0 to what is masked either way: the results are the same but
for rounding.

Only masks that follow from constants are looked at; they are computed once, on the CPU. What depends on an input, on
random numbers, on a symbolic size, or is written to, stays as it is.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger("slimfit_fx.passes")

MOST_ELEMENTS = 2**28
"""Of a mask that is looked at: it is computed as bytes, at most a few times over."""
NOTHING, CAUSAL = "nothing", "causal"
"""What a mask says."""
Masks = tuple[str | None, ...]
"""What the mask of each attention says, in graph order; None: nothing is known of it."""
_MASK, _IS_CAUSAL = 3, 5
"""Places among the arguments."""
_FUNCTIONS = {
    torch.arange, torch.ones, torch.zeros, torch.full, torch.ones_like, torch.zeros_like, torch.full_like,
    torch.tril, torch.triu, torch.diff, torch.cumsum, torch.where, torch.logical_and, torch.logical_or,
    torch.logical_not, torch.bitwise_and, torch.bitwise_or, torch.eq, torch.ne, torch.ge, torch.gt, torch.le, torch.lt,
    torch.add, torch.sub, torch.mul, torch.reshape, torch.unsqueeze, torch.squeeze, torch.broadcast_to, torch.minimum,
    torch.maximum, torch.clamp, torch.abs, torch.cat, torch.stack, torch.masked_fill,
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
    operator.eq, operator.ne, operator.ge, operator.gt, operator.le, operator.lt, operator.and_, operator.or_,
    operator.xor, operator.invert,
}  # fmt: skip
_METHODS = {
    "__eq__", "__ne__", "eq", "ne", "ge", "gt", "le", "lt", "add", "sub", "mul", "logical_and", "logical_or",
    "logical_not", "new_ones", "new_zeros", "new_full", "new_tensor", "expand", "expand_as", "view", "reshape",
    "unsqueeze", "squeeze", "transpose", "permute", "contiguous", "clone", "detach", "to", "type_as", "bool",
    "int", "long", "float", "half", "bfloat16", "cumsum", "diff", "tril", "triu", "masked_fill", "repeat", "clamp",
    "abs", "flip",
}  # fmt: skip


def read_masks(graph: fx.Graph) -> Masks:
    """Return what the mask of each attention says. Changes nothing."""
    known: dict[fx.Node, str | None] = {}
    return tuple(_read(node, known) for node in _attentions(graph))


def simplify_masks(module: fx.GraphModule, says: Masks) -> int:
    """Leave out the masks of which ``says``, what :func:`read_masks` found in the same graph, tells something.

    Returns:
        How many.
    """
    count = 0
    for node, what in zip(_attentions(module.graph), says, strict=True):
        if what is not None:
            mask = _mask(node)
            _drop_mask(node, causal=what == CAUSAL)
            _erase_unread(module.graph, mask)
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def describe_masks(says: Masks, *, dropped: bool) -> str | None:
    """What a user should know of it; None if there is nothing."""
    counts = ((says.count(NOTHING), "hide nothing"), (says.count(CAUSAL), "are causal"))
    found = " and ".join(f"{count} that {what}" for count, what in counts if count)
    if not found:
        return None
    if dropped:
        return f"attention masks made of constants, {found}: attention runs without them"
    return (
        f"attention masks made of constants, {found}: they stay, for the bits of torch.compile; other presets run "
        "attention without them, which a GPU's fused kernels want"
    )


def _attentions(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target is scaled_dot_product_attention]


def _mask(attention: fx.Node) -> Any:
    return attention.args[_MASK] if len(attention.args) > _MASK else attention.kwargs.get("attn_mask")


def _is_causal(attention: fx.Node) -> Any:
    return attention.args[_IS_CAUSAL] if len(attention.args) > _IS_CAUSAL else attention.kwargs.get("is_causal", False)


def _drop_mask(attention: fx.Node, *, causal: bool) -> None:
    args, kwargs = list(attention.args), dict(attention.kwargs)
    for place, name, value in ((_MASK, "attn_mask", None), (_IS_CAUSAL, "is_causal", causal)):
        if len(args) > place:
            args[place] = value
        else:
            kwargs[name] = value
    attention.args, attention.kwargs = tuple(args), kwargs


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and what only it read: all of it was found to have no effect (:func:`_makers`)."""
    made_for_it = {node}
    for maker in reversed(list(graph.nodes)):
        if maker in made_for_it and not maker.users:
            made_for_it.update(maker.all_input_nodes)
            graph.erase_node(maker)


def _read(attention: fx.Node, known: dict[fx.Node, str | None]) -> str | None:
    mask = _mask(attention)
    if not isinstance(mask, fx.Node) or _is_causal(attention) is not False:
        return None
    if mask not in known:
        known[mask] = _say(mask)
    says, pairs = known[mask], _pairs(attention)
    if says == CAUSAL and not (isinstance(pairs[0], int) and pairs[0] == pairs[1]):
        return None  # is_causal is another mask where queries and keys are not the same tokens
    return says


def _pairs(attention: fx.Node) -> tuple[Any, Any]:
    """(queries, keys) of each head."""
    given = (*attention.args[:2], attention.kwargs.get("query"), attention.kwargs.get("key"))
    query, key = (node.meta["example_value"].shape[-2] for node in given if isinstance(node, fx.Node))
    return query, key


def _say(mask: fx.Node) -> str | None:
    found, makers = mask.meta.get("example_value"), _makers(mask)
    if makers is None or not isinstance(found, Tensor) or found.dim() < 2:
        return None
    if not all(isinstance(size, int) for size in found.shape) or found.numel() > MOST_ELEMENTS:
        return None
    try:
        allowed = _allowed(_computed(makers))
    except Exception:  # an operator that a CPU lacks for these dtypes, say: the mask stays
        log.debug("%s could not be computed", mask.name, exc_info=True)
        return None
    if allowed is None:
        return None
    if bool(allowed.all()):
        return NOTHING
    rows, columns = allowed.shape[-2:]
    lower = torch.ones(rows, columns, dtype=torch.bool, device=allowed.device).tril()
    return CAUSAL if rows == columns and bool((allowed == lower).all()) else None


def _allowed(mask: Tensor) -> Tensor | None:
    """Where attention may look (bool); None if the mask, added to the scores, does more than that."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    allowed = mask == 0
    return allowed if bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()) else None


def _makers(node: fx.Node) -> list[fx.Node] | None:
    """What ``node`` is computed from, itself included, in order; None if that is not constant, or is written to."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        maker = waiting.pop()
        if maker in found:
            continue
        legal = _FUNCTIONS if maker.op == "call_function" else _METHODS if maker.op == "call_method" else ()
        if maker.target not in legal or "out" in maker.kwargs:
            return None
        found[maker] = None
        waiting += maker.all_input_nodes
    memory = frozenset().union(*map(_memory, found))
    if any(_may_write(n) and memory & frozenset().union(*map(_memory, n.all_input_nodes)) for n in node.graph.nodes):
        return None
    return [maker for maker in node.graph.nodes if maker in found]


def _memory(node: fx.Node) -> frozenset[int]:
    """Names the memory of a tensor: views have that of what they look at."""
    value = node.meta.get("example_value")
    return frozenset([value.untyped_storage()._cdata]) if isinstance(value, Tensor) else frozenset()


def _may_write(node: fx.Node) -> bool:
    """Whether ``node`` may write to what it reads."""
    if node.op == "call_method":
        name = str(node.target)
        return name.strip("_") in _WRITING if name.endswith("__") else name.endswith("_")
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OperatorBase | torch._ops.OpOverloadPacket):
        return True  # who knows
    name = getattr(node.target, "__name__", "")
    in_place = name in _WRITING if getattr(node.target, "__module__", "") == "_operator" else name.endswith("_")
    return in_place or bool({"out", "inplace"} & node.kwargs.keys())


_WRITING = {
    "setitem", "delitem", "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor",
}  # fmt: skip
"""Functions of module operator, and what is between the underscores of methods."""


def _computed(makers: Sequence[fx.Node]) -> Tensor:
    """The value of the last of ``makers``, on the CPU; others are let go of behind their last reader."""
    values: dict[fx.Node, Any] = {}
    last_reader = {read: maker for maker in makers for read in maker.all_input_nodes}

    def on_cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device | str) else value  # the only texts are devices

    with _disable_current_modes(), torch.no_grad():
        for maker in makers:
            args = fx.node.map_aggregate(fx.map_arg(maker.args, values.__getitem__), on_cpu)
            kwargs = fx.node.map_aggregate(fx.map_arg(maker.kwargs, values.__getitem__), on_cpu)
            if maker.op == "call_method":
                values[maker] = getattr(args[0], str(maker.target))(*args[1:], **kwargs)
            else:
                values[maker] = maker.target(*args, **kwargs)  # type: ignore[operator]
            del args, kwargs
            for read in (read for read in maker.all_input_nodes if last_reader[read] is maker):
                del values[read]
    result = values[makers[-1]]
    assert isinstance(result, Tensor)
    return result
