"""The optimizer's step: what is predicted is what the allocator sees, for every optimizer of torch and every way."""

from __future__ import annotations

import gc

import pytest
import torch
from effort import first
from reference import optimized
from test_peak import Encoder, encoder_batch
from torch import Tensor, nn

import slimfit_fx
from bench.measure import recorded_step, replay
from slimfit_fx.beside_steps import find_optimizer
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import fixed_bytes
from slimfit_fx.planning.update import count_bytes, step_memory, update_memory
from slimfit_fx.rehearsal import Rehearsal
from slimfit_fx.session import Session
from slimfit_fx.units import find_units

SHAPES = ((300, 64), (64, 64), (64,), (256, 64), (256,), (64, 256), (5, 64))
OPTIMIZERS = {
    "AdamW": {},
    "Adam": {"amsgrad": True},
    "SGD": {"lr": 0.1},
    "SGD with momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "SGD with Nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adafactor": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
}
COMMON = ("AdamW", "SGD")
"""Of these make test tries every way, of the others ``USUAL`` only: all are counted by the same rules."""
USUAL = {name: {"foreach": bool(number % 2)} for number, name in enumerate(OPTIMIZERS)} | {"Adagrad": {"fused": True}}
FUSED = ("AdamW", "Adam", "SGD", "SGD with momentum", "Adagrad")
WAYS = [(name, way) for name in OPTIMIZERS for way in ({"foreach": False}, {"foreach": True}, {"fused": True}, {})]


def stepped(name: str, **way: bool) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer that has done two steps, and the parameters that have gradients now: all but the largest matrix."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = getattr(torch.optim, name.split()[0])(params, **OPTIMIZERS[name], **way)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    params[0].grad = None
    return optimizer, params[1:]


def measured_step(optimizer: torch.optim.Optimizer) -> int:
    return replay(recorded_step(lambda: None, lambda _: optimizer.step())).peak_bytes


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if name in COMMON or way == USUAL.get(name) else pytest.mark.thorough)
        for name, way in WAYS
        if "fused" not in way or name in FUSED
    ],
    ids=str,
)
def test_an_optimizer_takes_what_was_predicted(name, way):
    optimizer, wanted = stepped(name, **way)
    predicted = update_memory(optimizer, {id(p) for p in wanted})
    assert predicted is not None
    found = measured_step(optimizer)
    assert found <= predicted.temporary_bytes <= 1.06 * found + 64
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert predicted.state_bytes == sum(t.untyped_storage().nbytes() for t in tensors)


def test_nothing_of_the_optimizer_is_touched():
    optimizer, wanted = stepped("AdamW")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    before = [p.detach().clone() for p in wanted]
    grads, steps = [p.grad for p in wanted], [float(s["step"]) for s in optimizer.state.values()]
    update_memory(optimizer, {id(p) for p in wanted})
    assert calls == [] and steps == [float(s["step"]) for s in optimizer.state.values()]
    assert all(torch.equal(a, p) and p.grad is g for a, p, g in zip(before, wanted, grads, strict=True))


FLOAT, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    "dtypes",
    [
        (FLOAT, BRAIN),
        (BRAIN, FLOAT),
        *(pytest.param(p, marks=pytest.mark.thorough) for p in ((DOUBLE, BRAIN), (BRAIN, HALF), (FLOAT, FLOAT))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "work", [Tensor.add_, Tensor.add, Tensor.mul_, Tensor.lt, Tensor.copy_], ids=lambda f: f.__name__
)
def test_pointwise_work_on_two_dtypes_makes_copies(dtypes, work):
    """Counted, on meta tensors, as the allocator does on real ones."""

    def peak(device: str) -> int:
        a, b = (torch.ones(1000, dtype=dtype, device=device) for dtype in dtypes)
        if device == "meta":
            return count_bytes(lambda: work(a, b), torch.device("cpu"))
        return replay(recorded_step(lambda: None, lambda _: work(a, b))).peak_bytes

    assert peak("cpu") == peak("meta")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "ns_steps": 2}], ids=str)
def test_products_of_an_optimizer_are_counted_with_what_they_take_for_themselves(settings):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES if len(shape) == 2]
    optimizer = torch.optim.Muon(params, **settings)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    params[0].grad = None
    predicted = update_memory(optimizer, {id(p) for p in params[1:]})
    assert predicted is not None
    found = measured_step(optimizer)
    assert found <= predicted.temporary_bytes <= 1.06 * found + 64
    assert predicted.state_bytes == sum(p.numel() * 4 for p in params)


def test_a_step_that_needs_values_is_not_known():
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(3))])
    assert update_memory(optimizer, frozenset()) is None
    assert step_memory([optimizer], []) is None


