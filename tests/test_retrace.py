"""Pickled graphs are read without running anything (slimfit_fx/graph/retrace.py)."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from graphs import stopped_after
from small_models import Tiny, tokens
from torch import fx

from slimfit_fx.graph.retrace import survives_pickling
from slimfit_fx.passes.find_cones import CONE

aten = torch.ops.aten


def module_of(make, *names: str, submodules: dict[str, torch.nn.Module] | None = None) -> fx.GraphModule:
    """The module whose graph ``make`` builds from its placeholders, ready to be pickled."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in names]
    graph.output(make(graph, *inputs))
    module = fx.GraphModule(submodules or {}, graph)
    survives_pickling(module)
    return module


def embedding_gradient(graph: fx.Graph, grad: fx.Node, rows: fx.Node) -> tuple[fx.Node, ...]:
    """Zeros, made without an operand, that rows of a gradient are added to, and other work without operands."""
    zeros = graph.call_function(aten.full.default, ([1000, 8], 0.0), {"dtype": torch.float32, "device": "cpu"})
    order = graph.call_function(aten.arange.default, (1000,), {"device": torch.device("cpu")})
    column = graph.call_function(aten.unsqueeze.default, (order, 1))
    most = graph.call_function(aten.max.dim, (column, 0))
    indices = graph.call_function(operator.getitem, (most, 1))
    column = graph.call_function(aten.sub.Tensor, (column, indices))
    added = graph.call_function(aten.index_put.default, (zeros, [rows], grad, True))
    return graph.call_function(aten.add.Tensor, (added, column)), column, zeros


@pytest.mark.parametrize("copied", [False, True])
def test_made_tensors_are_made_again_and_not_kept(copied):
    module = module_of(embedding_gradient, "grad", "rows")
    read = pickle.loads(pickle.dumps(copy.deepcopy(module) if copied else module))
    assert not list(read.buffers()) and not [v for v in vars(read).values() if isinstance(v, torch.Tensor)]
    calls = [n.target for n in read.graph.nodes if n.op == "call_function"]
    assert sorted(map(str, calls)) == sorted(str(n.target) for n in module.graph.nodes if n.op == "call_function")
    grad, rows = torch.rand(3, 8), torch.tensor([1, 7, 1])
    for found, expected in zip(read(grad, rows), module(grad, rows), strict=True):
        assert torch.equal(found, expected)


def test_branches_inside_of_branches_are_read():
    open_branch = module_of(lambda graph, x: (graph.call_function(aten.mul.Tensor, (x, 2.0)),), "x")
    closed = module_of(
        lambda graph, x: (graph.call_function(aten.full.default, ([3], 5.0), {"device": torch.device("cpu")}),), "x"
    )

    def both(graph: fx.Graph, gate: fx.Node, x: fx.Node) -> fx.Node:
        branches = graph.get_attr("open_branch"), graph.get_attr("closed")
        return graph.call_function(torch.ops.higher_order.cond, (gate, *branches, (x,)))

    module = module_of(both, "gate", "x", submodules={"open_branch": open_branch, "closed": closed})
    read = pickle.loads(pickle.dumps(module))
    assert not list(read.buffers())
    x = torch.rand(3)
    for gate in (True, False):
        (found,), (expected,) = read(torch.tensor(gate), x), module(torch.tensor(gate), x)
        assert torch.equal(found, expected)


def test_tiles_inside_of_blocks_are_read():
    import slimfit_fx.runtime.parts  # noqa: F401  (registers the operator)

    tile = module_of(lambda graph, x: (graph.call_function(aten.mul.Tensor, (x, 2.0)),), "x")

    def parts(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node]:
        room = graph.call_function(aten.empty_strided.default, ([4], [1]), {"device": torch.device("cpu")})
        for start in (0, 2):
            part = graph.call_function(aten.slice.Tensor, (x, 0, start, start + 2))
            call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (graph.get_attr("tile"), "tile", part))
            made = graph.call_function(operator.getitem, (call, 0))
            graph.call_function(torch.ops.slimfit_fx.put_part.default, (room, made, 0, start))
        return (room,)

    module = module_of(parts, "x", submodules={"tile": tile})
    read = pickle.loads(pickle.dumps(module))
    assert not list(read.buffers())
    x = torch.rand(4)
    (found,) = read(x)
    assert torch.equal(found, 2.0 * x)


def test_a_pickled_backward_graph_holds_no_tensor():
    """An embedding's gradient starts from zeros inside of its branch."""
    backward = stopped_after("insert_gates", Tiny(), tokens()).work.seam.backward
    assert backward is not None and any(CONE in n.meta for n in backward.graph.nodes)
    for name, branch in backward.named_children():
        made = [n for n in branch.graph.nodes if n.target is aten.full.default]
        read = pickle.loads(pickle.dumps(branch))
        assert not list(read.buffers()), name
        assert len([n for n in read.graph.nodes if n.target is aten.full.default]) == len(made)
    assert any(n.target is aten.full.default for m in backward.children() for n in m.graph.nodes), "as it stood"
