"""Who reads a saved value whatever is frozen, and who does for units: on backward graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from graphs import ATEN, Sketch, calls
from torch import fx

from slimfit_fx.graph.joint import STATIC
from slimfit_fx.passes.static_readers import ReaderGroups, StaticReaders, part_readers

UPSTREAM = (STATIC, 1, 2)
"""Gates of what lies before the value."""


def backward(
    again: Callable[[Sketch, fx.Node], tuple[fx.Node, fx.Node]], upstream: Sequence[int] = UPSTREAM
) -> tuple[fx.GraphModule, list[int]]:
    """``again`` makes two values of the saved ``v``: one for the gradient of what lies before, one for unit 0."""
    s = Sketch()
    v, g = s.input("v", 4, 6), s.input("tangents_1", 4, 6)
    for_input, for_unit = again(s, v)
    onward = s.call(ATEN.mul.Tensor, g, for_input)
    results = [s.call(ATEN.mul.Tensor, onward, float(k)) for k, _ in enumerate(upstream)]
    results.append(s.call(ATEN.mul.Tensor, g, for_unit))
    return s.returns(*results), [*upstream, 0]


def placeholder(module: fx.GraphModule) -> fx.Node:
    return module.graph.find_nodes(op="placeholder")[0]


def value_of(*inputs: str) -> fx.Node:
    """A value of the forward graph, made from these inputs."""
    s = Sketch()
    return s.call(ATEN.cat.default, [s.call(ATEN.neg.default, s.input(name, 4, 6)) for name in inputs])


def found(
    module: fx.GraphModule, gates: Sequence[int], grads_of: Sequence[str] = ("before",) * 5 + ("behind",)
) -> ReaderGroups | str:
    """``grads_of``: what the outputs are gradients of, the last one's at the end; the value is made from ``before``."""
    names = (*grads_of[: len(gates) - 1], grads_of[-1])
    return StaticReaders(module.graph, gates, names).find(value_of("before", "also_before"), placeholder(module))


def part(module: fx.GraphModule, groups: ReaderGroups) -> None:
    """Let static readers see -v."""
    v = placeholder(module)
    with module.graph.inserting_before(next(n for n in module.graph.nodes if n.op == "call_function")):
        other = module.graph.call_function(ATEN.neg.default, (v,))
        other.meta["val"] = v.meta["val"]
    part_readers(groups, v, other)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def shared(s: Sketch, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """As GELU has it: an inner value that both the derivative and the output need."""
    inner = s.call(ATEN.exp.default, v)
    return s.call(ATEN.add.Tensor, inner, 1.0), s.call(ATEN.mul.Tensor, inner, v)


def test_what_both_need_is_copied_and_each_reads_its_own():
    module, gates = backward(shared)
    groups = found(module, gates)
    assert isinstance(groups, ReaderGroups)
    assert len(groups.static) == len(groups.units) == 1 and len(groups.between) == 3
    v, g = torch.randn(2, 4, 6)
    exact = module(v, g)
    mirrored = module(-v, g)
    part(module, groups)
    *before, own = module(v, g)
    assert torch.equal(own, exact[-1])
    assert all(torch.equal(have, want) for have, want in zip(before, mirrored[:-1], strict=True))
    assert len(calls(module.graph, ATEN.exp.default)) == 2


def test_nothing_is_copied_that_one_group_needs_alone():
    module, gates = backward(lambda s, v: (v, s.call(ATEN.exp.default, v)))
    groups = found(module, gates)
    part(module, groups)
    assert len(calls(module.graph, ATEN.exp.default)) == 1


def test_a_reader_of_a_shape_is_no_reader():
    def again(s: Sketch, v: fx.Node) -> tuple[fx.Node, fx.Node]:
        s.call(ATEN.sym_size.int, v, 0)
        return v, v

    groups = found(*backward(again))
    assert isinstance(groups, ReaderGroups) and not groups.between


def row_sums(s: Sketch, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    return s.call(ATEN.sub.Tensor, v, s.call(ATEN.mean.dim, v, [1], True)), v


def product(s: Sketch, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    square = s.call(ATEN.mm.default, v, s.call(ATEN.permute.default, v, [1, 0]))
    return v, s.call(ATEN.mm.default, square, v)


@pytest.mark.parametrize(
    ("again", "upstream", "reason"),
    [
        (shared, (STATIC,), "for what always trains"),
        (shared, (1, 2), "only for units that may be frozen"),
        (row_sums, UPSTREAM, "read through mean_dim whatever is frozen"),
        (product, UPSTREAM, "read through "),
    ],
    ids=["one parameter that always trains", "nothing static", "a sum on the way", "a product on the way"],
)
def test_why_a_value_is_one_for_all(again, upstream, reason):
    told = found(*backward(again, upstream))
    assert isinstance(told, str) and reason in told


def test_a_value_computed_again_for_what_always_trains():
    """A layer behind the value that no gate can close: its weight's gradient reads it whole."""
    module, gates = backward(shared)
    assert "for what always trains" in found(module, [*gates[:-1], STATIC])


def test_a_gradient_of_what_lies_beside_must_have_the_value_as_it_is():
    """A scale that is computed from other inputs: of several that always train, and none of them lies before."""
    module, gates = backward(shared)
    assert isinstance(found(module, gates, ("before", "also_before", "before", "behind")), ReaderGroups)
    assert "for what always trains" in found(module, gates, ("before", "beside", "before", "behind"))


def test_a_value_that_backward_returns_is_one_for_all():
    s = Sketch()
    v, g = s.input("v", 4, 6), s.input("tangents_1", 4, 6)
    onward = s.call(ATEN.mul.Tensor, g, v)
    results = [s.call(ATEN.mul.Tensor, onward, float(k)) for k in range(2)]
    module = s.returns(*results, s.call(ATEN.exp.default, v))
    assert found(module, [STATIC, STATIC, 0]) == "returned by backward"


def test_many_gates_are_as_good_as_static():
    """More than may share a branch."""
    groups = found(*backward(shared, (1, 2, 3, 4, 5)))
    assert isinstance(groups, ReaderGroups) and len(groups.static) == 1
