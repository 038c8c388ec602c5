"""Attention with dropout of its own in tiles: backward brings back for each tile what forward dropped for it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from drawing_attention import BACKWARD, FORWARD, Kernel, drawing
from effort import examples, first
from graphs import calls, copy_seam, run_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import Tiny, tokens
from strategies import build, inputs, specs
from test_pass_tile_blocks import gates_of, nearly_equal, pair_of, run_tiles, tiled, tiles_of

from slimfit_fx.graph import batch as batch_
from slimfit_fx.passes import outline_repeats as outlined_
from slimfit_fx.passes import tile_blocks as tile_blocks_
from slimfit_fx.passes import tile_stretches
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.tile_stretches import Stretches


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(outlined_, "FEWEST_SAVED", 4)
    monkeypatch.setattr(tile_stretches, "WORTH", 1e9)
    monkeypatch.setattr(batch_, "COUNTS", (4, 2))
    with drawing() as found:
        yield found


@functools.cache
def pair() -> Seam:
    """That of four layers; nobody writes to it."""
    return pair_of(Tiny(depth=4, dropout=0.1), tokens(batch=8), recompute="blocks")


def compare(kernel: Kernel, seam: Seam, in_tiles: Seam, seed: int = 0, closed=()) -> None:
    """Both compute the same if the whole batch drops what the tiles dropped."""
    kernel.drawn.clear()
    user, grads = run_tiles(in_tiles, seed=seed, closed=closed)
    kernel.replay(list(kernel.drawn))
    expected, expected_grads = run_pair(seam, seed=seed, closed=closed)
    assert nearly_equal(expected, user) and nearly_equal(expected_grads, grads)


def in_tiles_of(module, op) -> int:
    return sum(len(calls(part.graph, op)) for part in tiles_of(module))


@pytest.mark.parametrize("closed", first([[0, 3, 7], [], range(40)]))
def test_backward_drops_what_forward_dropped(kernel, closed):
    seam = pair()
    copied, count = tiled(seam)
    assert count and in_tiles_of(copied.forward, FORWARD) and in_tiles_of(copied.backward, BACKWARD)
    compare(kernel, seam, copied, closed=[name for place, name in enumerate(gates_of(seam)) if place in closed])


def test_each_tile_has_seeds_of_its_own(kernel):
    copied, _ = tiled(pair())
    saved = [both for both in copied.saved_in_order().items() if both[0].meta["val"].dtype is torch.int64]
    stacked = [(a, b) for a, b in saved if a.meta["val"].shape == (4,)]
    assert stacked and all(b.meta["val"].shape == (4,) for _, b in stacked)
    kernel.drawn.clear()
    run_tiles(copied)
    seeds = [seed for seed, examples in kernel.drawn if examples == 2]
    assert seeds and len(set(seeds)) == len(seeds) == 2 * len(stacked)  # a seed and an offset for each of four tiles


def test_what_backward_does_at_once_forward_draws_at_once(kernel, monkeypatch):
    """Neither a tile's seed for the whole batch nor the whole batch's for a tile."""
    seam, best, chosen, seen = pair(), Stretches.best, tile_blocks_.choose, []
    monkeypatch.setattr(Stretches, "best", lambda found: "because" if found.drawn else best(found))
    monkeypatch.setattr(tile_blocks_, "choose", lambda *given: seen.append(given) or chosen(*given))
    copied, _ = tiled(seam)
    assert len(seen) > 2, "decided again"
    assert not in_tiles_of(copied.forward, FORWARD) and not in_tiles_of(copied.backward, BACKWARD)
    compare(kernel, seam, copied)


def test_seeds_that_the_caller_sees_are_those_of_the_whole_batch(kernel):
    """A forward that returns a seed to its caller as well draws for all at once."""
    seam = copy_seam(pair())
    drawn = [n for n in seam.saved_in_order() if n.meta["val"].dtype is torch.int64 and n.meta["val"].dim() == 0]
    assert drawn
    output = seam.forward.graph.output_node()
    output.args = ((drawn[0], *output.args[0]),)
    seam.forward.recompile()
    seam = dataclasses.replace(seam, num_fwd_outputs=seam.num_fwd_outputs + 1)
    assert drawn[0] not in seam.saved_in_order()
    copied, _ = tiled(seam)
    first = copied.forward.graph.output_node().args[0][0]
    assert first.meta["val"].shape == ()


@settings(max_examples=examples(25, share=9), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_model_that_draws_computes_the_same_in_tiles(kernel, data, seed):
    spec = data.draw(specs(max_layers=4, repeats=(3, 4), sizes=("static",)))
    spec = dataclasses.replace(spec, batch=data.draw(st.sampled_from((4, 6))))
    torch._dynamo.reset()
    seam = pair_of(
        build(spec), inputs(spec), recompute=data.draw(st.sampled_from(("cheap", "blocks"))), units=spec.is_unit,
        min_bytes=0,
    )  # fmt: skip
    copied, _ = tiled(seam)
    closed = [name for index, name in enumerate(gates_of(seam)) if (seed >> index % 16) & 1]
    compare(kernel, seam, copied, seed, closed)
