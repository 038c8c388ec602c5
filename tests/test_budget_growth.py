"""A budget when batches grow after the plan was made, and when gradients accumulate."""

from __future__ import annotations

import warnings

import pytest
import sympy
import torch
from small import Small, small_batch
from test_peak import measured

import slimfit_fx
from slimfit_fx.capture.fit import SizeWatch
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import Judged
from slimfit_fx.planning.sizes import SymbolicTensor, describe_inputs, read_symbols, value_at
from slimfit_fx.session import Session

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
