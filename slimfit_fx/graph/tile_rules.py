"""One rule for each operator that may see a part of the batch: given how its arguments stand, how does its result.

That is all that correctness rests on: an operator without a rule, or one whose rule says nothing, runs on the whole
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.repeats import arguments_of
from slimfit_fx.graph.tile_states import EACH, SAME, SUM, Flow, Rule, StateOf, States

_LINEAR_IN_ONE = {
    "view",
    "reshape",
    "_unsafe_view",
    "permute",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "clone",
    "alias",
    "neg",
    "convert_element_type",
    "_to_copy",
}


def sum_of_tiles(node: fx.Node, name: str, state_of: StateOf) -> Flow | None:
    """Linear operators on sums over tiles: what they make of the parts adds up as well."""
    states = [state_of(argument) for argument in arguments_of(node)]
    linear = (
        (name in _LINEAR_IN_ONE and len(states) == 1)
        or (name == "mul" and sorted(states, key=str) in ([SUM], [SUM, None]))
        or (name == "div" and state_of(first_argument(node)) == SUM and {*states[1:]} <= {None} and not _rounds(node))
        or (name in {"add", "sub"} and states == [SUM, SUM])
    )
    return Flow(SUM) if linear and _val(node).dtype.is_floating_point else None


def _rounds(node: fx.Node) -> bool:
    return node.kwargs.get("rounding_mode") is not None


def elementwise(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Arguments are aligned at their last dimensions; whole ones that are as long are cut like the result."""
    rank = _val(node).dim()
    tensors = [argument for argument in node.all_input_nodes if ops.is_tensor(argument)]
    along = {_int(state_of(a)) + rank - _val(a).dim() for a in tensors if state_of(a) is not None}
    if len(along) != 1:
        return None
    (result,) = along
    size, slices = _val(node).shape[result], {}
    for argument in tensors:
        here = result - rank + _val(argument).dim()
        long = here >= 0 and _val(argument).shape[here] == size and size != 1
        if state_of(argument) is None and long:
            slices[argument] = here
        elif state_of(argument) is not None and not long:
            return None
    return Flow(result, slices)


def _view(node: fx.Node, state_of: StateOf) -> Flow | None:
    """The n-th part of a stretch of memory is the n-th part, whatever its shape: the dimensions before must agree."""
    along, before, after = _int(state_of(first_argument(node))), _val(first_argument(node)).shape, _val(node).shape
    ahead = math.prod(before[:along])
    places = [place for place in range(len(after)) if math.prod(after[:place]) == ahead]
    return Flow(places[-1]) if places else None


def _permute(node: fx.Node, state_of: StateOf) -> Flow | None:
    rank = _val(node).dim()
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    return Flow(order.index(_int(state_of(first_argument(node)))))


def _transpose(node: fx.Node, state_of: StateOf) -> Flow | None:
    rank, along = _val(node).dim(), _int(state_of(first_argument(node)))
    pair = [int(d) % rank for d in node.args[1:3]] if len(node.args) > 1 else [0, 1]  # type: ignore[arg-type]
    return Flow(pair[1 - pair.index(along)] if along in pair else along)


def _expand(node: fx.Node, state_of: StateOf) -> Flow | None:
    return Flow(_int(state_of(first_argument(node))) + _val(node).dim() - _val(first_argument(node)).dim())


def _unsqueeze(node: fx.Node, state_of: StateOf) -> Flow | None:
    place, along = int(node.args[1]) % _val(node).dim(), _int(state_of(first_argument(node)))  # type: ignore[arg-type]
    return Flow(along + (place <= along))


def _squeeze(node: fx.Node, state_of: StateOf) -> Flow | None:
    source, along = _val(first_argument(node)), _int(state_of(first_argument(node)))
    gone = [d for d in _dims(node, source.dim()) if source.shape[d] == 1]
    return None if along in gone else Flow(along - sum(d < along for d in gone))


