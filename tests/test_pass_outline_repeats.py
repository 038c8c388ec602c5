"""outline_repeats: identical blocks become calls of one subgraph, and compute the same."""

from __future__ import annotations

import functools
import operator
import pickle
import re

import pytest
import torch
from effort import examples, first
from graphs import (
    ATEN,
    Sketch,
    calls,
    copy_seam,
    module_texts,
    names,
    run_pair,
    stopped_after,
    unequal,
    values,
    watching,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import differences, equal_bits, optimized, step
from small_models import Block, Tiny, tokens
from torch import fx, nn

from slimfit_fx.graph.canonical import graph_text, node_text
from slimfit_fx.graph.repeats import find_run
from slimfit_fx.passes import outline_repeats as pass_
from slimfit_fx.passes.outline_repeats import INVOKE, outline_repeats
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.verify import verify_seam

MUL, ADD, MM, NEG, PERMUTE = ATEN.mul.Tensor, ATEN.add.Tensor, ATEN.mm.default, ATEN.neg.default, ATEN.permute.default


@pytest.fixture(autouse=True)
def every_repeat_counts(monkeypatch):
    monkeypatch.setattr(pass_, "FEWEST_SAVED", 4)


def layer(s: Sketch, x: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(what the next layer reads, what is kept)."""
    kept = s.call(MM, x, weight)
    return s.call(ADD, s.call(MUL, s.call(NEG, kept), 2.0), x), kept


def stack(depth: int, *, symbolic: bool = False) -> fx.GraphModule:
    """Layers of four operators, an embedding-like first and a loss-like last operator."""
    s = Sketch()
    x = s.input("x", 6, 4, symbolic=symbolic)
    weights = [s.input(f"w{i}", 4, 4) for i in range(depth)]
    x = s.call(ATEN.exp.default, x)
    kept = []
    for weight in weights:
        x, value = layer(s, x, weight)
        kept.append(value)
    return s.returns(s.call(ATEN.sum.default, x), *kept)


def flat(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every block written out again where it is called."""
    graph, env = fx.Graph(), {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is INVOKE:
            body = getattr(module, node.args[0].target)
            inner = {}
            for p, operand in zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True):
                inner[p] = env[operand]
            env[node] = graph.graph_copy(body.graph, inner)
        elif node.op == "call_function" and node.target is operator.getitem and node.args[0].target is INVOKE:
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "get_attr" and isinstance(getattr(module, node.target), fx.GraphModule):
            env[node] = None if all(u.target is INVOKE for u in node.users) else graph.get_attr(node.target)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(module, graph)


def kinds(module: fx.GraphModule) -> list[str]:
    """What the graph computes, in order, without names; seeds aside, which outlining moves."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and not is_seed(n)]
    return [re.sub(r"-> .*", "", node_text(n)) for n in nodes]


def is_seed(node: fx.Node) -> bool:
    return "seed" in str(node.target) or (node.target is ATEN.select.int and "seeds" in str(node.args[0].target))


# ---- it rewrites


def test_layers_become_calls_of_one_block():
    module = stack(5)
    before = kinds(module)
    assert outline_repeats(module) == 5
    (body,) = [part for _, part in module.named_children()]
    invoked = calls(module.graph, INVOKE)
    assert len({call.args[1] for call in invoked}) == 1 and len(body.graph.find_nodes(op="placeholder")) == 2
    assert [
        n.name for n in module.graph.nodes if n.op == "call_function" and n.target not in (INVOKE, operator.getitem)
    ]
    assert kinds(flat(module)) == before


def test_the_same_numbers():
    plain, outlined = stack(5), stack(5)
    assert outline_repeats(outlined)
    given_ = values(plain.graph)
    assert unequal(plain(*given_), outlined(*given_)) == []


def test_two_towers_become_two_blocks():
    s = Sketch()
    x, y = s.input("x", 6, 4), s.input("y", 6, 4)
    w = s.input("w", 4, 4)
    for _ in range(4):
        x = s.call(ADD, s.call(MUL, s.call(MM, x, w), 2.0), x)
    for _ in range(4):
        y = s.call(ATEN.tanh.default, s.call(MM, s.call(NEG, y), w))
    module = s.returns(x, y)
    assert outline_repeats(module) == 8
    assert {c.args[0].target for c in calls(module.graph, INVOKE)} == {"block_0", "block_1"}


@pytest.mark.parametrize("kept", [False, True])
def test_no_kernel_is_cut_in_two(kept):
    """What is cheap stays with what reads it up to the next product, though some layers' ends are left over then."""
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    results = []
    for _ in range(5):
        x = s.call(ATEN.tanh.default, x)
        results += [x] * kept
        x = s.call(ATEN.exp.default, s.call(MM, s.call(ATEN.view.default, x, [6, 4]), w))
    module = s.returns(x, *results)
    assert outline_repeats(module, spare_kernels=True) == 4
    (body,) = [part for _, part in module.named_children()]
    order = [n.target for n in body.graph.nodes if n.op == "call_function" and n.target is not ATEN.view.default]
    assert order == [MM, ATEN.exp.default, ATEN.tanh.default]


def test_a_kernel_ends_at_a_product_on_another_way():
    """``add`` reads the layer's input, but not in the kernel that made it: a product lies between."""
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    for _ in range(5):
        x = s.call(ATEN.exp.default, s.call(ADD, s.call(MM, x, w), x))
    module = s.returns(x)
    assert outline_repeats(module, spare_kernels=True) == 5
    (body,) = [part for _, part in module.named_children()]
    assert [n.target for n in body.graph.nodes if n.op == "call_function"] == [MM, ADD, ATEN.exp.default]


@pytest.mark.parametrize(("spare_kernels", "first"), [(False, ATEN.tanh.default), (True, MM)])
def test_bytes_or_kernels_are_spared(spare_kernels, first):
    """``tanh`` is one kernel with the sum in front of it, but behind it two values cross the border."""
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    for _ in range(5):
        x = s.call(ADD, s.call(MM, s.call(ATEN.tanh.default, x), w), x)
    module = s.returns(x)
    assert outline_repeats(module, spare_kernels=spare_kernels) >= 4
    (body,) = [part for _, part in module.named_children()]
    assert next(n.target for n in body.graph.nodes if n.op == "call_function") is first


def test_symbolic_sizes_are_operands():
    module = stack(4, symbolic=True)
    if not any(isinstance(n.meta["val"], torch.SymInt) for n in module.graph.find_nodes(op="placeholder")):
        assert outline_repeats(module) == 0, "no input brings the symbol"


# ---- it leaves alone


def test_what_does_not_repeat_stays():
    module = stack(1)
    before = module_texts(module)
    assert outline_repeats(module) == 0 and module_texts(module) == before


def test_a_second_run_changes_nothing():
    module = stack(5)
    outline_repeats(module)
    before = module_texts(module)
    assert outline_repeats(module) == 0 and module_texts(module) == before


def test_layers_with_another_constant_stay_out():
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    for index in range(6):
        x = s.call(ADD, s.call(MUL, s.call(MM, x, w), 2.0 if index < 4 else 3.0 + index), x)
    module = s.returns(x)
    assert outline_repeats(module) == 4


def test_a_layer_that_is_wired_otherwise_does_not_spoil_the_others():
    """The third layer multiplies by the input of the second."""
    s = Sketch()
    x, w = s.input("x", 4, 4), s.input("w", 4, 4)
    inputs = []
    for index in range(6):
        inputs.append(x)
        a = s.call(NEG, s.call(MM, x, w))
        b = s.call(MUL, a, a if index != 2 else inputs[1])
        x = s.call(ADD, b, x)
    plain = s.returns(x)
    expected = plain(*values(plain.graph))
    outline_repeats(plain)
    assert len(calls(plain.graph, INVOKE)) >= 3
    assert torch.equal(expected[0], plain(*values(plain.graph))[0])


def test_nothing_moves_across_a_write():
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    for _ in range(4):
        x = s.call(ADD, s.call(NEG, s.call(MM, x, w)), x)
        s.graph.call_function(ATEN.add_.Tensor, (w, 1.0)).meta["val"] = w.meta["val"]
    assert outline_repeats(s.returns(x)) == 0


# ---- memory of its own


def test_a_view_of_an_operand_is_made_outside():
    s = Sketch()
    x, w = s.input("x", 4, 4), s.input("w", 4, 4)
    kept = []
    for _ in range(5):
        kept.append(s.call(PERMUTE, x, [1, 0]))
        x = s.call(NEG, s.call(MUL, s.call(MM, kept[-1], w), 2.0))
    module = s.returns(x, *kept)
    expected = module(*values(module.graph))
    assert outline_repeats(module) >= 3
    assert unequal(expected, module(*values(module.graph))) == []
    for _, body in module.named_children():
        owners = [pass_.owner(n) for n in body.graph.output_node().args[0]]
        assert len(set(owners)) == len(owners) and all(n.op != "placeholder" for n in owners)


def test_two_views_of_one_value_are_made_outside():
    s = Sketch()
    x, w = s.input("x", 4, 4), s.input("w", 4, 4)
    kept = []
    for _ in range(5):
        product = s.call(MM, x, w)
        kept += [s.call(PERMUTE, product, [1, 0]), s.call(ATEN.view.default, product, [16])]
        x = s.call(NEG, s.call(MUL, product, 2.0))
    module = s.returns(x, *kept)
    expected = module(*values(module.graph))
    assert outline_repeats(module) >= 3
    assert unequal(expected, module(*values(module.graph))) == []
    (body,) = [part for _, part in module.named_children()]
    owners = [pass_.owner(n) for n in body.graph.output_node().args[0]]
    assert len(set(owners)) == len(owners)


# ---- whole models


@functools.cache
def described(depth: int, preset: str) -> Seam:
    """The pair of a model, with nothing outlined. Not to be changed."""
    bench = stopped_after("describe_plan", Tiny(depth=depth), tokens(), preset=preset, executor="inductor")
    return bench.work.pair()


def outlined(depth: int, preset: str) -> tuple[Seam, Seam]:
    """(the pair before, the same pair outlined)."""
    before = described(depth, preset)
    after = copy_seam(before)
    assert outline_repeats(after.forward, spare_kernels=True) and outline_repeats(after.backward)
    return before, after


@pytest.mark.parametrize("preset", first(["balanced", "exact", "max"]))
def test_a_model_outlined_gives_the_same_bits_whatever_the_gates(preset):
    before, after = outlined(4, preset)
    verify_seam("outlined", after)
    gates = [n.name for n in before.forward.graph.find_nodes(op="placeholder") if "slimfit_gate" in n.meta]
    for closed in ((), gates, gates[::2], gates[1::3]):
        expected_user, expected = run_pair(before, closed=closed)
        user, found = run_pair(after, closed=closed)
        assert unequal(expected_user, user) == []
        held = [i for i, g in enumerate(expected) if g is not None and g.untyped_storage().nbytes()]
        assert unequal([expected[i] for i in held], [found[i] for i in held]) == []


def test_what_is_compiled_does_not_grow_with_depth():
    sizes = {}
    for depth in (4, 5):
        seam = outlined(depth, "balanced")[1]
        bodies = [part for m in (seam.forward, seam.backward) for _, part in m.named_children()]
        sizes[depth] = sum(len(p.graph.nodes) for p in bodies), len(calls(seam.backward.graph, INVOKE))
    assert sizes[4][0] == sizes[5][0] and sizes[5][1] == sizes[4][1] + 1


def test_written_out_again_it_is_the_graph_it_was():
    before, after = outlined(4, "balanced")
    for old, new in zip(
        (before.forward, before.backward),
        (after.forward, after.backward),
        strict=True,
    ):
        assert sorted(kinds(flat(new))) == sorted(kinds(old))


def test_blocks_survive_being_pickled():
    backward = outlined(4, "balanced")[1].backward
    blocks = [part for name, part in backward.named_children() if name.startswith("block_")]
    cond, branches = torch.ops.higher_order.cond, 0
    for block in blocks:
        again = pickle.loads(pickle.dumps(block))
        assert len(calls(again.graph, cond)) == len(calls(block.graph, cond))
        branches += len(calls(again.graph, cond))
    assert branches


# ---- generated graphs


@st.composite
def stacks(draw) -> tuple[list[tuple[int, ...]], int]:
    """A recipe of one layer (operator, arguments by distance) and how often it comes."""
    size = draw(st.integers(2, 7))
    recipe = [(draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(size)]
    return recipe, draw(st.integers(2, 5))


def operation(s: Sketch, kind: int, a: fx.Node, b: fx.Node) -> fx.Node:
    if kind < 2:
        return s.call((MM, ADD)[kind], a, b)
    if kind == 2:
        return s.call(PERMUTE, a, [1, 0])
    return s.call(ATEN.sigmoid.default, a) if kind == 3 else s.call(ATEN._unsafe_view.default, a, [4, 4])


@settings(deadline=None, max_examples=examples(150, share=3))
@given(stacks(), st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_any_stack_computes_the_same(drawn, returned, spare_kernels):
    recipe, depth = drawn
    s = Sketch()
    made = [s.input("x", 4, 4), s.input("y", 4, 4), s.call(NEG, s.input("z", 4, 4))]
    for _ in range(depth):
        for kind, left, right in recipe:
            made.append(operation(s, kind, made[-min(left, len(made))], made[-min(right, len(made))]))
    module = s.returns(made[-1], *(made[i % len(made)] for i in returned))
    expected = module(*values(module.graph))
    before = sorted(kinds(module))
    outline_repeats(module, spare_kernels=spare_kernels)
    module.graph.lint()
    assert unequal(expected, module(*values(module.graph))) == []
    extra = len(kinds(flat(module))) - len(before)
    assert extra >= 0, "views may be made twice, nothing may be lost"
    for _, body in module.named_children():
        owners = [pass_.owner(n) for n in body.graph.output_node().args[0]]
        assert len(set(owners)) == len(owners) and all(n.op != "placeholder" for n in owners)


# ---- the Inductor route


def batch(count: int, dynamic: bool) -> tuple[torch.Tensor, ...]:
    found = tokens(batch=count)
    if dynamic:
        for tensor in found:
            torch._dynamo.mark_dynamic(tensor, 0)
    return found


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_blocks_give_the_bits_of_compiled_layers(dynamic):
    """With ghosts full of NaN in the static case: no block reads one."""
    settings_ = {"preset": "exact", "scheduler": "none", "executor": "inductor", "min_bytes": 0}
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)  # no pass runs on a graph from a cache
    with no_cache, watching(lambda step_, work: seen.append(work) if step_.name == "outline_repeats" else None):
        seen: list = []
        model, session = optimized(Tiny(depth=4), debug=not dynamic, **settings_)
        plain, other = optimized(Tiny(depth=4), disabled_passes=("outline_repeats",), **settings_)
        for count, closed in ((4, set()), (6 if dynamic else 4, {"blocks.2.up.weight", "blocks.1.norm1.weight"})):
            for one in (session, other):
                one.unfreeze()
                if closed:
                    one.freeze(tuple(closed))
            loss, grads = step(model, model, batch(count, dynamic))
            expected_loss, expected = step(plain, plain, batch(count, dynamic))
            assert equal_bits(expected_loss, loss)
            assert differences(expected, grads, closed=closed) == []
    assert (session.compiles, session.recompiles) == (1, 0)
    (work,) = seen
    assert calls(work.pair().forward.graph, INVOKE) and calls(work.pair().backward.graph, INVOKE)


def test_texts_tell_graphs_apart():
    one, other = stack(2), stack(3)
    assert graph_text(one.graph.nodes) == graph_text(stack(2).graph.nodes) != graph_text(other.graph.nodes)


def test_the_run_that_saves_most_is_found():
    nodes = [n for n in stack(6).graph.nodes if n.op == "call_function"]
    run = find_run(nodes, fewest_saved=4)
    assert run is not None and run.period == 4 and run.saved == 20
    assert find_run(nodes, fewest_saved=21) is None
    assert names(nodes[run.start : run.start + 1])


class Wide(nn.Module):
    """Three blocks whose codes' scales have a stride that Inductor would round up on a GPU."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, 2, dropout=0.0) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.inductor
@pytest.mark.thorough
def test_results_of_blocks_are_as_dense_as_their_callers_take_them_to_be():
    x = torch.randn(2, 515, 256, generator=torch.Generator().manual_seed(0))
    with torch._inductor.config.patch(disable_padding_cpu=False):
        model, session = optimized(Wide(), preset="balanced", executor="inductor", freeze_rate=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(4):
            _, grads = step(model, model, (x,))
            assert all(g is None or g.isfinite().all() for g in grads.values())
            optimizer.step()
    assert session.recompiles == 0


def with_dropout(depth: int) -> fx.GraphModule:
    s = Sketch()
    x, w = s.input("x", 6, 4), s.input("w", 4, 4)
    seeds = s.call(torch.ops.prims.inductor_seeds.default, depth + 1, torch.device("cpu"))
    for layer in range(depth):
        seed = s.call(torch.ops.prims.inductor_lookup_seed.default, seeds, layer)
        kept = s.call(ATEN.gt.Scalar, s.call(torch.ops.prims.inductor_random.default, [6, 4], seed, "rand"), 0.1)
        x = s.call(MUL, s.call(ATEN.tanh.default, s.call(MM, x, w)), kept)
    own = s.call(torch.ops.prims.inductor_lookup_seed.default, seeds, depth)
    last = s.call(torch.ops.prims.inductor_random.default, [6, 4], own, "rand")
    return s.returns(s.call(MUL, x, last))


def test_blocks_are_handed_their_seeds_as_views():
    """To look one up is a kernel of its own; what looks its own up does it in its kernel."""
    module = with_dropout(5)
    assert outline_repeats(module) == 5
    views = calls(module.graph, ATEN.select.int)
    assert [view.args[1:] for view in views] == [(0, layer) for layer in range(5)]
    assert all(set(view.users) <= set(calls(module.graph, INVOKE)) and view.meta["val"].shape == () for view in views)
    (own,) = calls(module.graph, torch.ops.prims.inductor_lookup_seed.default)
    assert own.args[1] == 5


class Dropping(nn.Module):
    """Four layers with a dropout each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.dropout(layer(x).tanh(), 0.3)
        return x.square().mean()


@pytest.mark.inductor
def test_dropout_is_the_same_in_blocks_and_out_of_them():
    torch.manual_seed(0)
    found = []
    for disabled in ((), ("outline_repeats",)):
        model, _ = optimized(Dropping(), preset="exact", executor="inductor", freeze_rate=0.0, disabled_passes=disabled)
        found.append(step(model, model, (torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),), seed=3))
    (loss, grads), (expected, expected_grads) = found
    assert torch.equal(loss, expected) and all(torch.equal(grads[name], expected_grads[name]) for name in grads)
