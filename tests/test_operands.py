"""Layouts of what blocks and branches are given: asked while code is written, and at a call only where sizes vary."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import sympy
import torch
from reference import optimized, step
from torch import nn

from slimfit_fx.capture import operands
from slimfit_fx.passes import outline_repeats as pass_

FUNCTION = re.compile(r"^def (block|cone)\w*\(args\):\n(?:^    .*\n)+", re.M)


@pytest.fixture(autouse=True)
def every_repeat_counts(monkeypatch):
    monkeypatch.setattr(pass_, "FEWEST_SAVED", 4)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def compiled(dynamic: bool):
    """Loss and session of one step whose code is written, not found in a cache."""
    torch.manual_seed(0)
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        return trained(dynamic)


def trained(dynamic: bool):
    model, session = optimized(Stack(), executor="inductor", preset="exact", dynamic=dynamic, freeze_rate=0.5)
    loss, _ = step(model, model, (torch.randn(6, 8),))
    return loss, session


def functions(session) -> list[str]:
    sources = [code.source for graph in session.backend.graphs for code in graph.codes]
    return [found.group(0) for source in sources for found in FUNCTION.finditer(source)]


def asked(code: str) -> list[str]:
    """Operands of a function whose layout it asks for."""
    names = code.splitlines()[1].partition(" = args")[0].replace(" ", "").split(",")
    return [name for name in names if f"assert_size_stride({name}," in code]


@pytest.mark.inductor
def test_no_operand_is_asked_at_a_call():
    loss, session = compiled(dynamic=False)
    found = functions(session)
    assert len(found) >= 3 and any("block" in f for f in found) and any("cone" in f for f in found)
    assert loss.isfinite() and not any(map(asked, found))
    sources = [code.source for graph in session.backend.graphs for code in graph.codes]
    assert all("assert_size_stride(primals_1," in s or "assert_size_stride(tangents_1," in s for s in sources)


@pytest.mark.inductor
@pytest.mark.thorough
def test_with_sizes_that_vary_they_are_asked():
    _, session = compiled(dynamic=True)
    assert any(map(asked, functions(session)))


@pytest.mark.inductor
def test_another_layout_is_found_while_code_is_written(monkeypatch):
    """What the caller has, and what the block was compiled for, differ: that must not wait for a step."""
    seen = operands._layout
    graphs = []

    def wrong(value):
        layout = seen(value)
        is_inner = graphs and any(value is g for g in graphs[-1].graph_inputs.values())
        return (layout[0], layout[1][::-1]) if layout and is_inner and len(layout[1]) == 2 else layout

    check = operands._check
    monkeypatch.setattr(operands, "_check", lambda sub, *rest: (graphs.append(sub.graph), check(sub, *rest)))
    monkeypatch.setattr(operands, "_layout", wrong)
    with pytest.raises(Exception, match=r"operand \d of \w+ is .*sizes, strides.* there and .* where it is called"):
        compiled(dynamic=False)


class Layout:
    """A tensor of Inductor's, as far as it is asked here."""

    def __init__(self, sizes, strides):
        self.maybe_get_size, self.maybe_get_stride = lambda: sizes, lambda: strides


def test_layouts_are_alike_if_every_element_lies_at_the_same_place():
    assert operands._layout(Layout([2, 1, 3], [3, 3, 1])) == operands._layout(Layout([2, 1, 3], [3, 1, 1]))
    assert operands._layout(Layout([2, 3], [3, 1])) != operands._layout(Layout([2, 3], [1, 2]))
    assert operands._layout(Layout([2, 0], [0, 1])) is None and operands._layout(3) is None
    assert operands._layout(Layout(None, None)) is None


def test_results_of_unknown_sizes_are_let_be():
    """A ``torch.cond`` of the user may return three rows or four: its caller knows a symbol for them."""
    size = sympy.Symbol("u0")
    graph = SimpleNamespace(graph_inputs={"x": Layout([4, 2], [2, 1])}, graph_outputs=[Layout([3, 2], [2, 1])])
    branch, given = SimpleNamespace(name="branch", graph=graph), [Layout([4, 2], [2, 1])]
    operands._check(branch, given, [Layout([size, 2], [2, 1])])
    with pytest.raises(RuntimeError, match="result 0 of branch is .* there and .* where it is called"):
        operands._check(branch, given, [Layout([3, 2], [1, 3])])
    with pytest.raises(RuntimeError, match="operand 0 of branch"):
        operands._check(branch, [Layout([size, 2], [2, 1])], [])
