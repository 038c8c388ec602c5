"""hand_over_parts: what passes between blocks that run in tiles is handed on in parts, and nothing else changes."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from effort import THOROUGH, examples, first
from graphs import ATEN, Sketch, calls, module_texts, unequal, value_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from small_models import Tiny, tokens
from test_pass_tile_blocks import MIXES, alone, gates_of, pair_of, plain_pair, run_tiles, tiled
from torch import fx, nn

from slimfit_fx.graph import batch as batch_
from slimfit_fx.passes import outline_repeats as outlined_
from slimfit_fx.passes import tile_stretches
from slimfit_fx.passes.hand_over_parts import hand_over_parts
from slimfit_fx.passes.outline_repeats import INVOKE, outline_repeats
from slimfit_fx.passes.tile_bodies import PUT_PART
from slimfit_fx.runtime.ghosts import is_ghost
from slimfit_fx.runtime.measure import step_memory

LAYERS, TILES, EXAMPLES, TOKENS, WIDTH = 5, 4, 8, 4, 6


@pytest.fixture(autouse=True)
def whatever_it_is_worth(monkeypatch):
    """The models here are small: what tiles make of memory is another test's business."""
    monkeypatch.setattr(outlined_, "FEWEST_SAVED", 4)
    monkeypatch.setattr(tile_stretches, "WORTH", 1e9)


def layers(read_whole=lambda layer: False, count: int = LAYERS, mix=MIXES["pointwise"]) -> fx.GraphModule:
    """Layers on (8, 4, 6). ``read_whole``: of which of them somebody else reads what they give."""
    s = Sketch()
    x, kept = s.input("x", EXAMPLES, TOKENS, WIDTH), []
    for layer in range(count):
        up, down = s.input(f"primals_{2 * layer}", WIDTH, 24), s.input(f"primals_{2 * layer + 1}", 24, WIDTH)
        wide = s.call(ATEN.mm.default, s.call(ATEN.view.default, x, [32, WIDTH]), up)
        wide = s.call(ATEN.view.default, mix(s, s.call(ATEN.view.default, wide, [EXAMPLES, TOKENS, 24])), [32, 24])
        narrow = s.call(ATEN.view.default, s.call(ATEN.mm.default, wide, down), [EXAMPLES, TOKENS, WIDTH])
        x = s.call(ATEN.add.Tensor, narrow, x)
        if read_whole(layer):
            kept.append(x)
    return s.returns(*dict.fromkeys([*kept, x]))


def in_tiles(**how) -> fx.GraphModule:
    module = layers(**how)
    assert outline_repeats(module) and alone(module, 2 * 8 * WIDTH * 24).calls
    return module


def body_of(module: fx.GraphModule) -> fx.GraphModule:
    (body,) = {getattr(module, call.args[0].target) for call in calls(module.graph, INVOKE)}
    return body


def real(grads):
    """None for ghosts, which must not be read."""
    return [None if grad is None or is_ghost(grad) else grad for grad in grads]


def gives_the_same(plain: fx.GraphModule, module: fx.GraphModule) -> bool:
    given = [value_of(node) for node in plain.graph.find_nodes(op="placeholder")]
    return unequal(plain(*given), module(*given)) == []


# ---- it rewrites


def test_blocks_hand_parts_on():
    """The first gets slices, the next the parts that the one before it made, and behind the last they are joined."""
    before, module = in_tiles(), in_tiles()
    assert hand_over_parts(module) == LAYERS
    assert gives_the_same(before, module)
    first, *others = calls(module.graph, INVOKE)
    slices = calls(module.graph, ATEN.slice.Tensor)
    assert [node.args[1:] for node in slices] == [(0, 0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 8)]
    assert set(slices) <= set(first.args)
    for call, earlier in zip(others, (first, *others), strict=False):
        parts = [node for node in call.args[2:] if node.target is operator.getitem]
        assert [node.args for node in parts] == [(earlier, number) for number in range(TILES)]
    (joined,) = calls(module.graph, ATEN.cat.default)
    assert [node.args for node in joined.args[0]] == [(others[-1], number) for number in range(TILES)]
    assert module.graph.output_node().args[0] == (joined,)


def test_no_part_is_written_twice():
    """There is no room for the whole in a block any more, and each of its tiles reads an operand of its own."""
    module = in_tiles()
    assert calls(body_of(module).graph, PUT_PART)
    hand_over_parts(module)
    body = body_of(module)
    assert not calls(body.graph, PUT_PART) and not calls(body.graph, ATEN.empty_strided.default)
    assert not calls(body.graph, ATEN.slice.Tensor)
    read = [call.args[2] for call in calls(body.graph, INVOKE)]
    assert len({*read}) == TILES and all(node.op == "placeholder" for node in read)


@pytest.mark.parametrize("level", first(["blocks", "products"]))
def test_gradients_and_ghosts_stay_the_same(level):
    """Forward and backward of a model, to the bit, with gates open and closed."""
    seam = pair_of(Tiny(depth=3, dropout=0.0), tokens(batch=8), recompute=level)
    (whole, _), (parts, _) = tiled(seam), tiled(seam, in_parts=True)
    assert [module_texts(m) for m in (whole.forward, whole.backward)] != [
        module_texts(m) for m in (parts.forward, parts.backward)
    ]
    names = gates_of(seam)
    for closed in ([], names[::2], names):
        (user, grads), (user_too, grads_too) = (run_tiles(pair, closed=closed) for pair in (whole, parts))
        assert unequal(user, user_too) == [] and unequal(real(grads), real(grads_too)) == []


