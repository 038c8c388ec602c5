"""Store saved values encoded: encode in forward, decode in backward.

::

    forward:  v = gelu_input(...)          forward:  v = ...; q, scale = encode(v)
              return loss, v          ->             return loss, q, scale
    backward: g = f(v)                     backward: g = f(decode(q, scale))

A value is encoded once however many readers it has. Reads ``meta["slimfit_decision"]`` of the saved values
(partition.py); values without a codec are not touched. Dense but permuted values are encoded in the order of their
memory and come back with their own strides.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from slimfit_fx.codecs import Codec
from slimfit_fx.passes.partition import DECISION
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.templates import TemplateWriter
from slimfit_fx.planning.planner import dense_order

ENCODED = "slimfit_encoded"


def insert_codecs(seam: Seam, *, decompositions: dict[Any, Any]) -> int:
    """Encode every saved value that has a codec. Returns how many were encoded."""
    todo = [(v, p) for v, p in seam.saved() if _codec_of(v) is not None and ENCODED not in v.meta]
    if not todo:
        return 0
    encoder = TemplateWriter(seam.forward.graph, decompositions)
    decoder = TemplateWriter(seam.backward.graph, decompositions)
    for value, placeholder in todo:
        _insert_codec(seam, encoder, decoder, value, placeholder)
    for graph_module in (seam.forward, seam.backward):
        graph_module.graph.lint()
        graph_module.recompile()
    return len(todo)


def _codec_of(node: fx.Node) -> Codec | None:
    decision = node.meta.get(DECISION)
    return decision.codec if decision is not None else None


def _insert_codec(
    seam: Seam, encoder: TemplateWriter, decoder: TemplateWriter, value: fx.Node, placeholder: fx.Node
) -> None:
    codec, val = _codec_of(value), value.meta["val"]
    order = dense_order(val)
    assert codec is not None and order is not None, f"the planner gave {value} a codec that cannot hold it"
    inner = int(val.shape[order[-1]]) if order else 1
    back = tuple(order.index(d) for d in range(len(order)))
    as_it_is = order == back == tuple(range(len(order)))

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return codec.encode(x if as_it_is else x.permute(order))

    def decode(*parts: Tensor) -> Tensor:
        decoded = codec.decode(parts, val.dtype, inner)
        return decoded if as_it_is else decoded.permute(back)

    key = (codec, order)
    parts = encoder.write(encode, [value], key=("encode", key), before=value.next)
    for index, part in enumerate(parts):
        part.meta[ENCODED] = (value.name, index)
    stored = seam.replace(value, placeholder, parts)
    for here, there in zip(parts, stored, strict=True):
        there.meta[ENCODED] = here.meta[ENCODED]
    first = next(n for n in seam.backward.graph.nodes if n.op != "placeholder")
    (decoded,) = decoder.write(decode, stored, key=("decode", key, val.dtype, inner), before=first)
    placeholder.replace_all_uses_with(decoded)
    seam.backward.graph.erase_node(placeholder)
