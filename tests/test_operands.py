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

    def check_and_remember(call, subgraphs, given):
        graphs.extend(subgraph.graph for subgraph in subgraphs)
        check(call, subgraphs, given)

    monkeypatch.setattr(operands, "_check", check_and_remember)
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


def called(*results):
    return SimpleNamespace(outputs=list(results))


def test_results_of_unknown_sizes_are_let_be():
    """A ``torch.cond`` of the user may return three rows or four: its caller knows a symbol for them."""
    size = sympy.Symbol("u0")
    graph = SimpleNamespace(graph_inputs={"x": Layout([4, 2], [2, 1])}, graph_outputs=[Layout([3, 2], [2, 1])])
    branch, given = SimpleNamespace(name="branch", graph=graph), [Layout([4, 2], [2, 1])]
    operands._check(called(Layout([size, 2], [2, 1])), [branch], given)
    with pytest.raises(RuntimeError, match="result 0 of branch is .* there and .* where it is called"):
        operands._check(called(Layout([3, 2], [1, 3])), [branch], given)
    with pytest.raises(RuntimeError, match="operand 0 of branch"):
        operands._check(called(), [branch], [Layout([size, 2], [2, 1])])


def test_a_result_is_asked_at_a_call_unless_every_branch_is_known_to_give_it():
    def branch(rows):
        graph = SimpleNamespace(graph_inputs={}, graph_outputs=[Layout([rows, 2], [2, 1])])
        return SimpleNamespace(name="branch", graph=graph)

    def is_asked(rows, *branches):
        result = Layout([rows, 2], [2, 1])
        result.skip_size_stride_alignment_checks = False
        operands._check(called(result), branches, [])
        return not result.skip_size_stride_alignment_checks

    size = sympy.Symbol("u0")
    assert not is_asked(3, branch(3)) and not is_asked(3, branch(3), branch(3))
    assert is_asked(size, branch(3), branch(4)) and is_asked(3, branch(3), branch(size))
    assert is_asked(0, branch(0)), "nobody can tell where an empty tensor lies"


@pytest.mark.inductor
def test_what_is_known_of_results_is_not_asked():
    """Neither of operators of ours that hand on what they are given, nor of ghosts, nor of branches and blocks."""
    _, session = compiled(dynamic=False)
    sources = "".join(code.source for graph in session.backend.graphs for code in graph.codes)
    assert sources.count("_cone_") and "assert_size_stride(" in sources
    asked_of = set(re.findall(r"assert_\w+\(.*'(torch\.ops\.[\w.]+)'\)", sources))
    assert not any("slimfit_fx" in name or name.endswith(("cond", "invoke_subgraph")) for name in asked_of)


class Code:
    """What lines are written to."""

    def __init__(self):
        self.lines = []
        self.writeline, self.do_indent = self.lines.append, lambda: None


@pytest.mark.parametrize("chosen, writes", [(0, "if True"), (1, "with "), (None, "with ")])
def test_a_block_chooses_its_gpu_only_if_its_caller_has_not(chosen, writes):
    """Of a GPU's code, which cannot be written here, only the line in question."""
    from torch._inductor.codegen import wrapper as codegen
    from torch._inductor.virtualized import V

    block = SimpleNamespace(name="block_0", graph=SimpleNamespace(name="block_0", graph_inputs={}, graph_outputs=[]))
    device = torch.device("cpu") if chosen is None else torch.device("cuda", chosen)
    call = SimpleNamespace(subgraph=block, inputs=[], outputs=[], get_device=lambda: device)
    inner = codegen.SubgraphPythonWrapperCodegen.__new__(codegen.SubgraphPythonWrapperCodegen)
    gpu = SimpleNamespace(device_guard=lambda n: f"torch.cuda._DeviceGuard({n})", set_device=lambda n: f"set {n}")
    written = []

    def write(wrapper, call):
        graph = SimpleNamespace(wrapper_code=inner, cpp_wrapper=False, device_ops=gpu)
        with V.set_graph_handler(graph):
            code = Code()
            codegen.EnterDeviceContextManagerLine(0, None).codegen(code)
        written.extend(code.lines)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codegen.PythonWrapperCodegen, "codegen_invoke_subgraph", write)
        with operands.checked_when_written():
            codegen.PythonWrapperCodegen.codegen_invoke_subgraph(None, call)
            with pytest.raises(RuntimeError, match="block_0 is called on GPU 7 and was written for"):
                call.get_device = lambda: torch.device("cuda", 7)
                codegen.PythonWrapperCodegen.codegen_invoke_subgraph(None, call)
    assert written[0].startswith(writes) and (len(written) == 1) == (chosen == 0)
