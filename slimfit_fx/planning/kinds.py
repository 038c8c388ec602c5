"""What kind of value is it? Decides which codec a preset uses, and what no lossy codec may touch.

Kinds are read off the graph around the value (who made it, who reads it), not off module names.
"""

from __future__ import annotations

from torch import fx

from slimfit_fx.graph import ops

HUGE = 1e4
"""A constant beyond this is a mask value ("minus infinity"), which would ruin the scale of its group."""

_ACTIVATION_OPS = {"erf", "tanh", "gelu", "silu", "sigmoid", "relu", "leaky_relu", "elu"}
_FUSED_ATTENTION = "_scaled_dot_product"
_SUBTRACTED = 2
"""What a softmax takes from its argument: the largest one, and the logarithm of the sum."""


def mask_tainted(graph: fx.Graph) -> set[fx.Node]:
    """Forward values that may hold mask constants such as -inf: one beyond HUGE came in and no exp bounded it yet."""
    tainted: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        brings = (
            (ops.is_creation(node) or ops.op_name(node) in {"where", "masked_fill", "add", "clamp", "clamp_min"})
            and any(not abs(a) <= HUGE for a in ops.scalar_arguments(node))
            and _is_float(node)
        )
        carries = any(i in tainted for i in node.all_input_nodes)
        passes_on = ops.is_pointwise(node) or ops.is_view(node) or ops.op_name(node) in {"clone", "cat", "_unsafe_view"}
        if brings or (carries and passes_on and not ops.softens(node) and _is_float(node)):
            tainted.add(node)
    return tainted


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return ops.is_tensor(node) and val.dtype.is_floating_point  # type: ignore[union-attr]


def _through_views(node: fx.Node) -> list[fx.Node]:
    """All readers of ``node``, looking through views and copies."""
    found: list[fx.Node] = []
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if ops.is_view(user) or ops.op_name(user) in {"clone", "_unsafe_view", "expand", "convert_element_type"}:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
            else:
                found.append(user)
    return found


def _activation_near(node: fx.Node, depth: int = 2) -> bool:
    for user in _through_views(node):
        if ops.op_name(user) in _ACTIVATION_OPS:
            return True
        if depth and ops.op_name(user) in {"mul", "add", "pow", "neg", "exp"} and _activation_near(user, depth - 1):
            return True
    return False


def _is_normalised(node: fx.Node) -> bool:
    return ops.op_name(node) == "mul" and any(ops.op_name(ops.view_base(i)) == "rsqrt" for i in node.all_input_nodes)


def comes_from_softmax(node: fx.Node, depth: int = 4) -> bool:
    """Whether ``node`` holds attention probabilities, possibly behind dropout."""
    if ops.op_name(node) in {"_softmax", "softmax"}:
        return True
    if ops.op_name(node) == "div" and any(ops.op_name(i) == "exp" for i in node.all_input_nodes):
        return True
    chain = {"where", "mul", "clone", "convert_element_type"}
    if depth and (ops.op_name(node) in chain or ops.is_view(node)):
        return any(comes_from_softmax(i, depth - 1) for i in node.all_input_nodes)
    return False


def _feeds_attention(node: fx.Node) -> bool:
    for user in _through_views(node):
        name = ops.op_name(user)
        if name.startswith(_FUSED_ATTENTION) or name in {"bmm", "baddbmm"}:
            return True
        if name == "mul" and any(ops.op_name(u) == "bmm" for u in _through_views(user)):
            return True
    return False


def _feeds_exp(node: fx.Node) -> bool:
    """Whether its exponential is taken, in forward or in backward."""
    return any(ops.op_name(u) == "exp" for u in _through_views(node))


def is_given(node: fx.Node) -> bool:
    """Whether it is an input (a parameter), or a view or a cast of one."""
    casts = {"convert_element_type", "_to_copy"}
    while node.op == "call_function" and (ops.is_view(node) or ops.op_name(node) in casts):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def makes_logits(node: fx.Node) -> bool:
    """Whether it is a product with a parameter of which a softmax is taken: ``exp(x - max(x) - log(sum))``."""
    if not ops.is_matrix_product(node) or not any(is_given(i) for i in node.all_input_nodes):
        return False
    readers = [node]
    for _ in range(_SUBTRACTED):
        if any(_feeds_exp(reader) for reader in readers):
            return True
        readers = [u for reader in readers for u in _through_views(reader) if ops.op_name(u) == "sub"]
    return any(_feeds_exp(reader) for reader in readers)


def kind_of(node: fx.Node) -> str:
    """The kind of a saved value: a key of the codec table (``Config.codec_for``), or "exact": must not change."""
    val = node.meta["val"]
    if str(val.dtype) == "torch.bool":
        return "mask"
    if not val.dtype.is_floating_point:
        return "exact"
    if _is_normalised(node):
        return "normalised"
    if comes_from_softmax(node):
        return "attention_probs"
    if _activation_near(node):
        return "gelu_input"
    if _feeds_exp(node) or makes_logits(node):
        return "exact"
    if _feeds_attention(node):
        return "attention_qkv"
    if any(ops.is_matrix_product(u) for u in _through_views(node)):
        return "linear_input"
    return "float"
