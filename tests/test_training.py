"""Training loops as users write them: long, resumed, accumulating, with several optimizers, hooks or checkpoints."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import types
import warnings
import weakref
from typing import Any

import hf_models
import pytest
import torch
from reference import compile_reference, cosine, differences, equal_bits, optimized, step, unchanged_configuration
from small_models import BATCH, LENGTH, Tiny, optimizer_state, same_state, tokens
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import slimfit_fx
import slimfit_fx.api
from bench.measure import step_peak
from slimfit_fx.capture.captured import CapturedGraph
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.ungated import ungated_units

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def train(model, optimizer, numbers) -> list[float]:
    """Ordinary steps on batch 0, 1, ...; returns the losses."""
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        loss = model(*tokens(number))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair(
    *, closed: tuple[str, ...] = ("blocks.0.qkv.weight", "blocks.1.*", "embed.weight"), make=Tiny, **settings: Any
):
    """(optimized model, its session, compiled reference, its model); `closed` units are pinned, all others open."""
    model, session = optimized(make(), **{"preset": "exact", "scheduler": "none", **settings})
    if closed:
        session.freeze(closed)
    reference = make()
    return model, session, compile_reference(reference), reference


def grads_of(model) -> dict[str, torch.Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


# ---- many steps


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_hundred_steps_compile_once_and_closed_units_stand_still(kind):
    torch._dynamo.utils.counters.clear()
    model, session = optimized(Tiny())
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
    model, _ = optimized(Tiny(), freeze_rate=0.8, preset="balanced")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, [number % 3 for number in range(150)])
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])


@pytest.mark.parametrize(("scheduler", "most"), [("ils", None), ("ils", 64), ("random", None), ("round_robin", None)])
def test_a_resumed_run_equals_the_run_without_a_stop(scheduler, most):
    def fresh():
        settings = {"scheduler": scheduler, "distance_sample": most, "freeze_rate": 0.6}
        model, session = optimized(Tiny(), preset="balanced", **settings)
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


@pytest.mark.slow
def test_a_run_resumed_at_step_100_equals_200_steps():
    model, session = optimized(Tiny())
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


# ---- plans without a step


def large(batch: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of some 90 MB."""
    return tokens(0, batch, 16)


