"""Store saved values encoded: encode in forward, decode in backward.

::

    forward:  v = gelu_input(...)          forward:  v = ...; q, scale = encode(v)
              return loss, v          ->             return loss, q, scale
    backward: g = f(v)                     backward: g = f(decode(q, scale))

A value is encoded once however many readers it has. Reads ``meta["slimfit_decision"]`` of the saved values
(partition.py); values without a codec are not touched. Dense but permuted values are encoded in the order of their
memory and come back with their own strides.

A decision with ``parts`` has the value stored twice, for two groups of readers (static_readers.py)::

    backward: dx = f(v); dW = h(v)    ->   dx = f(decode(values, places)); dW = h(v)

insert_gates.py then drops ``v`` itself while no unit trains that reads it. Who reads what does not depend on the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from slimfit_fx.codecs import Codec
from slimfit_fx.passes.partition import DECISION
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.static_readers import ReaderGroups, StaticReaders, part_readers
from slimfit_fx.passes.templates import TemplateWriter
from slimfit_fx.planning.decisions import dense_order

ENCODED = "slimfit_encoded"
"""Marks a part of an encoded value with (the value's name, what kind of part, its number)."""
STATIC_STORED = "static part"


def insert_codecs(
    seam: Seam, gates: Sequence[int], grads_of: Sequence[str | None], *, decompositions: dict[Any, Any]
) -> int:
    """Encode every saved value that has a codec. Returns how many were encoded.

    ``gates[j]`` is the gate of the backward graph's output ``j`` or STATIC, ``grads_of[j]`` the input of the forward
    graph that it is the gradient of, if that is known.
    """
    writer = _Writer(seam, decompositions)
    count = _insert_static_codecs(writer, gates, grads_of)
    for value, placeholder in seam.saved():
        codec = _codec_of(value)
        if codec is not None and ENCODED not in value.meta:
            writer.store(codec, value, placeholder)
            count += 1
    if count:
        for graph_module in (seam.forward, seam.backward):
            graph_module.graph.lint()
            graph_module.recompile()
    return count


def _insert_static_codecs(writer: _Writer, gates: Sequence[int], grads_of: Sequence[str | None]) -> int:
    saved, backward = writer.seam.saved(), writer.seam.backward.graph
    done = {v.meta[ENCODED][0] for v, _ in saved if ENCODED in v.meta}
    todo = [(v, p) for v, p in saved if getattr(v.meta.get(DECISION), "parts", None) and v.name not in done]
    if not todo:
        return 0
    readers, count = StaticReaders(backward, gates, grads_of), 0
    for value, placeholder in todo:
        decision = value.meta[DECISION]
        static, units = decision.parts
        found = readers.find(value, placeholder)
        if isinstance(found, str):
            value.meta[DECISION] = replace(decision, parts=None, reason=f"{decision.reason}; {found}")
            continue
        value.meta[DECISION] = replace(decision, codec=units)
        if found.units:
            writer.store_beside(static, value, placeholder, found)
        else:
            writer.store(static, value, placeholder, STATIC_STORED)
        count += 1
    backward.eliminate_dead_code()
    return count


def _codec_of(node: fx.Node) -> Codec | None:
    decision = node.meta.get(DECISION)
    return None if decision is None else decision.codec


class _Writer:
    """Writes encoders into the forward graph and decoders into the backward graph."""

    def __init__(self, seam: Seam, decompositions: dict[Any, Any]) -> None:
        self.seam = seam
        self._encoder = TemplateWriter(seam.forward.graph, decompositions)
        self._decoder = TemplateWriter(seam.backward.graph, decompositions)

    def store(self, codec: Codec, value: fx.Node, placeholder: fx.Node, what: str = "part") -> None:
        """Save ``value`` encoded, and hand it decoded to all who read it."""
        parts = self._encode(codec, value, what)
        decoded = self._decode(codec, value, self._mark(parts, self.seam.replace(value, placeholder, parts)))
        placeholder.replace_all_uses_with(decoded)
        self.seam.backward.graph.erase_node(placeholder)

    def store_beside(self, codec: Codec, value: fx.Node, placeholder: fx.Node, readers: ReaderGroups) -> None:
        """Save ``value`` encoded as well, for those of its readers that are static."""
        parts = self._encode(codec, value, STATIC_STORED)
        decoded = self._decode(codec, value, self._mark(parts, self.seam.insert(value, placeholder, parts)))
        part_readers(readers, placeholder, decoded)

    def _encode(self, codec: Codec, value: fx.Node, what: str) -> list[fx.Node]:
        encode, _ = _functions(codec, value)
        key = ("encode", codec, dense_order(value.meta["val"]))
        parts = self._encoder.write(encode, [value], key=key, before=value.next)
        for index, part in enumerate(parts):
            part.meta[ENCODED] = (value.name, what, index)
        return parts

    @staticmethod
    def _mark(parts: Sequence[fx.Node], stored: list[fx.Node]) -> list[fx.Node]:
        for here, there in zip(parts, stored, strict=True):
            there.meta[ENCODED] = here.meta[ENCODED]
        return stored

    def _decode(self, codec: Codec, value: fx.Node, stored: Sequence[fx.Node]) -> fx.Node:
        _, decode = _functions(codec, value)
        val = value.meta["val"]
        key = ("decode", codec, dense_order(val), val.dtype, _inner(val))
        first = next(n for n in self.seam.backward.graph.nodes if n.op != "placeholder")
        (decoded,) = self._decoder.write(decode, stored, key=key, before=first)
        return decoded


def _inner(val: Tensor) -> int:
    """The size of the dimension that is innermost in memory."""
    order = dense_order(val)
    return int(val.shape[order[-1]]) if order else 1


def _functions(codec: Codec, value: fx.Node) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """What encodes ``value``, in the order of its memory, and what gives it back from the parts."""
    val = value.meta["val"]
    order = dense_order(val)
    assert order is not None, f"the planner gave {value} a codec that cannot hold it"
    inner = _inner(val)
    back = tuple(order.index(d) for d in range(len(order)))
    as_it_is = order == back == tuple(range(len(order)))

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return codec.encode(x if as_it_is else x.permute(order))

    def decode(*parts: Tensor) -> Tensor:
        decoded = codec.decode(parts, val.dtype, inner)
        return decoded if as_it_is else decoded.permute(back)

    return encode, decode
