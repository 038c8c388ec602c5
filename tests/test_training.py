"""Training loops as users write them: long, resumed, accumulating, with several optimizers or a closure."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from effort import first
from reference import UNPACED, compile_reference, differences, equal_bits, optimized, step
from small_models import BATCH, LENGTH, Tiny, optimizer_state, same_state, tokens
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from training_loops import grads_of, pair, train

import slimfit_fx
import slimfit_fx.api

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


# ---- many steps


@pytest.mark.parametrize("kind", first(OPTIMIZERS))
def test_two_hundred_steps_compile_once_and_closed_units_stand_still(kind):
    torch._dynamo.utils.counters.clear()
    model, session = optimized(Tiny(depth=1))
    optimizer = OPTIMIZERS[kind](model.parameters())
    params = dict(model.named_parameters())
    opened: set[str] = set()
    for number in range(200):
        optimizer.zero_grad()
        model(*tokens(number)).backward()
        closed = session.gates.closed
        opened |= session.gates.open
        before = {n: (params[n].detach().clone(), optimizer_state(optimizer, params[n])) for n in closed}
        optimizer.step()
        for name, (weight, state) in before.items():
            assert torch.equal(weight, params[name]), f"{name} moved in step {number} while closed"
            assert same_state(state, optimizer_state(optimizer, params[name])), (
                f"state of {name} changed in step {number}"
            )
    assert (session.compiles, session.recompiles, session.steps) == (1, 0, 200)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert opened == set(session.gates.names), "every unit is visited"
    assert len(session.gates.history) == 200


def test_it_learns():
    model, _ = optimized(Tiny(depth=1), freeze_rate=0.8, preset="balanced")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, [number % 3 for number in range(150)])
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])


@pytest.mark.parametrize(
    ("scheduler", "most"),
    [
        ("ils", None),
        pytest.param("ils", 64, marks=pytest.mark.thorough),
        *(pytest.param(name, None, marks=pytest.mark.thorough) for name in ("random", "round_robin")),
    ],
)
def test_a_resumed_run_equals_the_run_without_a_stop(scheduler, most):
    def fresh():
        settings = {"scheduler": scheduler, "distance_sample": most, "freeze_rate": 0.6}
        model, session = optimized(Tiny(depth=1), preset="balanced", **settings)
        return model, session, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, session, optimizer = fresh()
    torch.manual_seed(3)
    train(model, optimizer, range(20))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    gates = json.dumps(session.state_dict())
    losses = train(model, optimizer, range(20, 40))

    again, resumed, other = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(json.loads(gates))
    torch.set_rng_state(saved[2])
    assert train(again, other, range(20, 40)) == losses
    assert [h for h in resumed.gates.history if h[0] > 20] == [h for h in session.gates.history if h[0] > 20]
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert same_state(optimizer_state(optimizer, a), optimizer_state(other, b)), name
    assert resumed.state_dict() == session.state_dict()


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_resumed_at_step_100_equals_200_steps():
    model, session = optimized(Tiny(depth=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    torch.manual_seed(3)
    train(model, optimizer, range(100))
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict(), session.state_dict(), torch.get_rng_state()))
    losses = train(model, optimizer, range(100, 200))
    again, resumed = optimized(Tiny(seed=9))
    other = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    weights, optimizer_dict, gates, random_state = pickle.loads(saved)
    again.load_state_dict(weights)
    other.load_state_dict(optimizer_dict)
    resumed.load_state_dict(gates)
    torch.set_rng_state(random_state)
    assert train(again, other, range(100, 200)) == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ---- forwards and backwards in every order


def test_gradient_accumulation_keeps_the_gates():
    model, session = optimized(Tiny(depth=1), preset="exact", freeze_rate=0.6, **UNPACED)
    reference = Tiny(depth=1)
    compiled = compile_reference(reference)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, reference))
    for number in range(3):
        for call, net in ((model, model), (compiled, reference)):
            net.zero_grad()
            torch.manual_seed(number)
            for micro in range(4):
                (call(*tokens(10 * number + micro)) / 4).backward()
        assert differences(grads_of(reference), grads_of(model), closed=session.gates.closed) == []
        for name, param in reference.named_parameters():
            param.grad = None if name in session.gates.closed else param.grad
        ours.step()
        theirs.step()
    assert len(session.gates.history) == 3 and len({h[1] for h in session.gates.history}) > 1
    assert (session.steps, session.recompiles) == (3, 0)


@pytest.mark.parametrize("backwards", first(["reverse order", "summed", "forward order"]))
def test_several_forwards_before_backward(backwards):
    model, session, compiled, reference = pair()
    for call in (model, compiled):
        torch.manual_seed(1)
        losses = [call(*tokens(number)) for number in range(3)]
        if backwards == "summed":
            torch.stack(losses).sum().backward()
        for loss in () if backwards == "summed" else losses if backwards == "forward order" else losses[::-1]:
            loss.backward()
    assert differences(grads_of(reference), grads_of(model), closed=session.gates.closed) == []


def test_a_pending_backward_keeps_the_gates_of_its_own_forward():
    model, session, compiled, reference = pair(make=Tiny, closed=("blocks.0.*",))
    torch.manual_seed(1)
    early = model(*tokens(0))
    session.unfreeze()
    session.freeze("blocks.1.*")
    torch.manual_seed(2)
    late = model(*tokens(1))
    assert session.gates.closed == {n for n in session.gates.names if n.startswith("blocks.1.")}

    _, expected = step(compiled, reference, tokens(0), seed=1)
    early.backward()
    assert (
        differences(expected, grads_of(model), closed={n for n in session.gates.names if n.startswith("blocks.0.")})
        == []
    )
    model.zero_grad()
    _, expected = step(compiled, reference, tokens(1), seed=2)
    late.backward()
    assert differences(expected, grads_of(model), closed=session.gates.closed) == []


def test_retain_graph():
    model, session, compiled, reference = pair()
    for call in (model, compiled):
        torch.manual_seed(1)
        loss = call(*tokens())
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    assert differences(grads_of(reference), grads_of(model), closed=session.gates.closed) == []


def test_autograd_grad():
    model, session, compiled, reference = pair()
    found = {}
    for key, call, net in (("ours", model, model), ("theirs", compiled, reference)):
        torch.manual_seed(1)
        names, params = zip(*net.named_parameters(), strict=True)
        grads = torch.autograd.grad(call(*tokens()), params, allow_unused=True)
        found[key] = dict(zip(names, grads, strict=True))
    assert differences(found["theirs"], found["ours"], closed=session.gates.closed) == []
    some = ["head.weight", "blocks.0.down.weight"]
    torch.manual_seed(1)
    grads = torch.autograd.grad(model(*tokens()), [model.get_parameter(n) for n in some], allow_unused=True)
    assert torch.equal(grads[0], found["theirs"][some[0]]) and grads[1] is None


def test_gradients_of_inputs_do_not_depend_on_the_gates():
    class Embedded(Tiny):
        def forward(self, x, labels):
            for block in self.blocks:
                x = block(x)
            return nn.functional.cross_entropy(self.head(self.norm(x).mean(dim=1)), labels)

    model, session, compiled, _ = pair(make=Embedded, closed=("blocks.*",))
    found = []
    for call in (model, compiled):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, BATCH * LENGTH * 16).reshape(BATCH, LENGTH, 16).requires_grad_()
        call(x, tokens()[1]).backward()
        found.append(x.grad)
    assert session.gates.closed and equal_bits(*found)


def test_loss_outside_of_the_model_and_a_double_use_of_the_output():
    model, session, compiled, reference = pair()
    data, labels = tokens()
    for call in (model, compiled):
        torch.manual_seed(1)
        logits = call(data)
        (nn.functional.cross_entropy(logits, labels) + logits.square().mean()).backward()
    assert differences(grads_of(reference), grads_of(model), closed=session.gates.closed) == []


def test_all_units_closed():
    model, session, compiled, reference = pair(closed=("*",))
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(compiled, reference, tokens())
    assert session.gates.open == frozenset() and equal_bits(loss, expected_loss)
    assert differences(expected, grads, closed=session.gates.closed) == []


# ---- the optimizer


def test_stale_gradients_of_closed_units_are_dropped_before_the_optimizer():
    model, session = optimized(Tiny(depth=1), scheduler="none", preset="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, range(2))
    session.freeze("blocks.0.*")
    optimizer.zero_grad(set_to_none=False)
    model(*tokens(3)).backward()
    closed = {n: model.get_parameter(n) for n in session.gates.closed}
    assert closed and all(not p.grad.any() for p in closed.values()), "zeros that the user asked for"
    before = {n: (p.detach().clone(), optimizer_state(optimizer, p)) for n, p in closed.items()}
    optimizer.step()
    for name, (weight, state) in before.items():
        assert torch.equal(weight, closed[name]) and same_state(state, optimizer_state(optimizer, closed[name])), name


def test_clipping_sees_open_units_only():
    model, session, compiled, reference = pair()
    step(model, model, tokens())
    step(compiled, reference, tokens())
    for name, param in reference.named_parameters():
        param.grad = None if name in session.gates.closed else param.grad
    norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.01) for net in (model, reference)]
    assert torch.equal(*norms)


def test_two_optimizers_count_as_one_step():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    head = [p for n, p in model.named_parameters() if n.startswith(("head", "norm"))]
    rest = [p for n, p in model.named_parameters() if not n.startswith(("head", "norm"))]
    first, second = torch.optim.SGD(head, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1)
    for number in range(6):
        model.zero_grad()
        model(*tokens(number)).backward()
        closed = session.gates.closed
        before = {n: model.get_parameter(n).detach().clone() for n in closed}
        first.step()
        second.step()
        assert all(torch.equal(before[n], model.get_parameter(n)) for n in closed)
    assert session.steps == 6 and len(session.gates.history) == 6
    measured = [n for n, d in session.scheduler.distances.items() if d < 2**40]
    assert any(n.startswith("norm") for n in measured) and any(n.startswith("blocks") for n in measured)


def test_an_optimizer_of_another_model_flips_nothing():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    model(*tokens()).backward()
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert session.steps == 0 and all(model.get_parameter(n).grad is not None for n in session.gates.open)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_flips_nothing(fused):
    """A fused optimizer is called all the same, and its kernel does nothing."""
    model, session = optimized(Tiny(depth=1), freeze_rate=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for number in range(4):
        optimizer.zero_grad()
        scaler.scale(model(*tokens(number))).backward()
        if number == 1:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
        gates, before = session.gates.open, {n: p.detach().clone() for n, p in model.named_parameters()}
        distances = dict(session.scheduler.distances)
        scaler.step(optimizer)
        scaler.update()
        moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert session.gates.open == gates and bool(moved) == (number != 1) and moved.isdisjoint(session.gates.closed)
        if number == 1:
            model(*tokens(number))
            assert session.gates.open == gates and session.scheduler.distances == distances
    assert session.steps == 3
    model(*tokens(9))
    opened = [chosen for _, chosen in session.gates.history]
    assert len(opened) == 4, "one decision per step done; the skipped one asked for none"


def test_a_closure_works():
    model, session = optimized(Tiny(depth=1, dropout=0.0), freeze_rate=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = model(*tokens())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0] and session.steps == 8


@pytest.mark.parametrize("kind", first(OPTIMIZERS))
def test_forward_and_backward_in_a_closure_are_the_same_training(kind):
    """As Lightning does it: gates flip and gradients appear inside of ``optimizer.step``."""

    def run(inside: bool):
        model, session = optimized(Tiny(depth=1), freeze_rate=0.6)
        optimizer = OPTIMIZERS[kind](model.parameters())
        torch.manual_seed(3)
        for number in range(12):

            def closure(number=number, model=model, optimizer=optimizer, session=session):
                optimizer.zero_grad()
                loss = model(*tokens(number))
                loss.backward()
                for name in session.gates.closed:  # what DistributedDataParallel leaves behind
                    param = model.get_parameter(name)
                    param.grad = torch.zeros_like(param)
                return loss

            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return model, session

    (model, session), (other, expected) = run(True), run(False)
    assert session.state_dict() == expected.state_dict()
    assert any(d < 2**40 for d in session.scheduler.distances.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_optimizer_that_calls_its_closure_often():
    """LBFGS: with nothing frozen it works, with closed units it is refused."""
    for rate in (0.0, 0.5):
        model, session = optimized(Tiny(depth=1, dropout=0.0), freeze_rate=rate)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(*tokens())
            loss.backward()
            return loss

        if rate:
            with pytest.raises(ValueError, match="LBFGS moves every parameter"):
                optimizer.step(closure)
            continue
        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[-1] < losses[0] and session.steps == 3 and session.compiles == 1


def test_an_exotic_optimizer_says_when_it_stepped():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    for number in range(5):
        model.zero_grad()
        model(*tokens(number)).backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= 0.1 * param.grad
        session.step()
    assert session.steps == 5 and len({chosen for _, chosen in session.gates.history}) > 1
    assert any(d < 2**40 for d in session.scheduler.distances.values())


def step_and_clear(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_inside_backward():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5, scheduler="random")
    for param in model.parameters():
        small = torch.optim.SGD([param], lr=0.01)
        param.register_post_accumulate_grad_hook(lambda p, small=small: step_and_clear(small))
    for number in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(*tokens(number)).backward()
        moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert not moved & session.gates.closed and session.gates.open <= moved
    assert session.steps == 4


def test_a_model_that_is_gone_does_not_disturb_other_optimizers():
    model, session = optimized(Tiny(depth=1))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    del model, session
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    before = len(_global_optimizer_pre_hooks)
    for _ in range(8):
        optimized(Tiny(depth=1))
        gc.collect()
    assert len(_global_optimizer_pre_hooks) <= before + 2, "hooks of models that are gone must not pile up"


@pytest.mark.parametrize("undo", first([False, True]))
def test_a_model_that_is_gone_frees_its_parameters(undo):
    model, session = optimized(Tiny(depth=1))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    if undo:
        slimfit_fx.restore(model)
    left = [weakref.ref(param) for param in model.parameters()] + [weakref.ref(model), weakref.ref(session)]
    del model, session
    gc.collect()
    assert [ref for ref in left if ref() is not None] == []


def test_many_models_of_one_class():
    """More than torch's recompile limit."""
    alive = []
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model, session = optimized(Tiny(depth=0), scheduler="none", preset="exact")
        session.freeze("embed.weight")
        model(*tokens()).backward()
        assert session.compiles == 1 and model.embed.weight.grad is None
        alive.append(model)
