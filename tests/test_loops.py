"""Training loops of other people: Accelerate, Lightning, schedulers of learning rates, exotic optimizers, averages."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import digits
import pytest
import torch
from distributed_worker import Watch
from effort import first
from reference import compile_reference, differences, equal_bits, optimized, step
from small_models import Tiny, optimizer_state, same_state, tokens
from torch import nn
from tower import Tower, rows
from training_loops import train

import slimfit_fx

SETTINGS: dict[str, Any] = {"executor": "interpreter", "min_bytes": 256}


def plain_run(model: nn.Module, optimizer: Any, steps: int = 8, first: int = 0) -> list[float]:
    return train(model, optimizer, range(first, first + steps))


# ---- optimizers and learning rates


class OwnAdamW(torch.optim.AdamW):
    """A subclass of a subclass, whose step is its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["steps"] = state.get("steps", 0) + 1
                    param.mul_(1 - group["lr"] * 0.1).sub_(group["lr"] * param.grad.sign())


class EightBitAdamW(torch.optim.Optimizer):
    """Its two moments are a byte per element, and one fp32 scale per block of elements; floats only while it steps."""

    BLOCK = 64
    LARGEST = {torch.int8: 127, torch.uint8: 255}

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    def encoded(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = nn.functional.pad(x.flatten(), (0, -x.numel() % self.BLOCK)).view(-1, self.BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / self.LARGEST[dtype]
        return (blocks / scale).round().to(dtype), scale

    def decoded(self, state: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in state:
            return torch.zeros_like(like)
        return (state[name].float() * state[f"{name}_scale"]).flatten()[: like.numel()].view_as(like)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state, moments = self.state[param], {}
                for name, value, keep, dtype in (
                    ("mean", param.grad, 0.9, torch.int8),
                    ("square", param.grad.square(), 0.99, torch.uint8),
                ):
                    moments[name] = torch.lerp(value, self.decoded(state, name, param), keep)
                    state[name], state[f"{name}_scale"] = self.encoded(moments[name], dtype)
                update = (moments["mean"] / (moments["square"].sqrt() + 1e-8)).clamp_(-1, 1)
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


MAKERS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "subclass": lambda p: OwnAdamW(p, lr=1e-2),
    "8-bit": lambda p: EightBitAdamW(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize(
    ("kind", "set_to_none"),
    first(
        [
            ("foreach", False),
            ("8-bit", False),
            ("adafactor", True),
            ("fused", False),
            ("subclass", False),
            ("foreach", True),
        ],
        3,
    ),
)
def test_no_optimizer_moves_a_closed_unit(kind, set_to_none):
    model, session = optimized(Tiny(depth=1), freeze_rate=0.6)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "lr": 2e-2},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = MAKERS[kind](groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    for number in range(6):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(*tokens(number)).backward()
        params = dict(model.named_parameters())
        before = {name: (p.detach().clone(), optimizer_state(optimizer, p)) for name, p in params.items()}
        optimizer.step()
        schedule.step()
        moved = {name for name, p in params.items() if not torch.equal(before[name][0], p)}
        noted = {name for name, p in params.items() if not same_state(before[name][1], optimizer_state(optimizer, p))}
        assert not (moved | noted) & session.gates.closed and session.gates.open <= moved & noted
    assert session.steps == 6 and len({opened for _, opened in session.gates.history}) > 2
    if kind == "8-bit":
        held = [t for state in optimizer.state.values() for t in state.values()]
        assert {t.dtype for t in held} == {torch.int8, torch.uint8, torch.float32}
        assert session.plan.optimizer_bytes == sum(t.nbytes for t in held)


@pytest.mark.parametrize("kind", ["AdamW8bit", pytest.param("AdamW4bit", marks=pytest.mark.thorough)])
def test_quantized_optimizer_state_of_closed_units_stands_still(kind):
    """torchao's optimizers, whose state is a tensor of a kind of its own."""
    optimizers = pytest.importorskip("torchao.optim")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    model, session = optimized(model, freeze_rate=0.5)
    optimizer = getattr(optimizers, kind)(model.parameters(), lr=1e-2)

    def state(param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        plain = optimizer.state.get(param, {})
        return {
            key: v.dequantize() if "Opt" in type(v).__name__ else torch.as_tensor(v).clone() for key, v in plain.items()
        }

    for _ in range(6):
        model(torch.randn(8, 64)).square().mean().backward()
        before = {name: (param.detach().clone(), state(param)) for name, param in model.named_parameters()}
        closed, opened = session.gates.closed, session.gates.open
        optimizer.step()
        optimizer.zero_grad()
        for name, param in model.named_parameters():
            weight, earlier = before[name]
            if name in closed:
                assert torch.equal(weight, param)
                assert all(torch.equal(value, earlier[key]) for key, value in state(param).items() if key in earlier)
            elif name in opened:
                assert not torch.equal(weight, param)
    assert session.steps == 6 and session.recompiles == 0
    weights = sum(param.numel() for param in model.parameters() if param.numel() >= 4096)
    held = session.plan.optimizer_bytes
    assert weights < held < 4 * weights, "two moments of at most a byte each, where fp32 takes eight"


def test_a_resumed_optimizer_without_its_schedule_says_so():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain_run(model, optimizer, 2)
    state, schedule = optimizer.state_dict(), session.state_dict()
    again, _ = optimized(Tiny(depth=1), freeze_rate=0.5)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    other.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="the schedule starts again"):
        plain_run(again, other, 2)
    once_more, resumed = optimized(Tiny(depth=1), freeze_rate=0.5)
    whole = torch.optim.AdamW(once_more.parameters(), lr=1e-2)
    whole.load_state_dict(state)
    resumed.load_state_dict(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        plain_run(once_more, whole, 1)


# ---- copies, moves, files


@pytest.mark.parametrize(
    ("kind", "earlier"),
    [("EMA", 0), ("SWA", 2), *(pytest.param(*given, marks=pytest.mark.thorough) for given in (("EMA", 2), ("SWA", 0)))],
)
def test_averages_of_an_optimized_model(kind, earlier):
    """``earlier``: steps of training before there is an average."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain_run(model, optimizer, earlier)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if kind == "EMA" else AveragedModel(model)
    plain = Tiny(depth=1).eval()
    expected = dict(plain.named_parameters())
    for number in range(3):
        plain_run(model, optimizer, 1, earlier + number)
        average.update_parameters(model)
        share = {"EMA": 0.5 if number else 1.0, "SWA": 1 / (number + 1)}[kind]
        with torch.no_grad():
            for name, param in model.named_parameters():
                expected[name].lerp_(param, share)
    assert session.steps == earlier + 3
    for name, param in average.module.named_parameters():
        torch.testing.assert_close(param, expected[name])
    average.module.eval()
    torch.testing.assert_close(average(tokens()[0]), plain(tokens()[0]))
    assert session.compiles == 1 and session.recompiles == 0
    with pytest.raises(ValueError, match="was not optimized"):
        slimfit_fx.session(average.module)


def test_a_saved_model_is_a_plain_model():
    model, _ = optimized(Tiny(depth=1), freeze_rate=0.5)
    step(model, model, tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, plain = torch.load(file, weights_only=False), Tiny(depth=1)
    (loss, grads), (expected_loss, expected) = step(loaded, loaded, tokens()), step(plain, plain, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads) == []


@pytest.mark.parametrize("how", ["to", "overwrite"])
def test_a_model_that_moves_keeps_its_gates(how):
    """``overwrite``: ``to`` makes new parameter objects, as it does for some devices and settings."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", scheduler="none")
    session.freeze("blocks.0.*")
    torch.__future__.set_overwrite_module_params_on_conversion(how == "overwrite")
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    reference = Tiny(depth=1, dropout=0.0).to(torch.float64)
    _, grads = step(model, model, tokens())
    _, expected = step(compile_reference(reference), reference, tokens())
    assert differences(expected, grads, closed=session.gates.closed) == []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    before = {name: model.get_parameter(name).detach().clone() for name in session.gates.closed}
    plain_run(model, optimizer, 3)
    assert session.steps == 3, "the new parameters' optimizer is noticed"
    assert before and all(torch.equal(before[name], model.get_parameter(name)) for name in before)


def test_a_parameter_that_is_replaced_keeps_its_gate():
    """As when a vocabulary is resized after ``optimize``."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", scheduler="none")
    step(model, model, tokens())
    model.embed = nn.Embedding.from_pretrained(
        torch.cat([model.embed.weight.detach(), torch.ones(3, 16)]), freeze=False
    )
    step(model, model, tokens())
    assert model.embed.weight.grad is not None
    session.freeze("embed.weight")
    _, grads = step(model, model, tokens())
    assert grads["embed.weight"] is None and grads["blocks.0.up.weight"] is not None


@pytest.mark.parametrize("swap", ["the module", "a module above it", "the table of its parameters"])
def test_what_was_swapped_between_two_steps_is_noticed(swap):
    """Nobody looks at every parameter in each step: what is on the way to them is asked whether it is still there."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", scheduler="none")
    for _ in range(2):
        step(model, model, tokens())
    if swap == "the module":
        model.blocks[0].up = nn.Linear(*reversed(model.blocks[0].up.weight.shape))
    elif swap == "a module above it":
        model.blocks = nn.ModuleList([copy.deepcopy(model.blocks[0])])
    else:
        model.blocks[0].up._parameters = copy.deepcopy(model.blocks[0].up._parameters)
    session.freeze("blocks.0.up.weight")
    _, grads = step(model, model, tokens())
    assert session.gates.params_of("blocks.0.up.weight") == (model.blocks[0].up.weight,)
    assert grads["blocks.0.up.weight"] is None and grads["embed.weight"] is not None


def test_a_copy_of_an_optimized_model_can_be_optimized_apart():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    plain_run(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    double, other = optimized(copy.deepcopy(model), freeze_rate=0.5)
    plain_run(double, torch.optim.SGD(double.parameters(), lr=0.1), 3)
    assert (session.steps, other.steps) == (2, 3)


# ---- Accelerate


def accelerator(**settings: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **settings)


def batches(count: int) -> Any:
    data = [tokens(number, 1) for number in range(count)]
    whole = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
    return torch.utils.data.DataLoader(whole, batch_size=4)


def accumulate(ours: Any, net: Any, optimizer: Any, loader: Any, schedule: Any = None) -> None:
    """A loop as Accelerate's users write it: accumulation and clipping."""
    for batch in loader:
        with ours.accumulate(net):
            ours.backward(net(*batch))
            if ours.sync_gradients:
                ours.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("order", first(["before prepare", "after prepare"]))
def test_an_accelerate_loop(order, tmp_path):
    """Accumulation, bf16, clipping, a learning-rate schedule; saved by Accelerate and resumed bit for bit."""

    def start() -> tuple[Any, ...]:
        ours = accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
        model = Tiny(depth=1)
        if order == "before prepare":
            optimized(model, freeze_rate=0.6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        net, optimizer, loader, schedule = ours.prepare(model, optimizer, batches(32), schedule)
        if order == "after prepare":
            optimized(ours.unwrap_model(net), freeze_rate=0.6)
        session = slimfit_fx.session(ours.unwrap_model(net))
        ours.register_for_checkpointing(session)
        return ours, net, optimizer, loader, schedule, session

    torch.manual_seed(3)
    *parts, session = start()
    watch = Watch(parts[0].unwrap_model(parts[1]), session, parts[2].optimizer)
    accumulate(*parts)
    parts[0].save_state(str(tmp_path / "state"))
    accumulate(*parts)
    assert session.steps == 8 and session.recompiles == 0
    assert watch.looked and watch.moved == [] and watch.gradients == []
    *again, resumed = start()
    again[0].load_state(str(tmp_path / "state"))
    accumulate(*again)
    assert resumed.state_dict() == session.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(parts[1].parameters(), again[1].parameters(), strict=True))


@pytest.mark.inductor
@pytest.mark.thorough
def test_an_accelerate_loop_with_the_default_executor():
    prepared, model = accelerator(mixed_precision="bf16"), Tower()
    slimfit_fx.optimize(model, freeze_rate=0.5, min_bytes=256, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.DataLoader(rows(48)[0], batch_size=8)
    net, optimizer, loader = prepared.prepare(model, optimizer, data)
    session = slimfit_fx.session(model)
    watch = Watch(model, session, optimizer.optimizer)
    for batch in loader:
        optimizer.zero_grad()
        prepared.backward(net(batch))
        prepared.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    assert (session.executor, session.steps, session.compiles, session.recompiles) == ("inductor", 6, 1, 0)
    assert watch.looked and watch.moved == [] and watch.gradients == []


def digits_in_half_of_the_memory(*, prepare: bool) -> None:
    """With Accelerate's ``prepare``, or without."""

    def run(seed: int, ours: bool) -> tuple[float, int]:
        model = digits.pretrained()
        if ours:
            slimfit_fx.optimize(model, **digits.OURS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=digits.RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=digits.STEPS)
        pixels, labels = digits.arrays()
        data = torch.utils.data.TensorDataset(pixels[: digits.TRAIN], labels[: digits.TRAIN])
        order = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, digits.SIZE, shuffle=True, generator=order)
        net, backward = model, torch.Tensor.backward
        if prepare:
            prepared = accelerator()
            net, optimizer, loader, schedule = prepared.prepare(model, optimizer, loader, schedule)
            backward = prepared.backward
        for _ in range(digits.EPOCHS):
            for batch in loader:
                optimizer.zero_grad()
                backward(net(*batch)["loss"])
                optimizer.step()
                schedule.step()
        return digits.accuracy(model), digits.peak(model)

    ours, our_peak = digits.mean_accuracy(lambda seed: run(seed, True))
    plain, plain_peak = digits.mean_accuracy(lambda seed: run(seed, False))
    assert ours >= plain - 0.01 and 2 * our_peak <= plain_peak, (ours, plain, our_peak, plain_peak)


@pytest.mark.slow
@pytest.mark.thorough
def test_accelerate_to_an_accuracy_in_half_of_the_memory():
    digits_in_half_of_the_memory(prepare=True)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_plain_loop_to_an_accuracy_in_half_of_the_memory():
    digits_in_half_of_the_memory(prepare=False)


# ---- what is logged


@pytest.mark.inductor
def test_the_logged_peak_is_that_of_the_gates_of_now():
    from slimfit_fx.integrations.metrics import step_metrics

    model, session = optimized(Tower(), executor="inductor", preset="exact", scheduler="none")
    assert step_metrics(session) == {"slimfit/frozen_share": 0.0, "slimfit/recompiles": 0}
    found = []
    for closed in ((), ("*",)):
        session.unfreeze()
        session.freeze(closed)
        step(model, model, rows(512))
        found.append(step_metrics(session))
        assert found[-1]["slimfit/step_peak_bytes"] == session.predict_peak().peak_bytes > 0
    assert found[0]["slimfit/step_peak_bytes"] > found[1]["slimfit/step_peak_bytes"]
    assert found[1]["slimfit/frozen_share"] == 1.0 and found[1]["slimfit/recompiles"] == 0


# ---- torch.compile around the model


def test_torch_compile_of_an_optimized_model():
    """As accelerate does it for torch_compile=True: the graph breaks at the model, which compiles itself."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", scheduler="none")
    session.freeze("blocks.0.*")
    reference = Tiny(depth=1, dropout=0.0)
    loss, grads = step(torch.compile(model, backend="eager"), model, tokens())
    expected_loss, expected = step(compile_reference(reference), reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert session.compiles == 1 and all(unit.gated for unit in session.plan.units)
    with torch.no_grad():
        model.eval()
        assert torch.equal(torch.compile(model, backend="eager")(tokens()[0]), reference.eval()(tokens()[0]))


def test_a_compiled_function_around_an_optimized_model_says_so():
    """Dynamo inlines the model into such a function and never calls it: training is right, but as if without us."""
    model, _ = optimized(Tiny(depth=1, dropout=0.0), freeze_rate=0.5)
    reference = Tiny(depth=1, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, grads = step(torch.compile(lambda *batch: 2 * model(*batch), backend="eager"), model, tokens())
    _, expected = step(lambda *batch: 2 * reference(*batch), reference, tokens())
    assert differences(expected, grads) == []
    with pytest.warns(RuntimeWarning, match="the model itself was never called in training"):
        optimizer.step()


def test_a_step_that_only_makes_optimizer_state_is_no_step():
    """torch.distributed.checkpoint steps with a learning rate of 0 to have something to load into."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, session = optimized(Tiny(depth=1), freeze_rate=0.6)
    plain_run(model, torch.optim.AdamW(model.parameters()), 2)
    state = session.state_dict()
    again, resumed = optimized(Tiny(depth=1), freeze_rate=0.6)
    resumed.load_state_dict(state)
    optimizer = torch.optim.AdamW(again.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = get_optimizer_state_dict(again, optimizer)
    assert resumed.state_dict() == state and len(optimizer.state) == len(list(again.parameters()))
    assert found["state"].keys() == {name for name, _ in again.named_parameters()}
