"""The memory of a step: what events make of it for any pattern of gates, and that the allocator agrees."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from torch import Tensor, nn
from torch.nn import functional as F

from bench.measure import step_peak
from slimfit_fx.planning.blocks import Meter, TensorSpec, storage_bytes
from slimfit_fx.planning.dry_run import GeneratedCode, _num_generators, load_wrapper, num_tangents
from slimfit_fx.planning.peak import Event, StepTrace, forecast, join
from slimfit_fx.planning.stand_ins import DryRun

# ---- events


@st.composite
def traces(draw: st.DrawFn, *, shared: bool) -> StepTrace:
    """Blocks of up to four gates that come and go, some inside a branch; with ``shared``, some have several gates, and
    some that are everybody's are dropped early by those who have a certain gate closed."""
    gates = st.frozensets(st.integers(0, 3), max_size=3 if shared else 1)
    events: list[Event] = []
    alive: list[Event] = []
    for block in range(draw(st.integers(1, 12))):
        owners = draw(gates)
        made = Event(draw(st.integers(1, 100)), block, owners, owners if draw(st.booleans()) else frozenset())
        events.append(made)
        if shared and not owners and draw(st.booleans()):  # as Meter.release_unless_open has it
            gate = frozenset([draw(st.integers(0, 3))])
            events.append(Event(-made.delta_bytes, block, unless=gate))
            made = dataclasses.replace(made, owners=gate)
        alive.append(made)
        while alive and draw(st.booleans()):
            gone = alive.pop(draw(st.integers(0, len(alive) - 1)))
            events.append(Event(-gone.delta_bytes, gone.block, gone.owners))
    boundary = draw(st.integers(0, len(events)))
    return StepTrace(tuple(events), boundary, {block: f"block {block}" for block in range(12)}, 4)


def brute_force(trace: StepTrace, chosen: frozenset[int]) -> list[int]:
    """Bytes after every event, by looking at all blocks each time."""
    found = []
    for index in range(len(trace.events)):
        blocks: dict[int, int] = {}
        for event in trace.events[: index + 1]:
            if (not event.owners or event.owners & chosen) and not event.unless & chosen:
                blocks[event.block] = blocks.get(event.block, 0) + event.delta_bytes
        found.append(sum(blocks.values()))
    return found


@given(trace=traces(shared=True), chosen=st.frozensets(st.integers(0, 3)))
@settings(max_examples=80)
def test_a_pattern_sees_its_own_blocks_only(trace, chosen):
    found, expected = trace.peak(chosen), brute_force(trace, chosen)
    assert list(found.timeline) == expected
    assert found.peak_bytes == max([0, *expected]) == sum(a.size_bytes for a in found.alive_at_peak)
    assert found.saved_bytes == (expected[trace.boundary - 1] if trace.boundary else 0)
    assert found.end_bytes == expected[-1]
    assert found.forward_peak_bytes == max([0, *expected[: trace.boundary]])


@given(trace=traces(shared=False), count=st.integers(0, 4))
@settings(max_examples=80)
def test_the_worst_pattern_is_found_where_blocks_have_one_owner(trace, count):
    patterns = [frozenset(p) for p in itertools.combinations(range(4), count)]
    bound, pattern = trace.worst(count)
    assert bound == max(trace.peak(p).peak_bytes for p in patterns) == trace.peak(pattern).peak_bytes


@given(trace=traces(shared=True), count=st.integers(0, 4))
@settings(max_examples=80)
def test_no_pattern_exceeds_the_bound(trace, count):
    bound, _ = trace.worst(count)
    assert all(trace.peak(p).peak_bytes <= bound for p in itertools.combinations(range(4), count))


@given(
    trace=traces(shared=True),
    count=st.integers(0, 4),
    gate_bytes=st.tuples(*[st.integers(0, 150)] * 4),
    most=st.integers(0, 400),
)
@settings(max_examples=300)
def test_no_pattern_whose_gradients_take_so_much_exceeds_the_bound(trace, count, gate_bytes, most):
    """And what is said to meet it is such a pattern; the bound is never above that of any choice."""
    known = dataclasses.replace(trace, gate_bytes=gate_bytes)
    bound, pattern = known.worst(count, most)
    allowed = [
        frozenset(p)
        for size in range(count + 1)
        for p in itertools.combinations(range(4), size)
        if sum(gate_bytes[gate] for gate in p) <= most
    ]
    assert all(known.peak(p).peak_bytes <= bound for p in allowed)
    assert pattern in allowed and bound <= known.worst(count)[0] == trace.worst(count, most)[0]