def test_a_second_run_changes_nothing():
    copied, _ = tiled(plain_pair(), in_parts=True)
    for module in (copied.forward, copied.backward):
        before = module_texts(module)
        assert hand_over_parts(module) == 0
        assert module_texts(module) == before


# ---- it leaves alone


def test_what_is_read_whole_behind_most_blocks_stays_whole():
    """Saved for backward, say: joined it would be there twice, over and over."""
    module = in_tiles(read_whole=lambda layer: layer > 0)
    before = module_texts(module)
    assert hand_over_parts(module) == 0
    assert module_texts(module) == before


def test_what_is_read_whole_behind_one_block_is_joined_there():
    """The next block still takes the parts."""
    before, module = (in_tiles(read_whole=lambda layer: layer == 1) for _ in range(2))
    assert hand_over_parts(module) == LAYERS
    assert gives_the_same(before, module)
    assert len(calls(module.graph, ATEN.cat.default)) == 2
    for joined in calls(module.graph, ATEN.cat.default):
        assert [user.op for user in joined.users] == ["output"]


def test_blocks_on_the_whole_batch_stay_as_they_are():
    module = layers()
    assert outline_repeats(module)
    before = module_texts(module)
    assert hand_over_parts(module) == 0
    assert module_texts(module) == before


def test_graphs_without_blocks_stay_as_they_are():
    assert hand_over_parts(layers()) == 0


# ---- any graph


@settings(max_examples=examples(40))
@given(
    count=st.integers(3, 6),
    read=st.sets(st.integers(0, 5)),
    tiles=st.sampled_from((2, 4, 8)),
    mix=st.sampled_from([name for name in MIXES if name != "heads"]),
)
def test_any_chain_of_layers_computes_the_same_bits(count, read, tiles, mix):
    """Whoever reads what passes between them. It goes in parts if nobody else reads it, and behind few layers."""
    found = [layers(read.__contains__, count, MIXES[mix]) for _ in range(2)]
    for module in found:
        assert outline_repeats(module) and alone(module, 2 * EXAMPLES // tiles * TOKENS * WIDTH * 24).calls
    before, module = found
    handed = hand_over_parts(module)
    module.graph.lint()
    assert gives_the_same(before, module)
    assert handed or read & set(range(count - 1))


@settings(max_examples=examples(8))
@given(depth=st.integers(3, 5 if THOROUGH else 4), closed=st.integers(0, 2**16), tiles=st.sampled_from((2, 4, 8)))
def test_any_gates_of_any_depth_give_the_same_bits(depth, closed, tiles):
    """Backward, too: gradients are the same bits, and ghosts are ghosts."""
    torch._dynamo.reset()
    seam = pair_of(Tiny(depth=depth, dropout=0.0), tokens(batch=8), recompute="blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_, "COUNTS", (tiles,))
        (whole, _), (parts, _) = tiled(seam), tiled(seam, in_parts=True)
    assert module_texts(whole.backward) != module_texts(parts.backward)
    names = [name for index, name in enumerate(gates_of(seam)) if closed >> index % 17 & 1]
    (user, grads), (user_too, grads_too) = (run_tiles(pair, closed=names) for pair in (whole, parts))
    assert unequal(user, user_too) == [] and unequal(real(grads), real(grads_too)) == []
    ghosts = [[grad is not None and is_ghost(grad) for grad in found] for found in (grads, grads_too)]
    assert ghosts[0] == ghosts[1]


# ---- compiled


class Residual(nn.Module):
    """Four layers of the same kind between a layer and a mean: what is widest lies between the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.mark.inductor
@pytest.mark.slow
def test_a_compiled_step_takes_less_and_computes_the_same(monkeypatch):
    """The same bits with and without; the peak is smaller by most of a value that passes between blocks, and known."""
    monkeypatch.setattr(batch_, "COUNTS", (4,))
    monkeypatch.setattr(batch_, "LEAST_FLOPS", {"cpu": 1})
    x, found = torch.randn(64, 8, 16), {}
    chosen = {"preset": "balanced", "scheduler": "none", "min_bytes": 0, "recompute": "blocks"}
    for without in ((), ("hand_over_parts",)):
        torch._dynamo.reset()
        model, session = optimized(Residual(), executor="inductor", disabled_passes=without, **chosen)
        loss = model(x)
        loss.backward()
        grads = [param.grad for param in model.parameters()]
        model.zero_grad()
        memory = step_memory(functools.partial(model, x), lambda loss: loss.backward())
        assert memory.peak_bytes <= session.predict_peak().peak_bytes <= 1.02 * memory.peak_bytes
        assert session.recompiles == 0
        found[without] = [loss.detach(), *grads], memory.peak_bytes
    (values, peak), (values_whole, peak_whole) = found.values()
    assert unequal(values, values_whole) == []
    assert peak < peak_whole - x.nbytes // 2
