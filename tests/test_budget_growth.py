"""A budget when batches grow after the plan was made, and when gradients accumulate."""

from __future__ import annotations

import warnings

import pytest
import sympy
import torch
from small import Small, small_batch
from test_peak import measured
from torch import Tensor, nn
from torch.nn import functional as F

import slimfit_fx
from slimfit_fx.capture.fit import SizeWatch
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import Judged
from slimfit_fx.planning.sizes import SymbolicTensor, describe_inputs, read_symbols, value_at
from slimfit_fx.rehearsal import Rehearsal
from slimfit_fx.session import Session
from slimfit_fx.units import find_units

LIMIT = 4_500_000


def test_plain_sizes_have_no_symbols():
    assert describe_inputs([torch.ones(2, 3), 4, None]) is None


def test_sizes_are_worked_out_from_the_arguments():
    s = sympy.Symbol("s")
    inputs = (s, SymbolicTensor((s, 4), (4, 1), torch.float32, torch.device("cpu")), None)
    values = read_symbols(inputs, [7, torch.ones(7, 4), None])
    assert values == {s: 7} and value_at(s * 4 + 1, values) == 29 and value_at(5, {}) == 5
    with pytest.raises(LookupError, match=r"\['u'\] in the size u \+ 1 is no input"):
        value_at(sympy.Symbol("u") + 1, values)


def test_only_larger_calls_are_looked_at():
    asked = []

    def takes(arguments):
        asked.append(tuple(arguments))
        return Judged(Config(), 0, arguments[0] * arguments[1])

    watch = SizeWatch([8, 4], takes, limit=100)
    assert watch.outgrown_by([8, 4]) is watch.outgrown_by([1, 2]) is None and asked == []
    assert watch.outgrown_by([20, 5]) is None and watch.outgrown_by([19, 5]) is None and asked == [(20, 5)]
    assert watch.outgrown_by([5, 21]).total_bytes == 105
    watch.allow([5, 21])
    assert watch.outgrown_by([5, 21]) is None


def train(model: torch.nn.Module, batch: tuple[torch.Tensor, ...], *, mark: bool) -> int:
    """Bytes in all of one step, from its very first run with this batch on."""
    if mark:
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
    session: Session = slimfit_fx.session(model)
    under = session.backend.under
    assert under is not None
    model.zero_grad(set_to_none=True)
    model(*batch).backward()
    return under.budget.fixed().total + measured(model, batch)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("static", "automatic")), "marked"]
)
def test_a_larger_batch_is_planned_again(kind):
    torch.manual_seed(0)
    dynamic = False if kind == "static" else None
    model = slimfit_fx.optimize(Small(), preset="balanced", memory_budget=LIMIT, freeze_rate=0.6, dynamic=dynamic)
    session = slimfit_fx.session(model)
    first = [train(model, small_batch(b), mark=kind == "marked") for b in (8, 12)]
    assert max(first) <= LIMIT and session.plan.preset == "exact"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert train(model, small_batch(40), mark=kind == "marked") <= LIMIT
    again = [str(w.message) for w in said if "the model is compiled again with a smaller one" in str(w.message)]
    assert len(again) == (kind != "static"), "a static graph is compiled for the new batch anyway"
    assert session.plan.preset == "balanced"
    with pytest.warns(RuntimeWarning, match=r"nothing fits into 4.3 MiB.*training goes on with the smallest plan"):
        assert train(model, small_batch(70), mark=kind == "marked") > LIMIT
    compiles = session.compiles
    assert train(model, small_batch(8), mark=kind == "marked") <= LIMIT
    assert kind == "static" or session.compiles == compiles