def test_gradients_count_up_to_their_level_and_what_is_beside_them_by_itself():
    """Three gradients of 100 of which one may be, each with 5 bytes that are saved for it; two units are open."""
    gradients = [Event(105, gate, frozenset([gate])) for gate in range(3)]
    trace = StepTrace((Event(10, 3), *gradients), 0, {}, 3, gate_bytes=(100, 100, 100))
    assert trace.worst(2)[0] == 10 + 105 + 105
    assert trace.worst(2, 120)[0] == 10 + 120 + 5 + 5
    assert len(trace.worst(2, 120)[1]) == 1


@given(trace=traces(shared=True))
@settings(max_examples=80)
def test_the_bound_for_all_gates_is_reached_by_all(trace):
    """Blocks of several gates are counted once then."""
    assert trace.worst(4)[0] == trace.peak(range(4)).peak_bytes


def test_gates_that_share_a_block_do_not_own_it_each():
    three = Event(90, 0, frozenset([0, 1, 2]))
    trace = StepTrace((three, Event(10, 1, frozenset([0])), Event(10, 2, frozenset([1]))), 0, {}, 3)
    assert trace.worst(1)[0] == 100
    assert trace.worst(2)[0] == trace.peak([0, 1]).peak_bytes == 110


def test_what_happens_inside_a_branch_needs_the_branch():
    inside = [
        Event(100, 0, frozenset([0]), branch=frozenset([0])),
        Event(-100, 0, frozenset([0]), branch=frozenset([0])),
    ]
    later = [Event(60, 1, frozenset([1])), Event(50, 2, frozenset([2]))]
    assert StepTrace((*inside, *later), 0, {}, 3).worst(2) == (110, frozenset([1, 2]))
    early = [Event(60, 1, frozenset([1])), *inside]
    assert StepTrace(tuple(early), 0, {}, 3).worst(1) == (100, frozenset([0]))


@given(trace=traces(shared=True))
@settings(max_examples=20)
def test_traces_survive_json(trace):
    assert StepTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_graphs_are_joined_forward_in_order_and_backward_reversed():
    first = StepTrace((Event(10, 0), Event(4, 1, frozenset([0])), Event(-10, 0)), 2, {0: "a", 1: "b"}, 1)
    second = StepTrace((Event(20, 0), Event(-20, 0), Event(5, 1, frozenset([0]))), 1, {0: "c", 1: "d"}, 1)
    both = join([first, second], [[1], [0]])
    assert [e.delta_bytes for e in both.events] == [10, 4, 20, -20, 5, -10]
    assert both.boundary == 3 and both.num_gates == 2
    assert [sorted(e.owners) for e in both.events] == [[], [1], [], [], [0], []]
    assert len({e.block for e in both.events}) == 4
    assert both.gate_bytes == ()


def test_a_gate_of_several_graphs_has_one_gradient():
    first = StepTrace((), 0, {}, 2, gate_bytes=(8, 4))
    second = StepTrace((), 0, {}, 1, gate_bytes=(8,))
    assert join([first, second], [[0, 1], [0]]).gate_bytes == (8, 4)
    assert join([first, StepTrace((), 0, {}, 0)], [[0, 1], []]).gate_bytes == (8, 4)
    assert join([first, StepTrace((), 0, {}, 1)], [[0, 1], [0]]).gate_bytes == (), "not known of one: not known"


def test_a_forecast_names_units_and_sums_equal_blocks():
    trace = StepTrace((Event(8, 0), Event(8, 1), Event(30, 2, frozenset([1]))), 2, {0: "x", 1: "x", 2: "y"}, 2)
    found = forecast(trace, ["first", "second"], 1)
    assert (found.closed_bytes, found.open_bytes, found.worst_bytes) == (16, 46, 46)
    assert found.worst_units == ("second",)
    assert found.alive == (("y, for second", 1, 30), ("x", 2, 16))