def _reduce(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Along other dimensions each tile has its own; along the tiled one a sum adds up, and nothing else does."""
    rank, along = _val(first_argument(node)).dim(), _int(state_of(first_argument(node)))
    dims = _dims(node, rank)
    if along in dims:
        return Flow(SUM) if ops.op_name(node) == "sum" and _val(node).dtype.is_floating_point else None
    keeps = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    return Flow(_each(node, along if keeps else along - sum(d < along for d in dims)))


def _within(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Softmax and its like, slices, parts: along another dimension than the tiled one, whose place stays."""
    along, rank = _int(state_of(first_argument(node))), _val(first_argument(node)).dim()
    return None if _dim_argument(node) % rank == along else Flow(_each(node, along))


def _softmax_backward(node: fx.Node, state_of: StateOf) -> Flow | None:
    flow, rank = elementwise(node, state_of), _val(node).dim()
    return flow if flow is not None and int(node.args[2]) % rank != flow.result else None  # type: ignore[arg-type]


def _select(node: fx.Node, state_of: StateOf) -> Flow | None:
    along, rank = _int(state_of(first_argument(node))), _val(first_argument(node)).dim()
    place = _dim_argument(node) % rank
    return None if place == along else Flow(_each(node, along - (place < along)))


def _cat(node: fx.Node, state_of: StateOf) -> Flow | None:
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    along = {state_of(part) for part in parts} - {None}
    place = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % _val(node).dim()  # type: ignore[arg-type]
    if len(along) != 1 or place in along:
        return None
    result = _int(along.pop())
    return Flow(result, {part: result for part in parts if state_of(part) is None})


def _product(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Rows of the left factor, columns of the right one, or a sum over what both are tiled along."""
    name = ops.op_name(node)
    added = node.args[0] if name in {"addmm", "baddbmm"} else None
    left, right = node.args[-2:] if added is None else node.args[1:3]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    batched, slices = name in {"bmm", "baddbmm"}, {}  # type: bool, dict[fx.Node, int]
    rows, columns = (1, 2) if batched else (0, 1)
    here, there = state_of(left), state_of(right)
    result: int
    if batched and 0 in (here, there):
        if {here, there} - {0, None}:
            return None
        slices |= {factor: 0 for factor in (left, right) if state_of(factor) is None}
        result = 0
    elif here == rows and there is None:
        result = rows
    elif there == columns and here is None:
        result = columns
    elif here in (columns, None) and there in (rows, None):
        slices |= {left: columns} if here is None else {}
        slices |= {right: rows} if there is None else {}
        result = SUM
    else:
        return None
    if isinstance(added, fx.Node):
        if result == SUM:
            return None
        place = result - _val(node).dim() + _val(added).dim()
        if state_of(added) is None:
            if place >= 0 and _val(added).shape[place] != 1:
                slices[added] = place
        elif state_of(added) != place:
            return None
    return Flow(result, slices)


def _gather(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Picked along another dimension than the tiled one: what is picked from and the places have the same examples."""
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    along = {state_of(source), state_of(index)} - {None}
    place = _dim_argument(node) % _val(node).dim()
    if len(along) != 1 or place in along:
        return None
    result = _int(along.pop())
    if _val(source).shape[result] != _val(index).shape[result]:
        return None
    return Flow(result, {value: result for value in (source, index) if state_of(value) is None})


def _scatter(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Written into a slice along another dimension: both are tiled alike, or are cut so."""
    into, written = node.args[:2]
    assert isinstance(into, fx.Node) and isinstance(written, fx.Node)
    along = {state_of(into), state_of(written)} - {None}
    place = _dim_argument(node) % _val(node).dim()
    if len(along) != 1 or place in along or node.all_input_nodes != [into, written]:
        return None
    result = _int(along.pop())
    return Flow(result, {value: result for value in (into, written) if state_of(value) is None})


def _select_scatter(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Written to one place of another dimension, which what is written does not have."""
    into, written = node.args[:2]
    assert isinstance(into, fx.Node) and isinstance(written, fx.Node)
    place = _dim_argument(node) % _val(node).dim()
    along = state_of(into)
    if along is None:
        short = _int(state_of(written))
        along = short + (place <= short)
    short = _int(along) - (place < _int(along))
    if place == along or state_of(into) not in (along, None) or state_of(written) not in (short, None):
        return None
    return Flow(along, {v: d for v, d in ((into, _int(along)), (written, short)) if state_of(v) is None})


_PER_EXAMPLE = {"query", "key", "value", "grad_out", "grad_out_", "out", "logsumexp", "attn_bias", "attn_mask"}
"""Arguments of attention that hold one entry for each example."""
_MASKS = {"attn_bias", "attn_mask"}
"""Of these only those that have all dimensions do."""


_SEEDS = {"philox_seed", "philox_offset"}
"""With which forward drew."""


def attention(node: fx.Node, state_of: StateOf) -> Flow | None:
    """Attention is of one example at a time.

    Its own dropout draws for those it sees, and gives the seeds: what was drawn for tiles must be brought back for the
    same tiles.
    """
    given = _named_arguments(node)
    draws = float(given.get("dropout_p") or 0.0) != 0.0
    query, slices = _val(given["query"]), {}
    batch = query.shape[0]
    for name, argument in given.items():
        if not isinstance(argument, fx.Node):
            continue
        state = state_of(argument)
        if name in _SEEDS:
            if state != (EACH if draws else None):
                return None
        elif name not in _PER_EXAMPLE or (name in _MASKS and _val(argument).dim() < query.dim()):
            if state is not None:
                return None
        elif state is None and _val(argument).shape[0] == batch:
            slices[argument] = 0
        elif state not in (0, None):
            return None
    backward = "grad_out" in given or "grad_out_" in given
    others = EACH if draws and not backward else SAME
    results = tuple(
        0 if isinstance(r, torch.Tensor) and r.dim() >= 3 and r.shape[0] == batch else others for r in node.meta["val"]
    )
    read = {user.args[1] for user in node.users if ops.is_getitem(user)}
    if backward and any(results[int(place)] == SAME for place in read):  # type: ignore[arg-type]
        return None  # the gradient of a mask that all examples share
    return Flow(results, slices)


_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    "permute": _permute,
    **dict.fromkeys(("t", "transpose"), _transpose),
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "argmax", "argmin", "var_mean", "var", "any", "all", "logsumexp"), _reduce
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "split", "split_with_sizes", "slice", "cumsum"), _within),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _softmax_backward),
    **dict.fromkeys(("select", "unbind"), _select),
    "cat": _cat,
    "gather": _gather,
    "slice_scatter": _scatter,
    "select_scatter": _select_scatter,
    **dict.fromkeys(("clone", "alias", "contiguous", "detach", "_to_copy"), elementwise),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **{f"_scaled_dot_product_{kind}": attention for kind in _ATTENTION},
    **{f"_scaled_dot_product_{kind}_backward": attention for kind in _ATTENTION},
}


def _each(node: fx.Node, state: int) -> States:
    """``state`` for each result of an operator with several."""
    val = node.meta["val"]
    return (state,) * len(val) if isinstance(val, (tuple, list)) else state


def first_argument(node: fx.Node) -> fx.Node:
    """The first argument of ``node``, which is a value."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _val(node: fx.Node) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


def _int(state: States) -> int:
    assert isinstance(state, int)
    return state


def _dims(node: fx.Node, rank: int) -> list[int]:
    """The dimensions of a reduction; all of them if none is named."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])]


def _dim_argument(node: fx.Node) -> int:
    """The argument called ``dim``; 0 if it is left out."""
    found = _named_arguments(node).get("dim", 0)
    return int(found)


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
