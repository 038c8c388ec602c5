"""Decide, for every value that backward may read, what happens to it. Decides only: the passes act.

The rule of this planner: minimum cut with the encoded size of each value, weighted by the chance that it is needed at
all (a dynamic value of closed units is dropped), against the time that running operators again takes (prices.py).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from slimfit_fx.codecs import Codec
from slimfit_fx.graph import ops
from slimfit_fx.graph.batch import BatchCut
from slimfit_fx.graph.joint import JointGraph, backward_closure, forward_needs, hint, nbytes
from slimfit_fx.planning.borders import Blocks, find_blocks
from slimfit_fx.planning.chances import chance_open, effective_gates
from slimfit_fx.planning.decisions import Decision, refuse_codec, value_spec
from slimfit_fx.planning.kinds import comes_from_softmax, is_given, kind_of, makes_logits, mask_tainted
from slimfit_fx.planning.mincut import Cut, minimum_cut
from slimfit_fx.planning.prices import Prices, inner_size
from slimfit_fx.planning.roofline import node_flops
from slimfit_fx.planning.rows import ExpectedTime, Faster
from slimfit_fx.presets import BLOCK_INPUT, PARTS

_LARGEST_SCORES = 256
"""Products of two activations (attention scores) run again at any level up to this many elements per sum."""
_BLOCKS_DISCOUNT, _BLOCKS_PRODUCT_DISCOUNT = 1e-3, 0.01
"""What cheap operators and products cost where whole blocks are computed again, against their usual price: as good as
nothing, but a product is still not run for the sake of one number per row, such as the variance that a norm reads."""

_FEW = 0.5
"""The chance that a unit trains which reads a value, up to which the value is stored for units as well."""
_PREFER_PARTS = 0.95
"""What a value with two parts costs against its bytes: what stands before a norm would take as many, with one part."""


@dataclass(frozen=True)
class Planning:
    """The planner's result: the cut and one decision per saved value.

    ``refusal`` is set when nothing could be planned.
    """

    cut: Cut | None
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)
    refusal: str | None = None
    recomputed_reads: tuple[fx.Node, ...] = ()
    """Forward values that backward reads and that are computed again for it."""
    note: str | None = None
    """What a user should know of how it was planned."""
    time: ExpectedTime | None = None
    """What it is expected to cost and to spare."""
    blocks: int = 0
    """How many repeated blocks were found; 0 where only cheap work runs again."""
    faster: Faster | None = None
    """What was left for less memory."""


class Planner:
    """Plans one joint graph.

    ``codec_for(kind)`` is the preset's table, ``why_milder(kind)`` why it is not; ``min_bytes`` leaves small values
    alone; ``prices`` are those of the device, and ``recompute_price`` multiplies that of running an operator again.
    ``recompute``: what may run again at all, see ``Config.recompute``, and ``recompute_share`` for which of the blocks,
    from the first on: backward reaches those last, when the values of all others are gone. Beyond ``"cheap"`` the
    values that pass from one repeated block to the next are always saved, so that no chain of recomputation runs
    through several blocks. ``cut``: the tiles in which blocks will run, for what backward is expected to hold.
    """

    def __init__(
        self,
        joint: JointGraph,
        serves_of: Callable[[fx.Node], frozenset[int]],
        *,
        codec_for: Callable[[str], Codec | None],
        freeze_rate: float,
        min_bytes: int,
        recompute_price: float = 1.0,
        recompute: str = "cheap",
        recompute_share: float = 1.0,
        why_milder: Callable[[str], str | None] = lambda kind: None,
        prices: Prices | None = None,
        cut: BatchCut | None = None,
    ) -> None:
        self.prices, self.batch_cut = prices or Prices(), cut
        self.why_milder = functools.cache(why_milder)
        self.recompute_price, self.recompute, self.recompute_share = recompute_price, recompute, recompute_share
        self.product_price = 1.0
        self.joint, self.serves_of = joint, serves_of
        self.codec_for = functools.cache(codec_for)
        self.freeze_rate, self.min_bytes = freeze_rate, min_bytes
        self.backward, self.forward = backward_closure(joint), forward_needs(joint)
        # an element that only backward reads is there all the same once forward ran its operator
        self.forward |= {n for n in joint.graph.nodes if ops.is_getitem(n) and n.args[0] in self.forward}
        self.user_outputs = {
            ops.view_base(n) for n in joint.outputs()[: joint.num_fwd_outputs] if isinstance(n, fx.Node)
        }
        self.mutated = {n.args[0] for n in joint.graph.nodes if ops.op_name(n) == "copy_"}
        self.tainted = mask_tainted(joint.graph)
        self._decisions: dict[tuple[fx.Node, bool], Decision] = {}
        self._save_costs: dict[tuple[fx.Node, bool], float] = {}
        self._flops: dict[fx.Node, float] = {}
        self._chances: dict[fx.Node, float] = {}

    def at_level(self, recompute: str, share: float = 1.0, product_price: float = 1.0) -> Planner:
        """The same planner, with this to run again at most, products for this part of their price.

        What does not depend on it is shared.
        """
        _ = self.blocks, self.heads, self.needed_backward, self.spared_flops
        other = copy.copy(self)
        other.recompute, other.recompute_share, other.product_price = recompute, share, product_price
        vars(other).pop("early", None)
        return other

    @property
    def boundaries(self) -> frozenset[fx.Node]:
        """Values that are saved whatever they cost."""
        borders = frozenset() if self.recompute == "cheap" else self.blocks.borders & self.early
        return borders.union(self.heads.values()) if self.batch_cut is not None else borders

    @functools.cached_property
    def heads(self) -> dict[fx.Node, fx.Node]:
        """Products that make logits, and the smaller values that they are made of: tile by tile logits are made again.

        They must be the same then, since the sums of their exponentials are saved: what they are made of is saved as it
        is. A user output is alive anyway. Without tiles all would come back at once: they are saved themselves.
        """
        made = [n for n in self.forward if makes_logits(n) and n not in self.user_outputs]
        read = [(n, ops.view_base(i)) for n in made for i in n.all_input_nodes if not is_given(i)]
        return {n: i for n, i in read if nbytes(i) < nbytes(n)}

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The repeated blocks of the forward (borders.py)."""
        read = {i for n in self.needed_backward for i in n.all_input_nodes}
        return find_blocks(self.joint.graph, self.forward, read & self.forward)

    @functools.cached_property
    def early(self) -> set[fx.Node]:
        """The part of the forward in which ``recompute`` holds: up to the end of a block, if there are any."""
        if self.recompute_share == 1:
            return self.forward
        order = [n for n in self.joint.graph.nodes if n in self.forward]
        windows = self.blocks.windows
        ends = [order.index(window[-1]) for window in windows] or list(range(len(order)))
        count = math.ceil(self.recompute_share * len(ends) - 1e-9)  # a share may be a rounded quotient
        return set(order[: ends[count - 1] + 1])

    def _level_of(self, node: fx.Node) -> str:
        return self.recompute if node in self.early else "cheap"

    def plan(self) -> Planning:
        """The cheapest cut and what is done with each value in it."""
        needed = self.needed_backward
        if not needed:
            return Planning(None, refusal="no gradient is computed in this graph")
        cut = minimum_cut(self.joint.graph, self.backward, needed, self.save_cost, self._recompute_price)
        if cut is None:
            return Planning(None, refusal="no finite cut: some value can neither be saved nor computed again")
        reads = tuple(
            n
            for n in self.joint.graph.nodes
            if n in cut.recomputed and n in self.forward and any(u in needed for u in n.users)
        )
        decisions = {n: self.decide(n) for n in cut.saved}
        blocks = 0 if self.recompute == "cheap" else len(self.blocks.windows)
        return Planning(cut, decisions, recomputed_reads=reads, blocks=blocks)

    def expected_time(self, planning: Planning) -> ExpectedTime | None:
        """What a planning of this graph, at any level, is expected to cost, and closed units to spare."""
        cut = planning.cut
        if cut is None:
            return None
        again = (n for n in cut.recomputed & self.forward if n.op == "call_function" and not self._is_free(n))
        return ExpectedTime(
            again_ms=math.fsum(self.chance(n) * self.prices.operator_ms(n) for n in again),
            codecs_ms=math.fsum(self.codec_ms(n, decision) for n, decision in planning.decisions.items()),
            spared_ms=math.fsum(
                (1.0 - self.chance(n)) * self.prices.operator_ms(n)
                for n in self.needed_backward
                if ops.is_matrix_product(n)
            ),
        )

    @functools.cached_property
    def needed_backward(self) -> set[fx.Node]:
        """Nodes only backward can run that some gradient depends on."""
        stack = [n for n in self.joint.grad_nodes() if isinstance(n, fx.Node) and n in self.backward]
        stack += [n for n in self.backward if n.op == "call_function" and not n.users]
        needed: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in self.backward and node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return needed

    def expected_flops(self, node: fx.Node) -> float:
        """Operations of a product in ``node``, by the chance that it is needed."""
        if node not in self._flops:
            self._flops[node] = self.chance(node) * node_flops(node)
        return self._flops[node]

    @functools.cached_property
    def spared_flops(self) -> float:
        """Operations of products that only closed units need, as far as they are expected to be closed."""
        return math.fsum((1.0 - self.chance(n)) * node_flops(n) for n in self.needed_backward)

    # -- what saving costs ---------------------------------------------------------------------------------------------
    def decide(self, node: fx.Node) -> Decision:
        """What is done with ``node`` if it is saved (the same answer whenever asked)."""
        key = node, self._level_of(node) == "blocks"
        if key not in self._decisions:
            self._decisions[key] = self._decide(node)
        return self._decisions[key]

    def _decide(self, node: fx.Node) -> Decision:
        if node.op == "placeholder":
            return Decision("input", None, "an input or parameter: alive anyway")
        if not ops.is_tensor(node):
            return Decision("symbol", None, "a number")
        if ops.view_base(node) in self.user_outputs:
            return Decision("output", None, "a user output: alive anyway")
        if ops.view_base(node).op == "placeholder":
            return Decision("input", None, "a view of an input: alive anyway")
        if nbytes(node) < self.min_bytes:
            return Decision("small", None, f"smaller than {self.min_bytes} bytes")
        if ops.is_random(node):
            return Decision("exact", None, "random numbers")
        if self.batch_cut is not None and node in self.heads.values():
            return Decision("exact", None, "logits are made again from it, and must be the same")
        kind = kind_of(node)
        if kind == "exact":
            return Decision(kind, None, "must stay exact: integers, or read by exp in backward")
        if kind != "mask" and self._level_of(node) == "blocks":
            kind = BLOCK_INPUT
        return self._with_codec(node, kind)

    def _with_codec(self, node: fx.Node, kind: str) -> Decision:
        usual = self._with_codec_of(node, kind)
        static, units = (self.codec_for(part) for part in PARTS.get(kind, (kind, kind)))
        if static == units:
            return usual
        static, units = (self._with_codec_of(node, part).codec for part in PARTS[kind])
        if static is None:
            return usual
        chance, whole = self._chance_beside(node), self._size_under(usual.codec, node)
        both = self._size_under(static, node) + chance * self._size_under(units, node)
        return replace(usual, parts=(static, units)) if chance <= _FEW or both < whole else usual

    def _with_codec_of(self, node: fx.Node, kind: str) -> Decision:
        codec, milder = self.codec_for(kind), self.why_milder(kind)
        if codec is None:
            return Decision(kind, None, f"{kind}: {milder}" if milder else f"the preset keeps values of kind {kind}")
        if node in self.tainted and not codec.lossless:
            return Decision(kind, None, "may hold mask constants such as -inf")
        spec = value_spec(node.meta["val"])
        if spec is None:
            return Decision(kind, None, "its memory has gaps or overlaps")
        refusal = codec.refuses(spec) or refuse_codec(codec, spec, nbytes(node))
        if refusal:
            return Decision(kind, None, f"{codec.name}: {refusal}")
        return Decision(kind, codec, f"{kind}: {milder or codec.name}")

    def save_cost(self, node: fx.Node) -> float:
        """Bytes that are expected to be held if ``node`` is saved, with its codec's time; infinite if it cannot be."""
        key = node, self._level_of(node) == "blocks"
        if key not in self._save_costs:
            self._save_costs[key] = self._save_cost(node)
        return self._save_costs[key]

    def _save_cost(self, node: fx.Node) -> float:
        if node.op == "placeholder":
            return 1e15 if node in self.mutated else 0.0
        if ops.is_symbol(node):
            return 0.0
        if not ops.is_tensor(node) or ops.is_view(node) or node not in self.forward:
            return math.inf
        decision = self.decide(node)
        if decision.kind in ("input", "output"):
            return 1.0
        size = self._size_under(decision.codec, node)
        if decision.parts is not None:  # the rest is for units that train, and buys accuracy
            return _PREFER_PARTS * self._size_under(decision.parts[0], node) + 1.0
        return size * self.chance(node) + self.prices.bytes_for(self.codec_ms(node, decision)) + 1.0

    def held_bytes(self, node: fx.Node) -> float:
        """Bytes that are expected to be held for ``node`` until backward, if it is saved."""
        parts = self.held_parts(node)
        if len(parts) == 1:
            return parts[0][0] * self.chance(node)
        return sum(size * (self._chance_beside(node) if of_units else 1.0) for size, of_units in parts)

    def held_parts(self, node: fx.Node) -> list[tuple[float, bool]]:
        """(bytes, whether units alone read them) of what is held for ``node`` until backward, if it is saved."""
        if node.op == "placeholder" or not ops.is_tensor(node):
            return []
        decision = self.decide(node)
        if decision.kind in ("input", "output"):
            return []
        if decision.parts is None:
            return [(self._size_under(decision.codec, node), False)]
        static, units = decision.parts
        return [(self._size_under(static, node), False), (self._size_under(units, node), True)]

    def codec_ms(self, node: fx.Node, decision: Decision) -> float:
        """Milliseconds to expect of encoding ``node`` and, if it is needed, decoding it; 0 without a codec."""
        codecs = [decision.codec] if decision.parts is None else [*decision.parts]
        sizes = [self._size_under(codec, node) for codec in codecs if codec is not None]
        return sum((1.0 + self.chance(node)) * self.prices.traffic_ms(nbytes(node) + size) for size in sizes)

    def _size_under(self, codec: Codec | None, node: fx.Node) -> float:
        if codec is None:
            return float(nbytes(node))
        spec = value_spec(node.meta["val"])
        assert spec is not None
        return float(hint(codec.encoded_bytes(spec)))

    def _chance_beside(self, node: fx.Node) -> float:
        """The chance that a unit trains that reads ``node``, or what is computed again from it.

        Sums with other values, as at the end of a residual branch, are not looked behind: they are saved themselves.
        """
        found, again, stack = set[int](), {node}, [node]
        while stack:
            for user in stack.pop().users:
                found |= effective_gates(self.serves_of(user))
                if user in again or user in self.backward or not ops.is_cheap(user):
                    continue
                others = [i for i in user.all_input_nodes if i not in again and ops.view_base(i).op != "placeholder"]
                if ops.op_name(user) != "add" or not others:
                    again.add(user)
                    stack.append(user)
        return 1.0 - self.freeze_rate ** len(found)

    def chance(self, node: fx.Node) -> float:
        """The chance that backward needs ``node``, through its own readers or through what is recomputed from it."""
        if node not in self._chances:
            serves = self.serves_of(node)
            if serves:
                self._chances[node] = chance_open(serves, self.freeze_rate)
            else:
                readers = [self.chance(u) for u in node.users if u not in self.backward and ops.is_cheap(u)]
                self._chances[node] = max(readers, default=1.0)
        return self._chances[node]

    # -- what running it again costs -----------------------------------------------------------------------------------
    def _recompute_price(self, node: fx.Node) -> float:
        if node not in self.forward:  # not computed in forward at all: computing it in backward costs nothing extra
            return 0.0
        if node in self.boundaries:
            return math.inf
        if self._is_free(node):
            return 0.0
        if not self._may_run_again(node):
            return math.inf
        return self.recompute_price * self._discount(node) * self.prices.bytes_for(self.again_ms(node))

    @staticmethod
    def _is_free(node: fx.Node) -> bool:
        return ops.is_view(node) or ops.is_creation(node) or ops.is_getitem(node) or ops.is_symbol(node)

    def again_ms(self, node: fx.Node) -> float:
        """Milliseconds that running ``node`` again is expected to take: products whatever is needed of them."""
        return self.prices.operator_ms(node) * (1.0 if ops.is_matrix_product(node) else self.chance(node))

    def _discount(self, node: fx.Node) -> float:
        if node in self.heads:
            return _BLOCKS_PRODUCT_DISCOUNT
        if self._level_of(node) != "blocks":
            return self.product_price if ops.is_matrix_product(node) else 1.0
        return _BLOCKS_PRODUCT_DISCOUNT if ops.is_matrix_product(node) else _BLOCKS_DISCOUNT

    def _may_run_again(self, node: fx.Node) -> bool:
        """Products with a parameter only where that was asked for, attention scores of small heads always.

        What reads scores runs again in whole blocks only: it would bring them all back.
        """
        if not ops.is_matrix_product(node):
            # a decision that is asked again of a decoded value could be answered otherwise
            return ops.is_cheap(node) and not ops.is_decision(node)
        if node in self.heads:
            return self.batch_cut is not None
        if self._level_of(node) == "blocks":
            return True
        tensors = [i for i in node.all_input_nodes if ops.is_tensor(i)]
        of_activations = not any(ops.view_base(i).op == "placeholder" for i in tensors)
        if of_activations and any(comes_from_softmax(ops.view_base(i)) for i in tensors):
            return False
        if self._level_of(node) == "products":
            return True
        return ops.op_name(node) == "bmm" and of_activations and inner_size(node) <= _LARGEST_SCORES
