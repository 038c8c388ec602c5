"""``max_batch``: which dimension it takes, and that its answer holds."""

from __future__ import annotations

import json

import pytest
import torch
from small import Small, Smaller, small_batch, smaller_batch

import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.fit import SizedExample, _Probes
from slimfit_fx.planning.budget import Budget, FixedBytes
from slimfit_fx.rehearsal import Rehearsal
from slimfit_fx.units import find_units


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("example", "batched", "size"),
    [
        ({"ids": zeros(4, 9), "mask": zeros(4, 9), "positions": zeros(1, 9)}, ("ids", "mask"), 4),
        ({"ids": zeros(1, 9), "labels": zeros(1), "scale": zeros()}, ("ids", "labels"), 1),
        ((zeros(3, 2), zeros(3), 7, "text"), ("argument 0", "argument 1"), 3),
        (zeros(5, 2), ("argument 0",), 5),
    ],
)
def test_the_batch_is_the_size_that_most_inputs_share(example, batched, size):
    found = SizedExample.of(example)
    assert (found.batched, found.size) == (batched, size)
    args, kwargs = found.at(11)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()]
    assert [x.shape[0] for x in given].count(11) == len(batched)
    assert all(type(x).__name__ == "FakeTensor" for x in given if x.shape[0] == 11), "no memory is taken for a probe"


@pytest.mark.parametrize(
    ("example", "error", "match"),
    [
        ({"a": zeros(4), "b": zeros(5)}, ValueError, "which size is the batch.*got a: 4, b: 5"),
        ({"a": zeros()}, ValueError, "no batch in the example"),
        ("text", TypeError, "example must be .*got str"),
    ],
)
def test_examples_without_a_batch(example, error, match):
    with pytest.raises(error, match=match):
        slimfit_fx.max_batch(Small(), example, 10**6)


def test_settings_are_checked_first():
    with pytest.raises(ValueError, match="memory_budget must be bytes, .*got '6 gigs'"):
        slimfit_fx.max_batch(Small(), small_batch(2), "6 gigs")


def test_plans_whose_saved_values_alone_are_too_much_cost_no_dry_run():
    model, config = Small(), Config(preset="exact", memory_budget=10**9)
    probes = _Probes(Rehearsal(model, find_units(model).units, faked=True), config, SizedExample.of(small_batch()))
    held = Budget(1000, 1, lambda _: FixedBytes(0, 0, 0, 0))
    assert not probes.fits(0, 500, held)
    assert probes.given_up == {(0, 500)} and probes.known == {}


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
def test_the_largest_batch_fits_and_the_next_does_not():
    settings = {"preset": "exact", "freeze_rate": 0.6}
    found = slimfit_fx.max_batch(Smaller(), smaller_batch(3), 300_000, **settings)
    assert found.peak_bytes <= found.budget_bytes == 300_000 < found.next_peak_bytes
    assert found.batched == ("argument 0", "argument 1") and found.dry_runs <= 8
    assert found.plan.peak is not None and json.loads(json.dumps(found.to_dict()))["batch"] == found.batch
    assert f"largest batch: {found.batch} (argument 0, argument 1: first dimension)" in str(found)

    plan = slimfit_fx.plan(Smaller(), *smaller_batch(found.batch), memory_budget=300_000, **settings)
    assert plan.peak == found.plan.peak, "optimize takes the plan that was found"
    with pytest.raises(slimfit_fx.MemoryBudgetError) as error:
        slimfit_fx.plan(Smaller(), *smaller_batch(found.batch + 1), memory_budget=300_000, **settings)
    assert error.value.smallest_bytes == found.next_peak_bytes


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
def test_where_not_even_one_fits_the_error_says_what_one_takes():
    settings = {"preset": "exact", "freeze_rate": 0.6}
    with pytest.raises(slimfit_fx.MemoryBudgetError, match="not even a batch of 1 fits into 0.5 MiB") as error:
        slimfit_fx.max_batch(Small(), small_batch(3, 16), 500_000, **settings)
    smallest = error.value.smallest_bytes
    assert slimfit_fx.max_batch(Small(), small_batch(1, 16), smallest, **settings).batch >= 1


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.usefixtures("cheap_only")
def test_with_an_optimizer_that_takes_less_more_fits():
    """A budget that AdamW's state leaves too little of."""
    model, batch, settings = Small(), small_batch(), {"preset": "exact", "freeze_rate": 0.6}
    plan = slimfit_fx.plan(model, *batch, peak=True, **settings)
    limit = 3 * plan.parameter_bytes + plan.peak.worst_bytes - 1
    with pytest.raises(slimfit_fx.MemoryBudgetError):
        slimfit_fx.plan(model, *batch, memory_budget=limit, **settings)
    config, sgd = Config(memory_budget=limit, **settings), torch.optim.SGD(model.parameters())
    assert Rehearsal(model, find_units(model).units, optimizer=sgd).plan(config, batch, {}).optimizer_bytes == 0
    found = slimfit_fx.max_batch(model, batch, limit, optimizer=torch.optim.SGD, **settings)
    assert found.batch > 24 and found.plan.optimizer_bytes == 0
