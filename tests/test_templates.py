"""Templates: a function is traced once for operands of one layout, whatever graph it is written into."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from graphs import Sketch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table

from slimfit_fx.passes import templates
from slimfit_fx.passes.templates import TemplateWriter


@pytest.fixture
def traces(monkeypatch):
    """Nothing is kept yet; every trace notes the fake mode that it is of."""
    noted = []
    trace = templates._traced

    def noting(function, values, mode, table):
        noted.append(mode)
        return trace(function, values, mode, table)

    monkeypatch.setattr(templates, "_traced", noting)
    monkeypatch.setattr(templates, "_SHARED", templates._SharedTraces())
    return noted


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:2] * 2, (x + 1).half()


def results_of(*shape: int, **chosen) -> tuple[Sketch, list[fx.Node]]:
    sketch = Sketch()
    value = sketch.input("x", *shape)
    sketch.graph.output(value)
    if "stride" in chosen:
        with sketch.mode:
            value.meta["val"] = torch.empty_strided(shape, chosen.pop("stride"))
    writer = TemplateWriter(sketch.graph, select_decomp_table())
    return sketch, writer.write(halves, [value], before=sketch.graph.output_node(), **{"key": "halves", **chosen})


def test_graphs_of_one_layout_share_a_trace_and_hold_values_of_their_own(traces):
    (one, first), (other, second) = results_of(4, 8), results_of(4, 8)
    assert len(traces) == 1
    for sketch, results in ((one, first), (other, second)):
        assert [(tuple(r.meta["val"].shape), r.meta["val"].dtype) for r in results] == [
            ((2, 8), torch.float32),
            ((4, 8), torch.float16),
        ]
        for node in sketch.graph.nodes:
            if node.op == "call_function":
                assert node.meta["val"].fake_mode is sketch.mode, node
    assert [n.target for n in one.graph.nodes] == [n.target for n in other.graph.nodes]


@pytest.mark.parametrize("chosen", [{"key": "another"}, {"stride": (1, 4)}])
def test_another_key_or_layout_is_traced_anew(traces, chosen):
    results_of(4, 8)
    results_of(4, 8, **chosen)
    assert len(traces) == 2


def test_another_table_of_decompositions_is_traced_anew(traces):
    sketch, _ = results_of(4, 8)
    value = next(iter(sketch.graph.nodes))
    writer = TemplateWriter(sketch.graph, {})
    writer.write(halves, [value], key="halves", before=sketch.graph.output_node())
    assert len(traces) == 2


def test_no_graph_is_kept_alive(traces):
    sketch, _ = results_of(4, 8)
    mode = weakref.ref(sketch.mode)
    del sketch, _
    gc.collect()
    assert mode() is None and len(traces) == 1


def test_a_trace_of_symbolic_sizes_serves_its_own_graph_only(traces):
    modes = []
    for _ in range(2):
        sketch = Sketch()
        value = sketch.input("x", 4, 8, symbolic=True)
        sketch.graph.output(value)
        writer = TemplateWriter(sketch.graph, select_decomp_table())
        for _ in range(2):
            writer.write(halves, [value], key="halves", before=sketch.graph.output_node())
        modes.append(sketch.mode)
    assert traces == modes


def test_few_traces_are_kept(traces, monkeypatch):
    monkeypatch.setattr(templates, "_KEPT", 3)
    for key in "abcda":
        results_of(4, 8, key=key)
    assert len(traces) == 5 and len(templates._SHARED._traces) <= 3
