"""Shapes, graph breaks, and what cannot be captured or rewritten: torch is left as it was, and training goes on."""

from __future__ import annotations

import itertools
import types
import warnings
from typing import Any

import pytest
import torch
from effort import first
from reference import differences, equal_bits, optimized, step, unchanged_configuration
from small_models import Tiny, tokens
from torch import nn
from training_loops import Skipped, pair, train

import slimfit_fx
import slimfit_fx.api
from slimfit_fx.capture import backend
from slimfit_fx.capture.captured import CapturedGraph
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.ungated import ungated_units

# ---- shapes and graphs


def test_changing_batch_sizes_compile_twice_at_most():
    model, session, compiled, reference = pair()
    for number, (batch, length) in enumerate([(4, 8), (6, 8), (3, 8), (9, 8), (5, 8)]):
        data = tokens(number, batch, length)
        loss, grads = step(model, model, data)
        expected_loss, expected = step(compiled, reference, data)
        assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert session.compiles == 2 and session.recompiles == 1, "static first, then dynamic once and for all"


@pytest.mark.thorough
def test_dynamic_shapes_from_the_start():
    model, session, _, reference = pair(dynamic=True, preset="balanced", closed=())
    exact, _ = optimized(Tiny(depth=1), preset="exact", scheduler="none", dynamic=True)
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


class PlainFirst(Tiny):
    """The graph in front of the break needs no gradient."""

    def forward(self, data, labels=None):
        scale = torch.layer_norm(data.float(), data.shape[-1:])
        torch._dynamo.graph_break()
        return super().forward(data, labels) * scale.square().mean()


def test_a_graph_without_gradients_that_cannot_be_compiled_runs_as_it_was(monkeypatch):
    def fail(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(backend, "lower_plain", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no room"):
        optimized(PlainFirst())[0](*tokens())
    torch._dynamo.reset()
    model, session = optimized(PlainFirst(dropout=0.0), preset="exact", strict=False, scheduler="none")
    with pytest.warns(RuntimeWarning, match="runs uncompiled.*no room"):
        loss, grads = step(model, model, tokens())
    reference = PlainFirst(dropout=0.0)
    expected_loss, expected = step(reference, reference, tokens())
    assert torch.allclose(loss, expected_loss) and all(
        torch.allclose(g, grads[n], atol=1e-6) for n, g in expected.items()
    )
    assert len(session.gates.names) > 0 and session.plan.units


def test_graph_breaks_under_ils_compile_once_per_graph():
    model, session = optimized(Broken())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(10))
    assert (session.compiles, session.recompiles) == (2, 0)


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
    assert "frozen: 0.weight (one operator makes it together with" in said


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


@pytest.mark.parametrize(
    "executor", ["interpreter", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.thorough])]
)
def test_global_configuration_is_left_as_it_was(executor):
    with unchanged_configuration():
        model, _ = optimized(Tiny(depth=1), executor=executor)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
        slimfit_fx.restore(model)


@pytest.mark.thorough
def test_a_message_that_the_library_says_once_breaks_no_graph(caplog):
    """Nor does torch, which writes its settings down with each compile, stumble over the one that sees to this."""
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, loss_type=None)
    model, (ids, _) = transformers.GPT2LMHeadModel(config), tokens()
    model.loss_type = None  # what some releases find for this class: loss_function then logs that it takes the default
    batch = {"input_ids": ids, "labels": ids}
    slimfit_fx.plan(model, **batch, memory_budget="1GiB")  # is refused for a forward of several graphs
    with unchanged_configuration():
        model, session = optimized(model)
        model(**batch).loss.backward()
    assert session.compiles == 1
    assert all(unit.gated for unit in session.plan.units)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []


@pytest.mark.parametrize("scheduler", ["random", "ils"])
def test_scheduling_draws_no_random_numbers(scheduler):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, session = optimized(Tiny(depth=1, dropout=0.0), scheduler=scheduler, distance_sample=64)
    torch.manual_seed(5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "broken",
    [
        "insert_gates",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("split_joint", "insert_codecs", "tag_liveness")),
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
        strict, _ = optimized(Tiny(depth=1))
        strict(*tokens())


def test_a_lowering_that_fails_costs_speed_only(monkeypatch):
    from slimfit_fx.capture import backend

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(backend, "lower_with_interpreter", fail)
    model, session = optimized(Tiny(depth=1, dropout=0.0), strict=False, scheduler="none")
    session.freeze("blocks.*")
    plain = Tiny(depth=1, dropout=0.0)
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
    caller = train.__code__.co_filename
    assert [(w.category, w.filename) for w in ours] == [(RuntimeWarning, caller)], "once, at the call of the model"
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


@pytest.mark.parametrize("pattern", first(range(6)))
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
    model, session = optimized(Tiny(depth=1), scheduler="none", preset="exact")
    expected = step(model, model, tokens())[1]
    expected = {n: g.clone() for n, g in expected.items()}
    for name, other in itertools.pairwise(session.gates.names):
        session.unfreeze()
        session.freeze([name, other])
        assert differences(expected, step(model, model, tokens())[1], closed={name, other}) == []
    assert (session.compiles, session.recompiles) == (1, 0)


class Adapted(torch.nn.Module):
    """Finds its parts' attributes as its own, as the wrappers of PEFT do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, *data):
        return self.inner(*data)


def test_a_plan_names_modules_as_the_model_does_whatever_finds_its_attributes():
    rows = slimfit_fx.plan(Adapted(Tiny(depth=2)), *tokens(), config=slimfit_fx.Config(min_bytes=0)).rows
    modules = {name for name, _ in Adapted(Tiny(depth=2)).named_modules()}
    assert {row.module for row in rows} <= modules and any("blocks.1" in row.module for row in rows)
