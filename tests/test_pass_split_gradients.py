"""split_gradients: the matrices of experts have a gradient, and a gate, of their own."""

from __future__ import annotations

import hf_models
import pytest
import torch
from graphs import calls, stopped_after
from reference import compile_reference, differences, equal_bits, optimized, step
from torch import nn

from slimfit_fx.passes.split_gradients import split_gradients

pytest.importorskip("transformers")
OPS = torch.ops.slimfit_fx


def theirs(name: str) -> object:
    """An operator of transformers; skips where this version has none."""
    pytest.importorskip("transformers.integrations.moe")
    if not hasattr(torch.ops.transformers, name):
        pytest.skip(f"transformers has no {name} here")
    return getattr(torch.ops.transformers, name).default


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ends", [[3, 3, 8], [0, 0, 0], [8, 8, 8], [1, 2, 3]])
def test_the_operator_sums_over_the_rows_of_each_expert(ends, turned):
    torch.manual_seed(0)
    x, g = torch.randn(8, 5), torch.randn(8, 4)
    found = OPS.grouped_weight_gradient(x, g, torch.tensor(ends, dtype=torch.int32), turned)
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        torch.testing.assert_close(found[expert], x[begin:end].T @ g[begin:end])
    assert (found.permute(0, 2, 1) if turned else found).is_contiguous()
    described = OPS.grouped_weight_gradient(x.to("meta"), g.to("meta"), torch.empty(3, device="meta"), turned)
    assert (described.shape, described.stride()) == (found.shape, found.stride())


@pytest.mark.parametrize("turned", [False, True])
def test_it_gives_the_bits_that_their_operator_gives(turned):
    both, forward = theirs("grouped_mm_fallback_backward"), theirs("grouped_mm_fallback")
    torch.manual_seed(0)
    x, g, ends = torch.randn(64, 48), torch.randn(64, 40), torch.tensor([10, 10, 64], dtype=torch.int32)
    weight = torch.randn(3, 40, 48).permute(0, 2, 1) if turned else torch.randn(3, 48, 40)
    dx, dw = both(x, weight, ends, g)
    assert equal_bits(dx, forward(g, weight.permute(0, 2, 1), ends))
    found = OPS.grouped_weight_gradient(x, g, ends, turned)
    assert equal_bits(dw, found) and dw.stride() == found.stride()


class Experts(nn.Module):
    """Three matrices; the second gets no row. ``frozen``: behind something that needs no gradient."""

    def __init__(self, *, turned: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6).requires_grad_(not frozen)
        self.weight = nn.Parameter(torch.randn(3, 4, 6) if turned else torch.randn(3, 6, 4))
        self.turned = turned
        self.register_buffer("ends", torch.tensor([2, 2, 8], dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.transpose(1, 2) if self.turned else self.weight
        return torch.ops.transformers.grouped_mm_fallback(self.first(x), weight, self.ends)


@pytest.mark.parametrize("turned", [False, True])
def test_both_gradients_get_an_operator_and_a_second_run_finds_nothing(turned):
    both = theirs("grouped_mm_fallback_backward")
    graph = stopped_after("split_gradients", Experts(turned=turned), (torch.randn(8, 6),)).work.joint.graph
    assert calls(graph, both) == []
    assert len(calls(graph, torch.ops.transformers.grouped_mm_fallback.default)) == 2, (
        "forward, and the input's gradient"
    )
    (made,) = calls(graph, OPS.grouped_weight_gradient.default)
    assert made.args[3] is turned
    before = str(graph)
    assert split_gradients(graph.owning_module) == 0 and str(graph) == before


def test_an_operator_of_which_one_gradient_is_read_stays():
    both = theirs("grouped_mm_fallback_backward")
    work = stopped_after("split_gradients", Experts(frozen=True), (torch.randn(8, 6),)).work
    assert len(calls(work.joint.graph, both)) == 1


def test_experts_have_a_gate_each_and_gradients_stay_as_they_are():
    theirs("grouped_mm_fallback_backward")
    batch, reference = hf_models.batch("mixtral"), hf_models.build("mixtral")
    expected_loss, expected = step(compile_reference(reference), reference, batch)
    model, session = optimized(hf_models.build("mixtral"), preset="exact", scheduler="none")
    experts = [name for name in session.gates.names if ".experts." in name]
    assert len(experts) == 2
    for closed in ([], experts[::2], experts):
        session.unfreeze()
        session.freeze(closed) if closed else None
        loss, grads = step(model, model, batch)
        assert equal_bits(expected_loss, loss)
        assert differences(expected, grads, closed=set(closed)) == []
    assert all(unit.gated for unit in session.plan.units), session.plan.refusals
    assert session.recompiles == 0


def test_switched_off_the_plan_says_why_experts_have_no_gate():
    theirs("grouped_mm_fallback_backward")
    chosen = {"preset": "exact", "scheduler": "none", "disabled_passes": ("split_gradients",)}
    model, session = optimized(hf_models.build("mixtral"), **chosen)
    step(model, model, hf_models.batch("mixtral"))
    reasons = {unit.reason for unit in session.plan.units if ".experts." in unit.name}
    assert reasons == {"one operator makes it together with a gradient that is always needed"}


@pytest.mark.thorough
@pytest.mark.inductor
def test_experts_under_inductor():
    theirs("grouped_mm_fallback_backward")
    batch, reference = hf_models.batch("mixtral"), hf_models.build("mixtral")
    expected_loss, expected = step(compile_reference(reference, executor="inductor"), reference, batch)
    model, session = optimized(hf_models.build("mixtral"), executor="inductor", preset="exact", scheduler="none")
    for closed in ((), session.gates.names[::2], session.gates.names[1::3]):
        session.unfreeze()
        session.freeze(closed) if closed else None
        loss, grads = step(model, model, batch)
        assert equal_bits(expected_loss, loss) and session.executor == "inductor"
        assert differences(expected, grads, closed=set(closed)) == []
    assert (session.compiles, session.recompiles) == (1, 0)
