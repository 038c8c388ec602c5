"""What happens beside training: plans without a step, evaluation, copies, hooks, checkpointing, half precision."""

from __future__ import annotations

import copy
import pickle
import warnings

import hf_models
import pytest
import torch
from effort import first
from reference import compile_reference, cosine, differences, equal_bits, optimized, step
from small_models import Tiny, tokens
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint
from training_loops import grads_of, pair, train

import slimfit_fx
import slimfit_fx.api
from bench.measure import step_peak

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
    first(
        [
            (larger_than_any_machine, 10_000_000),
            (large, 50),
            (lambda: larger_than_any_machine(device="meta"), 10_000_000),
        ]
    ),
    ids=["larger than any machine", "large", "on meta"],
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


# ---- evaluation, undoing, copying


def test_evaluation_is_left_alone():
    model, session = optimized(Tiny(depth=1))
    plain = Tiny(depth=1)
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
    model, session = optimized(Tiny(depth=1), executor=executor, compile_eval=True)
    data, _ = tokens()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.eval()(data), Tiny(depth=1).eval()(data))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (session.executor, len(asked), session.compiles) == (executor, by_inductor, 0)


def test_compile_eval_and_training_compile_one_graph_each():
    model, session = optimized(Tiny(depth=1), compile_eval=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch._dynamo.utils.counters.clear()
    for number in range(3):
        train(model.train(), optimizer, [number])
        plain = Tiny(depth=1).eval()
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
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert slimfit_fx.restore(model) is model
    assert _global_optimizer_pre_hooks.keys() | _global_optimizer_post_hooks.keys() <= hooks
    plain = Tiny(depth=1)
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
    plain = Tiny(depth=1)
    keys, attributes, kind = list(plain.state_dict()), set(vars(plain)), type(plain)
    model, _ = optimized(plain)
    assert model is plain and type(model) is kind and list(model.state_dict()) == keys
    assert set(vars(model)) - attributes <= {"_compiled_call_impl"}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(1))
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_parameters()] == keys
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    Tiny(depth=1).load_state_dict(torch.load(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    "duplicate", first([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]), ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_plain_model(duplicate):
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    step(model, model, tokens())
    double = duplicate(model)
    with pytest.raises(ValueError, match="was not optimized"):
        slimfit_fx.session(double)
    plain = Tiny(depth=1)
    loss, grads = step(double, double, tokens())
    expected_loss, expected = step(plain, plain, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads) == []
    assert session.compiles == 1
    again, other = optimized(double, freeze_rate=0.5)
    step(again, again, tokens())
    assert other.gates.closed and session.compiles == 1


def test_two_models_of_one_class_do_not_share_gates():
    first, one = optimized(Tiny(depth=1), scheduler="none", preset="exact")
    second, two = optimized(Tiny(depth=1), scheduler="none", preset="exact")
    one.freeze("blocks.0.*")
    two.freeze("embed.*")
    reference = Tiny(depth=1)
    _, expected = step(compile_reference(reference), reference, tokens())
    for model, session in ((first, one), (second, two), (first, one)):
        assert differences(expected, step(model, model, tokens())[1], closed=session.gates.closed) == []
    assert one.gates.closed != two.gates.closed and (one.recompiles, two.recompiles) == (0, 0)


def test_an_optimized_part_inside_a_plain_model():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = Tiny(depth=1), nn.Linear(5, 2)

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


@pytest.mark.parametrize("mode", first(["hooks", "save_on_cpu", "anomaly"]))
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


@pytest.mark.parametrize("reentrant", first([False, True]))
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

    model, session, compiled, reference = pair(make=Checkpointed, closed=())
    for closed in ((), ("blocks.0.qkv.weight", "blocks.1.*")):
        session.unfreeze()
        session.freeze(closed) if closed else None
        loss, grads = step(model, model, tokens())
        expected_loss, expected = step(compiled, reference, tokens())
        assert equal_bits(loss, expected_loss)
        assert differences(expected, grads, closed=session.gates.closed) == []


@pytest.mark.parametrize("preset", first(["balanced", "exact"]))
@pytest.mark.parametrize("dtype", first([torch.bfloat16, torch.float16]), ids=["bf16", "fp16"])
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
        step(plain := Tiny(depth=1).to(dtype), plain, tokens())
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