def test_a_step_on_sparse_gradients_is_not_known_and_stays_below_the_rough_bound():
    embedding = nn.Embedding(100, 16, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.randint(100, (7,))).sum().backward()
        optimizer.step()
    assert update_memory(optimizer, {id(embedding.weight)}) is None
    rough = fixed_bytes(embedding, [], 0, optimizer_state=0)
    assert 0 < measured_step(optimizer) <= rough.update - rough.gradients


def test_lbfgs_is_refused_while_units_are_frozen():
    model, _ = optimized(Encoder(), freeze_rate=0.5)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"LBFGS moves every parameter.*use another optimizer, or freeze_rate=0"):
        optimizer.step(lambda: pytest.fail("it is refused before it computes anything"))
    assert not optimizer.state


def test_bytes_are_counted_while_somebody_holds_them():
    x = torch.empty(100, device="meta")

    def work() -> torch.Tensor:
        y = x + 1
        z = y * 2
        del y
        return z.view(10, 10) + 1

    assert count_bytes(work) == 800


@pytest.mark.parametrize(
    "make",
    first(
        [
            torch.optim.AdamW,
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
            lambda p: torch.optim.AdamW(p, foreach=True),
            lambda p: torch.optim.AdamW(p, fused=True),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        ],
        2,
    ),
)
@pytest.mark.parametrize("most", [pytest.param(1 << 16, marks=pytest.mark.thorough), 3000])
def test_a_whole_update_stays_below_the_prediction(make, most):
    """Gradients, copies of the open weights, the optimizer, the distances: bound and worst by 6% at most."""
    model, session = optimized(Encoder(), freeze_rate=0.5, seed=0, distance_sample=most)
    optimizer = make(model.parameters())
    batch = encoder_batch()
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    session.unfreeze()
    optimizer.zero_grad()
    model(*batch).backward()
    for param in model.parameters():  # state of units that opened just now
        if param.grad is not None and not optimizer.state[param]:
            optimizer.state.pop(param)
    state = session._hooks.state_bytes()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    gc.collect()
    found = gradients + measured_step(optimizer) - (session._hooks.state_bytes() - state)
    predicted = session.predict_update()
    assert found <= predicted + 64 and predicted <= 1.06 * found


def amsgrad(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, amsgrad=True)


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [(None, 2), (torch.optim.SGD, 0), (amsgrad, 3)],
    ids=["AdamW is assumed", "class", "function"],
)
def test_what_is_there_beside_a_step_goes_by_the_optimizer_that_is_given(optimizer, states):
    model, config = Encoder(), Config(memory_budget=10**9)
    found, trainable = find_units(model), sum(p.numel() * 4 for p in model.parameters())
    given = find_optimizer(model, optimizer)
    planned = Rehearsal(model, found.units, optimizer=given).budget(config).fixed()
    assert states * trainable <= planned.optimizer_state <= states * (trainable + 4 * len(list(model.parameters())))
    session = Session(model, config, found.units, found.always, "inductor", given)
    assert session.backend.under.budget.fixed() == planned
    session.close()


def test_an_optimizer_that_was_seen_goes_before_the_one_that_was_given():
    model, config = Encoder(), Config(memory_budget=10**9)
    found = find_units(model)
    session = Session(model, config, found.units, found.always, "inductor", find_optimizer(model, torch.optim.SGD))
    session._tracker.forwarded = True
    optimizer = torch.optim.AdamW(model.parameters())
    budget = session.backend.under.budget
    assert budget.fixed().optimizer_state == 0 == session._state_bytes()
    model.head.bias.grad = torch.ones(5)
    optimizer.step()
    assert budget.fixed().optimizer_state > 2 * budget.fixed().parameters > 10 * session._state_bytes() > 0
    session.close()


def test_an_optimizer_is_given_as_it_is_or_by_what_makes_it():
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters())
    assert find_optimizer(model, optimizer) is optimizer and find_optimizer(model, None) is None
    assert isinstance(find_optimizer(model, amsgrad), torch.optim.Adam)
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters, got a SGD of others"):
        find_optimizer(Encoder(), optimizer)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, or make one .*got 'SGD'$"):
        find_optimizer(model, "SGD")
    with pytest.raises(TypeError, match="got <class 'list'>, which makes a list"):
        find_optimizer(model, list)


def test_a_plan_counts_the_state_of_the_optimizer_that_is_given():
    batch = encoder_batch()
    plain = slimfit_fx.plan(Encoder(), *batch)
    adam, sgd = (slimfit_fx.plan(Encoder(), *batch, optimizer=o) for o in (torch.optim.Adam, torch.optim.SGD))
    assert adam.optimizer_bytes > 0.99 * plain.optimizer_bytes > sgd.optimizer_bytes == 0
    with pytest.raises(ValueError, match=r"freeze_rate(?s:.*)optimizer must be a torch.optim.Optimizer, .* got 'sgd'"):
        slimfit_fx.plan(Encoder(), *batch, freeze_rate=2.0, optimizer="sgd")
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters"):
        slimfit_fx.optimize(Encoder(), optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))]))
