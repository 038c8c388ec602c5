"""Modules whose forward is in torch's own files, which dynamo does not trace by itself, are captured as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimfit_fx


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [sequential, encoder, lambda: nn.Linear(16, 16)])
def test_one_graph_with_every_gate(make):
    model = slimfit_fx.optimize(make(), executor="interpreter", strict=True, scheduler="none", preset="exact")
    current = slimfit_fx.session(model)
    closed = current.gates.names[0]
    current.freeze(closed)
    model(torch.randn(4, 8, 16)).sum().backward()
    assert (current.compiles, current.recompiles) == (1, 0)
    assert all(unit.gated for unit in current.plan.units)
    without = [name for name, param in model.named_parameters() if param.grad is None]
    assert without == [closed]


def test_instances_do_not_count_as_recompiles_of_each_other():
    models = [slimfit_fx.optimize(sequential(), executor="interpreter", strict=True) for _ in range(2)]
    for model in models * 2:
        model(torch.randn(4, 16)).sum().backward()
    assert [(slimfit_fx.session(m).compiles, slimfit_fx.session(m).recompiles) for m in models] == [(1, 0), (1, 0)]


def test_the_plan_names_modules_as_the_model_does():
    plan = slimfit_fx.plan(sequential(), torch.zeros(64, 16))
    assert {row.module for row in plan.rows} <= {"0", "1", "2"} and plan.rows