def larger_than_any_machine(**where) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of some 15 TB; the inputs themselves are views of one element, or on the meta device."""
    one = torch.zeros(1, dtype=torch.long, **where)
    return one.expand(5_000_000, 512), one.expand(5_000_000)


@pytest.mark.parametrize(
    ("inputs", "least_mb"),
    [(large, 50), (larger_than_any_machine, 10_000_000), (lambda: larger_than_any_machine(device="meta"), 10_000_000)],
    ids=["large", "larger than any machine", "on meta"],
)
def test_a_plan_takes_no_memory_for_activations(inputs, least_mb):
    batch, made = inputs(), []
    took = step_peak(lambda: made.append(slimfit_fx.plan(Tiny(depth=1), *batch))).peak_bytes
    assert took < 10**6
    totals = made[0].totals()
    assert totals.torch_compile_saved > least_mb * 10**6 and totals.saved_open > 0.02 * totals.torch_compile_saved


def test_a_step_of_that_plan_takes_what_the_plan_says():
    """What the test above calls large is: eager allocates it."""
    net, batch = Tiny(depth=1), large()
    took = step_peak(lambda: net(*batch), backward=lambda loss: loss.backward()).peak_bytes
    assert took > 50 * 10**6


# ---- forwards and backwards in every order


def test_gradient_accumulation_keeps_the_gates():
    model, session = optimized(Tiny(), preset="exact", freeze_rate=0.6)
    reference = Tiny()
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


@pytest.mark.parametrize("backwards", ["summed", "forward order", "reverse order"])
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
    model, session, compiled, reference = pair(closed=("blocks.0.*",))
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
    some = ["head.weight", "blocks.1.down.weight"]
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
    model, session = optimized(Tiny(), scheduler="none", preset="exact")
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
    model, session = optimized(Tiny(), freeze_rate=0.5)
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
    measured = [n for n, d in session.scheduler.distances.items() if d < 2**20]
    assert any(n.startswith("norm") for n in measured) and any(n.startswith("blocks") for n in measured)


def test_an_optimizer_of_another_model_flips_nothing():
    model, session = optimized(Tiny(), freeze_rate=0.5)
    model(*tokens()).backward()
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert session.steps == 0 and all(model.get_parameter(n).grad is not None for n in session.gates.open)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_flips_nothing(fused):
    """A fused optimizer is called all the same, and its kernel does nothing."""
    model, session = optimized(Tiny(), freeze_rate=0.6)
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
    model, session = optimized(Tiny(dropout=0.0), freeze_rate=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = model(*tokens())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0] and session.steps == 8


@pytest.mark.parametrize("kind", OPTIMIZERS)
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
    assert any(d < 2**20 for d in session.scheduler.distances.values())
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
    model, session = optimized(Tiny(), freeze_rate=0.5)
    for number in range(5):
        model.zero_grad()
        model(*tokens(number)).backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= 0.1 * param.grad
        session.step()
    assert session.steps == 5 and len({chosen for _, chosen in session.gates.history}) > 1
    assert any(d < 2**20 for d in session.scheduler.distances.values())


def step_and_clear(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_inside_backward():
    model, session = optimized(Tiny(), freeze_rate=0.5, scheduler="random")
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
    model, session = optimized(Tiny())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    del model, session
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    before = len(_global_optimizer_pre_hooks)
    for _ in range(8):
        optimized(Tiny())
        gc.collect()
    assert len(_global_optimizer_pre_hooks) <= before + 2, "hooks of models that are gone must not pile up"


@pytest.mark.parametrize("undo", [False, True])
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


# ---- evaluation, undoing, copying


def test_evaluation_is_left_alone():
    model, session = optimized(Tiny())
    plain = Tiny()
    data, _ = tokens()
    with torch.no_grad():
        torch.manual_seed(1)
        ours = model(data)
        torch.manual_seed(1)
        assert torch.equal(ours, plain(data)), "training mode without gradients runs eagerly"
    assert torch.equal(model.eval()(data), plain.eval()(data))
    with torch.inference_mode():
        assert torch.equal(model(data), plain(data))
    assert session.compiles == 0 and not session.gates.history
    step(model.train(), model, tokens())
    assert torch.equal(model.eval()(data), plain(data))
    assert session.compiles == 1


def test_evaluation_between_forward_and_backward():
    model, session, compiled, reference = pair()
    torch.manual_seed(1)
    loss = model(*tokens())
    with torch.no_grad():
        model.eval()(tokens(5)[0])
    model.train()
    loss.backward()
    _, expected = step(compiled, reference, tokens())
    assert differences(expected, grads_of(model), closed=session.gates.closed) == []


@pytest.mark.parametrize(("executor", "by_inductor"), [("interpreter", 0), ("inductor", 1)])
def test_compile_eval(monkeypatch, executor, by_inductor):
    """Evaluation is compiled once, and Inductor is asked for nothing where the interpreter is used."""
    asked = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: asked.append(gm) or gm.forward)
    monkeypatch.setattr(slimfit_fx.api, "has_compiler", lambda device: None)
    torch._dynamo.utils.counters.clear()
    model, session = optimized(Tiny(), executor=executor, compile_eval=True)
    data, _ = tokens()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.eval()(data), Tiny().eval()(data))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (session.executor, len(asked), session.compiles) == (executor, by_inductor, 0)


def test_compile_eval_and_training_compile_one_graph_each():
    model, session = optimized(Tiny(), compile_eval=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch._dynamo.utils.counters.clear()
    for number in range(3):
        train(model.train(), optimizer, [number])
        plain = Tiny().eval()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens()[0]), plain(tokens()[0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert (session.compiles, session.recompiles) == (1, 0)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.thorough)])
def test_generate_gives_the_same_tokens_and_compiles_nothing(name):
    pytest.importorskip("transformers")
    size = {"n_layer" if name == "gpt2" else "num_hidden_layers": 1}
    model, session = optimized(hf_models.build(name, **size), freeze_rate=0.5)
    plain, batch = hf_models.build(name, **size), hf_models.batch(name)
    optimizer, graphs = torch.optim.AdamW(model.parameters(), lr=1e-2), 0

    def generated(net):
        torch.manual_seed(2)
        prompt = batch["input_ids"][:, :5]
        return net.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=True)

    for number in range(2):
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        plain.load_state_dict(model.state_dict())
        assert torch.equal(generated(model), generated(plain))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
        step(model.train(), model, batch, seed=number)
        optimizer.step()
        graphs = graphs or session.compiles
    assert (session.compiles, session.recompiles, session.steps) == (graphs, 0, 2)


def test_config_and_saved_folder_are_those_of_the_model_without_us(tmp_path):
    transformers = pytest.importorskip("transformers")
    plain, model = (hf_models.build("bert", num_hidden_layers=1) for _ in range(2))
    config = model.config.to_dict()
    optimized(model)
    assert model.config.to_dict() == config
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "plain")
    step(model, model, hf_models.batch("bert"))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "trained")
    files, before = contents(tmp_path / "trained"), contents(tmp_path / "plain")
    assert files.keys() == before.keys() and files["config.json"] == before["config.json"]
    assert files["model.safetensors"] != before["model.safetensors"]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_restore():
    hooks = _global_optimizer_pre_hooks.keys() | _global_optimizer_post_hooks.keys()
    model, session = optimized(Tiny(), freeze_rate=0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert slimfit_fx.restore(model) is model
    assert _global_optimizer_pre_hooks.keys() | _global_optimizer_post_hooks.keys() <= hooks
    plain = Tiny()
    plain.load_state_dict(model.state_dict())
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(plain, plain, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads) == []
    with pytest.raises(ValueError, match="was not optimized"):
        slimfit_fx.session(model)
    model, session = optimized(model, freeze_rate=0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    assert session.steps == 2


def test_the_model_keeps_its_face(tmp_path):
    plain = Tiny()
    keys, attributes, kind = list(plain.state_dict()), set(vars(plain)), type(plain)
    model, _ = optimized(plain)
    assert model is plain and type(model) is kind and list(model.state_dict()) == keys
    assert set(vars(model)) - attributes <= {"_compiled_call_impl"}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(1))
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_parameters()] == keys
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    Tiny().load_state_dict(torch.load(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_plain_model(duplicate):
    model, session = optimized(Tiny(), freeze_rate=0.5)
    step(model, model, tokens())
    double = duplicate(model)
    with pytest.raises(ValueError, match="was not optimized"):
        slimfit_fx.session(double)
    plain = Tiny()
    loss, grads = step(double, double, tokens())
    expected_loss, expected = step(plain, plain, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads) == []
    assert session.compiles == 1
    again, other = optimized(double, freeze_rate=0.5)
    step(again, again, tokens())
    assert other.gates.closed and session.compiles == 1


def test_two_models_of_one_class_do_not_share_gates():
    first, one = optimized(Tiny(), scheduler="none", preset="exact")
    second, two = optimized(Tiny(), scheduler="none", preset="exact")
    one.freeze("blocks.0.*")
    two.freeze("blocks.1.*")
    reference = Tiny()
    _, expected = step(compile_reference(reference), reference, tokens())
    for model, session in ((first, one), (second, two), (first, one)):
        assert differences(expected, step(model, model, tokens())[1], closed=session.gates.closed) == []
    assert one.gates.closed != two.gates.closed and (one.recompiles, two.recompiles) == (0, 0)


def test_an_optimized_part_inside_a_plain_model():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = Tiny(), nn.Linear(5, 2)

        def forward(self, data):
            return self.tail(self.body(data)).square().mean()

    torch.manual_seed(0)
    whole, plain = Whole(), Whole()
    plain.load_state_dict(whole.state_dict())
    _, session = optimized(whole.body, preset="exact", scheduler="none")
    session.freeze("blocks.*")
    plain_body = compile_reference(plain.body)
    torch.manual_seed(1)
    plain.tail(plain_body(tokens()[0])).square().mean().backward()
    _, grads = step(whole, whole, (tokens()[0],))
    assert differences(grads_of(plain), grads, closed={f"body.{n}" for n in session.gates.closed}) == []


# ---- hooks, modes, checkpointing


@pytest.mark.parametrize("mode", ["hooks", "save_on_cpu", "anomaly"])
def test_what_reads_saved_tensors_reads_no_ghost(mode):
    def context():
        return {
            "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
            "save_on_cpu": torch.autograd.graph.save_on_cpu,
            "anomaly": torch.autograd.detect_anomaly,
        }[mode]()

    model, session, compiled, reference = pair()
    step(model, model, tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with context():
            loss, grads = step(model, model, tokens())
    expected_loss, expected = step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss)
    assert differences(expected, grads, closed=session.gates.closed) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_model(reentrant):
    model, session, compiled, reference = pair()
    x = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient

    def run(call):
        return lambda data, labels, x: call(data, labels) + 0 * x

    torch.manual_seed(1)
    checkpoint(run(model), *tokens(), x, use_reentrant=reentrant).backward()
    _, expected = step(compiled, reference, tokens())
    assert differences(expected, grads_of(model), closed=session.gates.closed) == []


def test_checkpointing_inside_the_model():
    class Checkpointed(Tiny):
        def features(self, data):
            x = self.embed(data)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    for closed in ((), ("blocks.0.qkv.weight", "blocks.1.*")):
        model, session, compiled, reference = pair(make=Checkpointed, closed=closed)
        loss, grads = step(model, model, tokens())
        expected_loss, expected = step(compiled, reference, tokens())
        assert equal_bits(loss, expected_loss)
        assert differences(expected, grads, closed=session.gates.closed) == []


@pytest.mark.parametrize("preset", ["exact", "balanced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(preset, dtype):
    model, session, compiled, reference = pair(preset=preset)
    with torch.autocast("cpu", dtype):
        loss, grads = step(model, model, tokens())
        expected_loss, expected = step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss)
    if preset == "exact":
        assert differences(expected, grads, closed=session.gates.closed) == []
    assert all(g is None or (g.dtype == torch.float32 and g.isfinite().all()) for g in grads.values())


@pytest.mark.inductor
def test_a_convolution_under_autocast():
    """Its weight gradient is cast behind it; Inductor picks the layout, so that it cannot end a branch."""
    torch.manual_seed(0)
    patches = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, stride=4), torch.nn.Flatten(), torch.nn.Linear(256, 5))
    model, session = optimized(patches, executor="inductor", preset="balanced", scheduler="none", units=["0.weight"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 16, 16)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    session.freeze("0.weight")
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        model(torch.randn(4, 3, 16, 16)).float().square().mean().backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None


def test_a_bfloat16_model():
    trains_in(torch.bfloat16)


def test_a_float16_model():
    trains_in(torch.float16)


def trains_in(dtype: torch.dtype) -> None:
    """A model of this element type has the gradients of the reference, and close ones when it is compressed."""
    try:
        step(plain := Tiny().to(dtype), plain, tokens())
    except RuntimeError as error:
        pytest.skip(f"this torch cannot train a model of {dtype} on a CPU: {error}")
    some = {"make": lambda: Tiny(depth=1).to(dtype), "closed": ("blocks.0.qkv.weight", "embed.weight")}
    model, session, compiled, reference = pair(**some)
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    model, session, *_ = pair(**some, preset="balanced")
    loss, grads = step(model, model, tokens())
    assert equal_bits(loss, expected_loss) and cosine(expected, grads) > 0.99
    assert {g.dtype for g in grads.values() if g is not None} == {dtype}
    assert any(row.decision.startswith("codec") and row.codec == "int8" for row in session.plan.rows)


def test_hooks_on_parameters_see_gradients_of_open_units():
    model, session, compiled, reference = pair()
    step(compiled, reference, tokens())
    seen: dict[str, int] = {}
    for name, param in model.named_parameters():
        param.register_hook(lambda g, name=name: seen.__setitem__(name, 1) if g is not None else None)
    _, grads = step(model, model, tokens())
    assert differences(grads_of(reference), grads, closed=session.gates.closed) == []
    assert set(seen) == {n for n, _ in model.named_parameters()} - session.gates.closed


def test_module_hooks_run():
    model, session, compiled, reference = pair()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    loss, grads = step(model, model, tokens())
    _, expected = step(compiled, reference, tokens())
    assert calls == ["forward"] and differences(expected, grads, closed=session.gates.closed) == []


def test_a_parameter_frozen_by_the_user_stays_frozen():
    model, session, compiled, reference = pair(closed=())
    step(model, model, tokens())
    for net in (model, reference):
        net.get_parameter("blocks.0.up.weight").requires_grad_(False)
    _, grads = step(model, model, tokens())
    _, expected = step(compiled, reference, tokens())
    assert grads["blocks.0.up.weight"] is None and differences(expected, grads) == []


def test_deterministic_mode():
    model, session, compiled, reference = pair()
    torch.use_deterministic_algorithms(True)
    try:
        _, grads = step(model, model, tokens())
        _, expected = step(compiled, reference, tokens())
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(expected, grads, closed=session.gates.closed) == []


# ---- shapes and graphs


def test_changing_batch_sizes_compile_twice_at_most():
    model, session, compiled, reference = pair()
    for number, (batch, length) in enumerate([(4, 8), (6, 8), (3, 8), (9, 8), (5, 8)]):
        data = tokens(number, batch, length)
        loss, grads = step(model, model, data)
        expected_loss, expected = step(compiled, reference, data)
        assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert session.compiles == 2 and session.recompiles == 1, "static first, then dynamic once and for all"


def test_dynamic_shapes_from_the_start():
    model, session, _, reference = pair(dynamic=True, preset="balanced", closed=())
    exact, _ = optimized(Tiny(), preset="exact", scheduler="none", dynamic=True)
    for number, (batch, length) in enumerate([(4, 8), (6, 12), (3, 5)]):
        data = tokens(number, batch, length)
        (loss, grads), (expected_loss, expected) = step(model, model, data), step(exact, exact, data)
        assert equal_bits(loss, expected_loss)
        assert all(
            torch.nn.functional.cosine_similarity(grads[n].flatten(), expected[n].flatten(), dim=0) > 0.98
            for n in grads
        )
    assert session.compiles == 1


class Broken(Tiny):
    """A graph break between the two blocks, where dynamo can resume."""

    def forward(self, data, labels=None):
        x = self.blocks[0](self.embed(data))
        torch._dynamo.graph_break()
        logits = self.head(self.norm(self.blocks[1](x)).mean(dim=1))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


def test_graph_breaks():
    model, session, compiled, reference = pair(make=Broken)
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert session.compiles == 2 and session.recompiles == 0
    assert {u.name for u in session.plan.units if u.gated} == set(session.gates.names)


def test_graph_breaks_under_ils_compile_once_per_graph():
    model, session = optimized(Broken())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(10))
    assert (session.compiles, session.recompiles) == (2, 0)


class Skipped(Tiny):
    """A graph break inside a loop: dynamo runs this function eagerly and compiles the blocks, all with one graph."""

    def features(self, data):
        x = self.embed(data)
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def test_one_graph_serves_all_blocks_and_what_runs_eagerly_stands_still_too():
    model, session, compiled, reference = pair(make=Skipped, closed=("blocks.0.qkv.weight", "blocks.1.*"))
    for _ in range(2):
        loss, grads = step(model, model, tokens())
        expected_loss, expected = step(compiled, reference, tokens())
        assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
        session.unfreeze("blocks.1.*")
    session.freeze("embed.weight")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    before = model.embed.weight.detach().clone()
    train(model, optimizer, range(2))
    assert torch.equal(before, model.embed.weight), "no gate, but no step either"
    reasons = {u.name: u.reason for u in session.plan.units if not u.gated}
    assert reasons["embed.weight"] == "no gradient of it was found in any captured graph"


def said_by_us(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "slimfit_fx"]


def test_units_without_a_gate_are_told_once_with_the_reason(caplog):
    """A convolution that reads the batch: its gradient ends in no branch."""
    torch.manual_seed(0)
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(128, 5))
    model, _ = optimized(patches, units=["0.weight", "2.weight"], freeze_rate=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(4, 3, 16, 16)
    for micro in range(2):
        model(images).square().mean().backward()
        assert not said_by_us(caplog), f"another graph may follow (micro-batch {micro})"
    for _ in range(3):
        optimizer.step()
        model(images).square().mean().backward()
    (said,) = said_by_us(caplog)
    assert said.startswith("1 of 2 units have no gate") and "2.weight" not in said
    assert "frozen: 0.weight (its gradient costs nothing of its own" in said


@pytest.mark.parametrize("make", [Tiny, Broken, Skipped])
def test_nothing_is_told_of_units_that_have_a_gate_or_run_eagerly(make, caplog):
    model, _ = optimized(make(), preset="balanced")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert not said_by_us(caplog)


def test_a_unit_has_its_gate_in_one_graph_of_several():
    def graph(names, gated, *refusals):
        plan = GraphPlan((), tuple((f"gate {gate}", why) for gate, why in refusals), gated)
        return CapturedGraph(names, False, plan=plan)

    nothing = "it receives no gradient in this graph"
    graphs = [graph(("a", "b", "c"), (), (0, "views"), (1, "views"), (2, nothing)), graph(("a",), (0,))]
    graphs.append(CapturedGraph(("d",), False, plan=None))
    session = types.SimpleNamespace(backend=types.SimpleNamespace(graphs=graphs))
    assert ungated_units(session) == {"b": "views"}


# ---- leaving torch as it was, and bad luck


@pytest.mark.parametrize("executor", ["interpreter", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_global_configuration_is_left_as_it_was(executor):
    with unchanged_configuration():
        model, _ = optimized(Tiny(depth=1), executor=executor)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
        slimfit_fx.restore(model)


@pytest.mark.parametrize("scheduler", ["random", "ils"])
def test_scheduling_draws_no_random_numbers(scheduler):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, session = optimized(Tiny(dropout=0.0), scheduler=scheduler, distance_sample=64)
    torch.manual_seed(5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "broken",
    [
        *("insert_gates", "split_joint"),
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("insert_codecs", "tag_liveness")),
    ],
)
def test_a_pass_that_fails_costs_memory_only(monkeypatch, broken):
    from slimfit_fx.passes import pipeline

    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("no luck today")

    monkeypatch.setattr(pipeline, broken, fail)
    model, session, compiled, reference = pair(strict=False)
    with pytest.warns(RuntimeWarning, match="no luck today"):
        loss, grads = step(model, model, tokens())
    expected_loss, expected = step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert any("no luck today" in note for note in session.plan.notes)
    with pytest.raises(Exception, match="no luck today"):
        strict, _ = optimized(Tiny())
        strict(*tokens())


def test_a_lowering_that_fails_costs_speed_only(monkeypatch):
    from slimfit_fx.capture import backend

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(backend, "lower_with_interpreter", fail)
    model, session = optimized(Tiny(dropout=0.0), strict=False, scheduler="none")
    session.freeze("blocks.*")
    plain = Tiny(dropout=0.0)
    with pytest.warns(RuntimeWarning, match="no compiler today"):
        loss, grads = step(model, model, tokens())
    _, expected = step(plain, plain, tokens())
    assert {n for n, g in grads.items() if g is None} == session.gates.closed
    for name in grads.keys() - session.gates.closed:
        torch.testing.assert_close(grads[name], expected[name])


class Disabled(Tiny):
    """A forward that dynamo skips without a word."""

    @torch.compiler.disable
    def forward(self, data, labels):
        return super().forward(data, labels)


@pytest.mark.parametrize("make", [Broken, Disabled])
def test_a_forward_that_cannot_be_captured_is_told_once_with_its_place(make):
    model = slimfit_fx.optimize(make(), executor="interpreter")
    with warnings.catch_warnings(record=True) as told, torch._dynamo.error_on_graph_break(make is Broken):
        warnings.simplefilter("always")
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    ours = [w for w in told if "slimfit_fx:" in str(w.message)]
    assert [(w.category, w.filename) for w in ours] == [(RuntimeWarning, __file__)], "once, at the call of the model"
    said, line = str(ours[0].message), make.forward.__code__.co_firstlineno
    assert "trains uncompressed" in said
    if make is Broken:
        assert "graph_break()" in said and f'File "{__file__}", line {line + 2}, in forward' in said
    else:
        line = make.forward.__wrapped__.__code__.co_firstlineno
        assert "captured no graph" in said
    assert f"{make.__name__}.forward ({__file__}:{line})" in said


def test_a_forward_that_cannot_be_captured_trains_uncompressed():
    model = Broken(dropout=0.0)
    slimfit_fx.optimize(model, executor="interpreter")
    with torch._dynamo.error_on_graph_break(True), pytest.warns(RuntimeWarning, match="cannot be captured and trains"):
        loss, grads = step(model, model, tokens())
    plain = Broken(dropout=0.0)
    expected_loss, expected = step(plain, plain, tokens())
    closed = slimfit_fx.session(model).gates.closed
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=closed) == []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {n: model.get_parameter(n).detach().clone() for n in slimfit_fx.session(model).gates.closed}
    train(model, optimizer, range(1))
    assert before and all(torch.equal(before[n], model.get_parameter(n)) for n in before)
    strict, _ = optimized(Broken())
    with torch._dynamo.error_on_graph_break(True), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        strict(*tokens())


def test_ghosts_are_dropped_with_their_graph():
    model, session, *_ = pair(closed=("*",))
    losses = [model(*tokens(number)) for number in range(3)]
    del losses
    loss, _ = step(model, model, tokens())
    assert loss.isfinite()


@pytest.mark.parametrize(
    "pattern", [*range(3), *(pytest.param(number, marks=pytest.mark.thorough) for number in range(3, 6))]
)
def test_any_pattern_of_gates_in_nan_mode(pattern):
    model, session, compiled, reference = pair(debug=True, closed=())
    names = session.gates.names
    session.freeze([n for i, n in enumerate(names) if i % (pattern + 2) == 0])
    (loss, grads), (expected_loss, expected) = step(model, model, tokens()), step(compiled, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []


@pytest.mark.parametrize(("value", "debug"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_turns_debug_mode_on(monkeypatch, caplog, value, debug):
    """The graphs are then logged after each pass (and ghosts hold NaN, as every test of debug mode wants it)."""
    if value is None:
        monkeypatch.delenv("SLIMFIT_FX_DEBUG", raising=False)
    else:
        monkeypatch.setenv("SLIMFIT_FX_DEBUG", value)
    caplog.set_level("INFO", logger="slimfit_fx.passes.graphs")
    model, session = optimized(Tiny(depth=0))
    model(*tokens())
    assert session.config.debug is debug
    dumped = [line.split(":")[0] for line in caplog.messages if line.startswith("after ")]
    assert bool(dumped) == debug and (not debug or {"after split_joint", "after insert_gates"} <= set(dumped))


def test_flipping_never_compiles():
    model, session = optimized(Tiny(), scheduler="none", preset="exact")
    expected = step(model, model, tokens())[1]
    expected = {n: g.clone() for n, g in expected.items()}
    for name, other in itertools.pairwise(session.gates.names):
        session.unfreeze()
        session.freeze([name, other])
        assert differences(expected, step(model, model, tokens())[1], closed={name, other}) == []
    assert (session.compiles, session.recompiles) == (1, 0)