# ---- the dry run

_SOURCE = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
async_compile = AsyncCompile()
kernel = async_compile.cpp_pybinding(['float*'], 'no C++ at all')
async_compile.wait(globals())
def cone_0_open(args):
    (x,) = args
    args.clear()
    buf = empty_strided_cpu((5,), (1,), torch.float32)
    del x
    return (buf,)
def call(args):
    x, gate = args
    args.clear()
    assert_size_stride(x, (4, 8), (8, 1), 'input')
    buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
    kernel(x, buf0)
    buf1 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0
    buf2 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
    extern_kernels.mm(x, buf1, out=buf2)
    buf3 = torch.ops.aten.sort.default(buf2)
    buf4 = buf3[0]
    del buf3
    buf5 = torch.ops.aten.alias.default(buf4)
    del buf4
    if gate.item():
        (buf6,) = cone_0_open([buf1])
    return (buf5, buf6)
"""


def test_a_dry_run_counts_what_the_code_would_allocate():
    run = DryRun(Meter())
    x = run.of(TensorSpec((4, 8), (8, 1), torch.float32, torch.device("cpu")), None)
    gate = run.of(TensorSpec((), (), torch.bool, torch.device("cpu")), None, frozenset([0]))
    results = load_wrapper(_SOURCE, run)([x, gate])
    sizes = [e.delta_bytes for e in run.meter.events]
    assert sizes[:2] == [128, 64], "views and inputs take nothing"
    assert sorted(sizes[2:4]) == [64, 128] and -128 in sizes, "sort gives values and places; the places are dropped"
    assert [(e.delta_bytes, sorted(e.owners), sorted(e.branch)) for e in run.meter.events if e.owners] == [
        (20, [0], [0])
    ]
    alive = sum(sizes)
    assert [r.shape for r in results] == [(4, 4), (5,)]
    del results
    assert sum(e.delta_bytes for e in run.meter.events) == alive - 64 - 20, "an alias holds its block"


_PARTIAL_SUMS = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
async_compile = AsyncCompile()
kernel = async_compile.triton('kernel', 'no Triton at all')
async_compile.wait(globals())
def copy_if_misaligned(x):
    raise TypeError('expected Tensor()')
def call(args):
    (x,) = args
    args.clear()
    x = copy_if_misaligned(x)
    workspace_0 = empty_strided_cpu((48, ), (1, ), torch.float32)
    workspace_0.zero_()
    kernel.run(x, workspace_0, 6, stream=0)
    buf0 = workspace_0[0 * 6 * 4 : (0 + 1) * 6 * 4].view(6, 4).sum(dim=0)
    buf1 = workspace_0[1 * (6) * (4) : (1 + 1) * (6) * (4)].view(6, 4).amax(dim=0).view([1, 4]).to(torch.bfloat16)
    del workspace_0
    return (buf0, buf1)
"""


def test_a_dry_run_follows_what_is_written_for_a_gpu():
    """Two reductions in one kernel; torch 2.13 copies inputs that are not aligned."""
    run = DryRun(Meter())
    x = run.of(TensorSpec((6, 4), (4, 1), torch.float32, torch.device("cpu")), None)
    results = load_wrapper(_PARTIAL_SUMS, run)([x])
    assert [e.delta_bytes for e in run.meter.events] == [192, 16, 16, 8, -16, -192], "a copy of another dtype is a copy"
    assert [(r.shape, r.strides, r.dtype) for r in results] == [
        ((4,), (1,), torch.float32),
        ((1, 4), (4, 1), torch.bfloat16),
    ]
    whole = run.empty((48,), (1,), torch.float32, "cpu")
    assert whole[24:48].spec.shape == (24,) and whole[24:48].block is whole.block


def test_storage_is_what_lies_between_the_first_and_the_last_element():
    assert storage_bytes((2, 3), (3, 1), 4) == 24
    assert storage_bytes((2, 3), (8, 1), 4) == 44
    assert storage_bytes((2, 3), (0, 1), 4) == 12
    assert storage_bytes((), (), 8) == 8
    assert storage_bytes((0, 3), (3, 1), 4) == 0


