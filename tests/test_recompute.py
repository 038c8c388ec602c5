"""What may be computed again for backward: the same bits from less that is saved."""

from __future__ import annotations

import pytest
from graphs import Bench, stopped_after
from reference import compile_reference, differences, equal_bits, optimized, step
from small_models import Tiny, tokens

from slimfit_fx.config import RECOMPUTE
from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import nbytes

LEVELS = tuple(RECOMPUTE)
CLOSED = ("blocks.1.qkv.weight", "blocks.2.norm2.weight", "blocks.0.down.weight", "embed.weight")


def planned(level: str, *, depth: int = 4, preset: str = "exact") -> Bench:
    return stopped_after("split_joint", Tiny(depth=depth, dropout=0.1), tokens(), recompute=level, preset=preset)


def saved_bytes(bench: Bench) -> int:
    return sum(nbytes(value) for value, _ in bench.work.pair().saved() if value.op != "placeholder")


def products(bench: Bench) -> int:
    """Products in backward with no gradient in them: those that run again."""
    backward = bench.work.pair().backward.graph
    forward = {n.name for n in bench.work.pair().forward.graph.nodes}
    return sum(ops.is_matrix_product(n) and n.name in forward for n in backward.nodes)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_the_same_bits(level):
    """Of torch's own partition, dropout and closed units included."""
    model, session = optimized(Tiny(depth=4), preset="exact", scheduler="none", min_bytes=0, recompute=level)
    reference = Tiny(depth=4)
    expected_loss, expected = step(compile_reference(reference), reference, tokens())
    for closed in ((), CLOSED):
        session.unfreeze()
        if closed:
            session.freeze(closed)
        loss, grads = step(model, model, tokens())
        assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=set(closed)) == []


def test_each_level_saves_less_and_runs_more_again():
    benches = [planned(level) for level in LEVELS]
    saved, again = [saved_bytes(b) for b in benches], [products(b) for b in benches]
    assert saved[0] > saved[1] and saved[0] > saved[2]
    assert again[0] < again[1] and again[0] < again[2], "attention scores alone at first"


@pytest.mark.parametrize("level", ["products", "blocks"])
def test_no_chain_runs_through_several_blocks(level):
    """What enters a block is saved: each product that runs again reads saved values of its own block only."""
    bench = planned(level, depth=6)
    joint = bench.work.planning
    assert joint is not None and joint.cut is not None
    forward = bench.work.pair().forward.graph
    recomputed = {n.name for n in joint.cut.recomputed}
    longest = 0
    depth: dict[str, int] = {}
    for node in forward.nodes:
        if node.name in recomputed and node.op == "call_function":
            own = int(ops.is_matrix_product(node))
            depth[node.name] = own + max((depth.get(i.name, 0) for i in node.all_input_nodes), default=0)
            longest = max(longest, depth[node.name])
    assert 0 < longest <= 9, "a block of this model has six products; the first and the last may be cut in two"


@pytest.mark.thorough
def test_levels_save_what_grows_with_depth_only_at_the_borders_of_blocks():
    per_block = {level: saved_bytes(planned(level, depth=7)) - saved_bytes(planned(level, depth=6)) for level in LEVELS}
    assert per_block["blocks"] < 0.6 * per_block["cheap"] and per_block["products"] < per_block["cheap"]


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"recompute.*'product'.*products"):
        optimized(Tiny(depth=1), recompute="product")
