"""What may be computed again for backward: the same bits from less that is saved."""

from __future__ import annotations

import pytest
import torch
from effort import THOROUGH
from graphs import ATEN, Bench, calls, stopped_after
from reference import compile_reference, differences, equal_bits, optimized, step
from small_models import Tiny, tokens
from test_levels import post_norm
from torch import fx

import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import nbytes
from slimfit_fx.passes.insert_codecs import ENCODED
from slimfit_fx.passes.partition import DECISION
from slimfit_fx.presets import RECOMPUTE

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


@pytest.mark.parametrize(
    ("level", "share"),
    [
        pytest.param("cheap", 1.0, marks=pytest.mark.thorough),
        ("products", 1.0),
        pytest.param("blocks", 1.0, marks=pytest.mark.thorough),
        ("blocks", 0.5),
        pytest.param("blocks", 0.25, marks=pytest.mark.thorough),
    ],
)
def test_gradients_are_the_same_bits(level, share):
    """Of torch's own partition, dropout and closed units included."""
    again = {"recompute": level, "recompute_share": share}
    model, session = optimized(Tiny(depth=3), preset="exact", scheduler="none", min_bytes=0, **again)
    reference = Tiny(depth=3)
    expected_loss, expected = step(compile_reference(reference), reference, tokens())
    for closed in ((), CLOSED):
        session.unfreeze()
        if closed:
            session.freeze(closed)
        loss, grads = step(model, model, tokens())
        assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=set(closed)) == []


def test_each_level_saves_less_and_runs_more_again():
    benches = [planned(level, depth=3) for level in LEVELS]
    saved, again = [saved_bytes(b) for b in benches], [products(b) for b in benches]
    assert saved[0] > saved[1] and saved[0] > saved[2]
    assert again[0] < again[1] and again[0] < again[2], "attention scores alone at first"


@pytest.mark.parametrize("level", [pytest.param("products", marks=pytest.mark.thorough), "blocks"])
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


def layers_that_run_again(level: str, share: float) -> list[int]:
    """Per layer, how many of the products of its forward are in backward too."""
    ids = tokens(batch=8)[0]
    settings = {"recompute": level, "recompute_share": share, "preset": "exact"}
    bench = stopped_after("split_joint", post_norm(depth=4), (ids, torch.ones_like(ids)), **settings)
    pair = bench.work.pair()
    again = {n.name for n in pair.backward.graph.nodes if n.op == "call_function"}
    dense = [n for n in pair.forward.graph.nodes if ops.op_name(n) == "addmm"]
    per_layer = 6  # query, key, value, the attention's output, and the two of the feed-forward part
    layers = [dense[k : k + per_layer] for k in range(0, 4 * per_layer, per_layer)]
    return [sum(n.name in again for n in layer) for layer in layers]


@pytest.mark.parametrize("level", [pytest.param("products", marks=pytest.mark.thorough), "blocks"])
def test_a_share_of_the_blocks_runs_again_from_the_first_on(level):
    everywhere = layers_that_run_again(level, 1.0)
    assert min(everywhere) > 0
    for share, count in ((0.75, 3), (0.25, 1))[: 2 if THOROUGH else 1]:
        again = layers_that_run_again(level, share)
        assert again[: count - 1] == everywhere[: count - 1], "as if all did"
        assert again[count - 1] > 0, "the last of them may be cut in two"
        assert again[count + 1 :] == [0] * len(again[count + 1 :]) and sum(again) < sum(everywhere)


@pytest.mark.thorough
def test_the_larger_the_share_the_less_is_saved():
    def saved(share: float) -> int:
        model = Tiny(depth=6, dropout=0.1)
        settings = {"recompute": "blocks", "recompute_share": share, "preset": "exact"}
        return saved_bytes(stopped_after("split_joint", model, tokens(), **settings))

    sizes = [saved_bytes(planned("cheap", depth=6)), *map(saved, (0.25, 0.5, 1.0))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.inductor
def test_shares_are_steps_between_the_peaks_of_two_levels():
    """By dry runs of the compiled code: what a budget between the two gets."""

    def peak(level: str, share: float) -> int:
        config = Config(preset="exact", scheduler="none", recompute=level, recompute_share=share, min_bytes=0)
        found = slimfit_fx.plan(Tiny(depth=6), *tokens(batch=64), config=config, peak=True).peak
        assert found is not None
        return found.worst_bytes

    peaks = [peak("cheap", 1.0), *(peak("products", share) for share in (0.25, 0.5, 0.75, 1.0))]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"recompute.*'product'.*products"):
        optimized(Tiny(depth=1), recompute="product")


def encoded(level: str) -> Bench:
    """A model whose blocks end in a LayerNorm, its saved values stored as preset balanced does."""
    ids = tokens(batch=8)[0]
    batch = (ids, torch.ones_like(ids))
    return stopped_after("insert_codecs", post_norm(depth=3), batch, recompute=level, preset="balanced")


def above(node: fx.Node) -> set[fx.Node]:
    """All that ``node`` is computed from, and itself."""
    found, left = set[fx.Node](), [node]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def made_from(bench: Bench, node: fx.Node) -> tuple[set[str], list[str]]:
    """Of a node of backward: (operators that run again for it, kinds of the saved values that it is computed from).

    "as it is" stands for a saved value that is not encoded. Parameters are left out.
    """
    assert bench.work.planning is not None and bench.work.planning.cut is not None
    again = {n.name for n in bench.work.planning.cut.recomputed}
    forward = {n.name: n for n in bench.work.pair().forward.graph.nodes}
    saved = [n for n in above(node) if n.op == "placeholder" and "primals" not in n.name]
    values = {n.meta[ENCODED][0] if ENCODED in n.meta else None for n in saved}
    kinds = ["as it is" if name is None else str(forward[name].meta[DECISION].kind) for name in values]
    return {ops.op_name(n) for n in above(node) if n.name in again and not ops.is_view(n)}, sorted(kinds)


def test_what_a_layer_reads_is_computed_again_from_what_is_encoded():
    """GELU's output from the decoded input of GELU, LayerNorm's from the decoded normalised input: nothing else."""
    bench = encoded("cheap")
    found = [made_from(bench, product.args[1]) for product in calls(bench.work.pair().backward.graph, ATEN.mm.default)]
    assert [kinds for made, kinds in found if "erf" in made] == [["gelu_input"]] * 3, "one in each block"
    behind_norm = [kinds for made, kinds in found if made == {"mul", "add"}]
    assert behind_norm == [["normalised"]] * 10, "q, k and v of two blocks, the wide product of three, and the pooler"


def test_with_whole_blocks_q_k_and_v_are_computed_again_from_what_is_encoded():
    """Out of LayerNorm's output, which is computed again from the one value that enters the block."""
    bench = encoded("blocks")
    assert bench.work.planning is not None and bench.work.planning.cut is not None
    again = {n.name for n in bench.work.planning.cut.recomputed}
    products = [n for n in calls(bench.work.pair().backward.graph, ATEN.addmm.default) if n.name in again]
    found = [made_from(bench, product) for product in products]
    assert found.count(({"addmm", "mul", "add"}, ["block_input"])) == 6, "of the blocks that follow another"
