"""The interpreter's casts: torch's own operator in place of the primitive that Inductor's decompositions leave."""

from __future__ import annotations

import pytest
import torch
from reference import equal_bits, optimized
from small_models import Tiny, tokens
from torch import fx

from slimfit_fx.capture.lower import use_native_casts

CAST, NATIVE = torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default


def casting(dtype: torch.dtype) -> fx.GraphModule:
    """A cast in the graph itself, and one in a module inside of it."""
    inner = fx.Graph()
    inner.output(inner.call_function(CAST, (inner.placeholder("x"), torch.float32)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(CAST, (x, dtype)), graph.call_module("inner", (x,))))
    return fx.GraphModule({"inner": fx.GraphModule({}, inner)}, graph)


def casts(module: fx.GraphModule, operator: object) -> int:
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    return sum(len(part.graph.find_nodes(op="call_function", target=operator)) for part in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("made", ["dense", "transposed", "broadcast", "every second"])
def test_the_same_bits_in_the_same_layout(dtype, made):
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 200
    value = {"dense": x, "transposed": x.t(), "broadcast": x[:1].expand(4, 6), "every second": x[:, ::2]}[made]
    module = casting(dtype)
    expected = module(value)
    assert use_native_casts(module) == 2 and (casts(module, CAST), casts(module, NATIVE)) == (0, 2)
    for want, have in zip(expected, module(value), strict=True):
        assert equal_bits(want, have) and want.stride() == have.stride()
        assert have.data_ptr() != value.data_ptr(), "a copy, whatever the dtype"


def test_twice_is_once_and_what_has_no_casts_is_left_alone():
    module = casting(torch.bfloat16)
    assert (use_native_casts(module), use_native_casts(module)) == (2, 0)
    plain = fx.symbolic_trace(torch.nn.ReLU())
    code = plain.code
    assert use_native_casts(plain) == 0 and plain.code == code


def test_no_graph_that_the_interpreter_runs_has_a_primitive_cast():
    model, session = optimized(Tiny(depth=1), preset="balanced", min_bytes=0)
    model(*tokens()).backward()
    (graph,) = session.backend.graphs
    modules = [code.module for code in graph.codes]
    assert sum(casts(module, NATIVE) for module in modules) > 4
    assert sum(casts(module, CAST) for module in modules) == 0
