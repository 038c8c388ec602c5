"""The optimizer's step: what is predicted is what the allocator sees, for every optimizer of torch and every way."""

from __future__ import annotations

import gc

import pytest
import torch
from reference import optimized
from test_peak import Encoder, encoder_batch
from torch import nn

from bench.measure import recorded_step, replay
from slimfit_fx.planning.update import count_bytes, step_memory, update_memory

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


@pytest.mark.parametrize(("name", "way"), [(n, w) for n, w in WAYS if "fused" not in w or n in FUSED], ids=str)
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


def test_a_step_that_needs_values_is_not_known():
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(3))])
    assert update_memory(optimizer, frozenset()) is None
    assert step_memory([optimizer], []) is None


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
    [
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    ],
)
@pytest.mark.parametrize("most", [1 << 16, 3000])
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