class Broken(nn.Module):
    """Two blocks, and a graph break between them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.layers
        x = x + second(F.gelu(first(x)))
        torch._dynamo.graph_break()
        return (x + fourth(F.gelu(third(x)))).square().mean()


def test_before_a_step_only_the_first_graph_is_planned_and_said_to_be():
    batch = torch.ones(2, 32, 32)
    (note,) = (note for note in slimfit_fx.plan(Broken(), batch).notes if "breaks into several graphs" in note)
    assert note.startswith("the forward breaks into several graphs, and only the first can be planned")
    assert not any("breaks" in note for note in slimfit_fx.plan(Small(), *small_batch(2, 4)).notes)
    with pytest.raises(ValueError, match="the forward breaks into several graphs"):
        Rehearsal(Broken(), find_units(Broken()).units).graphs(Config(), (batch,), {}, peak=False)


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
def test_graphs_that_do_not_fit_together_are_all_planned_again():
    """The first graph takes the plan that loses nothing, since it fits alone; then nothing fits for the second."""
    settings, batch = {"preset": "balanced", "freeze_rate": 0.0}, torch.ones(64, 32, 32)
    model = slimfit_fx.optimize(Broken(), memory_budget=10**9, **settings)
    model(batch).backward()
    largest = slimfit_fx.session(model).backend.graphs[-1].judged.total_bytes

    torch._dynamo.reset()
    limit = int(0.7 * largest)
    model = slimfit_fx.optimize(Broken(), memory_budget=limit, **settings)
    session = slimfit_fx.session(model)
    with pytest.warns(RuntimeWarning, match=r"before the next forward all are compiled again.*\(preset balanced\)"):
        model(batch).backward()
    assert [graph.chosen.preset for graph in session.backend.graphs] == ["exact", "balanced"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = measured(model, (batch,))
    assert session.plan.preset == "balanced" and session.compiles == 4
    assert session.backend.under.budget.fixed().total + found <= limit
    measured(model, (batch,))
    assert session.compiles == 4 and session.backend.under.settled

    torch._dynamo.reset()
    model = slimfit_fx.optimize(Broken(), memory_budget=int(0.6 * largest), **settings)
    with pytest.warns(RuntimeWarning, match="all are compiled again"):
        model(batch).backward()
    model.zero_grad()
    with pytest.raises(slimfit_fx.MemoryBudgetError, match="The forward breaks into several graphs; up to") as error:
        model(batch)
    assert error.value.smallest_bytes is None, "what the others would take then is not known"
    with pytest.raises(slimfit_fx.MemoryBudgetError, match="cannot be promised: the forward breaks into several"):
        slimfit_fx.plan(Broken(), batch, memory_budget=10**9)


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
def test_an_optimizer_that_takes_more_than_was_assumed_leads_to_another_plan():
    """The budget leaves no room for a third moment: after the first step of such an optimizer less is saved."""
    batch, settings = small_batch(), {"freeze_rate": 0.6}
    plan = slimfit_fx.plan(Small(), *batch, preset="exact", peak=True, **settings)
    limit = 3 * plan.parameter_bytes + plan.peak.worst_bytes + 64
    model = slimfit_fx.optimize(Small(), preset="balanced", memory_budget=limit, **settings)
    session, optimizer = slimfit_fx.session(model), torch.optim.Adam(model.parameters(), amsgrad=True)
    model(*batch).backward()
    assert session.plan.preset == "exact"
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="a step with the optimizer that is in use would take .* compiled again"):
        found = measured(model, batch)
    beside = session.backend.under.budget.fixed()
    assert session.plan.preset == "balanced" and beside.optimizer_state >= 3 * beside.parameters
    assert beside.total + found <= limit
    optimizer.step()
    assert measured(model, batch) <= limit - beside.total and session.compiles == 2


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
def test_gradients_of_earlier_micro_batches_are_counted():
    batch, plans = small_batch(24, 48), {}
    for accumulates in (False, True):
        settings = {"preset": "balanced", "freeze_rate": 0.6, "gradient_accumulation": accumulates}
        config = Config(**settings, memory_budget=1)
        with pytest.raises(slimfit_fx.MemoryBudgetError) as error:
            slimfit_fx.plan(Small(), *batch, config=config)
        plans[accumulates] = error.value.smallest_bytes
    assert "accumulated gradients" in str(error.value)
    torch.manual_seed(0)
    model = slimfit_fx.optimize(Small(), preset="balanced", freeze_rate=0.6, memory_budget=plans[False])
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch).backward()
    with pytest.warns(RuntimeWarning, match="gradient_accumulation was not set|nothing fits into"):
        model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()

    torch._dynamo.reset()
    model = slimfit_fx.optimize(
        Small(), preset="balanced", freeze_rate=0.6, memory_budget=plans[True], gradient_accumulation=True
    )
    model(*batch).backward()
    earlier = sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    from bench.measure import step_peak

    found = step_peak(lambda: model(*batch), backward=lambda loss: loss.backward()).peak_bytes
    fixed = slimfit_fx.session(model).backend.under.budget.fixed()
    assert earlier <= fixed.gradients
    assert fixed.total + earlier + found <= 1.01 * plans[True]