def test_code_knows_its_tangents():
    graph = torch.fx.Graph()
    for name in ("primals_1", "tangents_1", "tangents_2"):
        graph.placeholder(name)
    code = GeneratedCode.of("", graph, [torch.ones(2), 3, torch.ones(2, 3).t()])
    assert num_tangents(code) == 2 and code.inputs[1] == 3
    assert code.inputs[2] == TensorSpec((3, 2), (1, 3), torch.float32, torch.device("cpu"))


# ---- against the allocator


class Encoder(nn.Module):
    """A transformer layer with everything that the peak depends on: SDPA, GELU, dropout, LayerNorm, an embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Embedding(300, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + F.dropout(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)), 0.1)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    model.zero_grad(set_to_none=True)
    return step_peak(lambda: model(*batch), backward=lambda loss: loss.backward()).peak_bytes


def encoder_batch(batch: int = 24, length: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (batch, length), generator=generator)
    return tokens, torch.randint(5, (batch,), generator=generator)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("preset", [pytest.param("exact", marks=pytest.mark.thorough), "max"])
def test_the_allocator_agrees_for_any_pattern(preset):
    torch.manual_seed(0)
    model, session = optimized(Encoder(), preset=preset, executor="inductor", scheduler="none", min_bytes=4096)
    batch = encoder_batch()
    model(*batch).backward()
    names = session.gates.names
    for closed in ((), names, names[::2], ("embed.weight", "up.weight")):
        session.unfreeze()
        if closed:
            session.freeze(closed)
        found = measured(model, batch)
        assert session.predict_peak().peak_bytes == pytest.approx(found, rel=0.01)
        assert session.predict_peak(frozenset(names) - frozenset(closed)) == session.predict_peak()
    plan = session.plan
    assert plan.peak is not None and plan.peak.closed_bytes < plan.peak.open_bytes == plan.peak.worst_bytes
    assert "step peak, predicted" in str(plan) and "alive at the peak, slimfit_fx" in str(plan)
    with pytest.raises(ValueError, match=r"'up.wieght' is no unit \(did you mean 'up.weight'\?\)"):
        session.predict_peak(["up.wieght"])


def test_the_interpreter_knows_its_peak_once_a_step_has_run():
    model, session = optimized(Encoder(), scheduler="none")
    with pytest.raises(RuntimeError, match="the peak of a step is not known: no graph with a gate was captured"):
        session.predict_peak()
    batch = encoder_batch()
    model(*batch).backward()
    assert session.predict_peak().peak_bytes == measured(model, batch) == session.plan.peak.open_bytes


def test_a_graph_that_never_ran_backward_is_not_known():
    model, session = optimized(Encoder(), scheduler="none")
    model(*encoder_batch(2, 4))
    session.backend.graphs[0].codes.pop()
    assert session.plan.peak is None and "run one training step" in session.plan.peak_unknown
    assert "Step peak: not known" in str(session.plan)


def test_generators_are_no_saved_values():
    """A GPU's checkpointing hands backward the states that forward drew its dropout with, behind the tangents."""
    code = SimpleNamespace(names=("primals_1", "mm", "tangents_1", "bwd_rng_state_0", "bwd_rng_state_1"))
    assert (num_tangents(code), _num_generators(code)) == (1, 2)


class TiedHead(nn.Module):
    """Layers between an embedding and a head with its weights; logits take 1 MB each time they stand in memory."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2048, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return F.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("closed", [(), ("embed.weight",)])
def test_a_tied_head_lets_go_of_its_logits_before_the_layers_run(closed):
    """Its weight's gradient comes in two parts, of which the first does not wait for the embedding's."""
    ids = torch.arange(128).view(4, 32)
    model, session = optimized(TiedHead(), preset="exact", scheduler="none")
    if closed:
        session.freeze(closed)
    model(ids).backward()
    found = session.predict_peak()
    logits, gradient = 128 * 2048 * 4, model.embed.weight.nbytes
    backward = found.timeline[found.peak_event :]
    assert found.peak_bytes > 2 * logits
    below = [size for size in backward if size < logits]
    assert len(below) > len(backward) / 2, "logits are gone for most of backward"
    assert backward[-1] <= gradient * (not closed) + 16 * 2**10
