"""``outputs="loss"``: a training forward gives its loss, with the same gradients, and the shape of all else."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from effort import examples
from graphs import unequal
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized, step
from small_models import BATCH, LENGTH, VOCABULARY, WIDTH, Tiny, tokens
from strategies import build, inputs, specs
from torch import Tensor, nn
from torch.nn import functional as F

import slimfit_fx
from slimfit_fx.capture import loss_only
from slimfit_fx.graph import batch as batch_
from slimfit_fx.passes import outline_repeats as outlined_
from slimfit_fx.passes import tile_bodies
from slimfit_fx.runtime.measure import step_memory


class Reader(nn.Module):
    """Predicts each token; returns the loss if there are labels, logits, features, the likeliest tokens, a count."""

    def __init__(self, vocabulary: int = VOCABULARY, depth: int = 1) -> None:
        super().__init__()
        self.body = Tiny(depth=depth, dropout=0.0)
        self.body.embed = nn.Embedding(vocabulary, WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.register_buffer("calls", torch.zeros(()))
        self.breaks = False

    def forward(self, data: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        features = self.body.features(data)
        if self.breaks:
            mean = features.mean()
            torch._dynamo.graph_break()
            features = features * mean.detach()
        logits = self.head(self.body.norm(features))
        self.calls += 1
        found = {"logits": logits, "features": features, "best": logits.argmax(-1), "calls": self.calls * 2}
        if labels is None:
            return found
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), **found}


def batch(seed: int = 0, rows: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    data, _ = tokens(seed, rows, length)
    return data, data.roll(-1, 1)


def reader(**settings: Any) -> tuple[Any, slimfit_fx.Session]:
    torch.manual_seed(0)
    return optimized(Reader(), **settings)


def test_the_loss_and_all_gradients_are_the_same_bits():
    """Whatever is closed; an optimizer steps between."""
    found = {}
    for outputs in ("all", "loss"):
        torch._dynamo.reset()
        model, session = reader(preset="exact", outputs=outputs, freeze_rate=0.5, min_bytes=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found[outputs] = []
        for number in range(6):
            loss, grads = step(lambda *b, m=model: m(*b)["loss"], model, batch(number))
            found[outputs].append((loss, grads, session.gates.closed))
            optimizer.step()
        assert session.recompiles == 0
    for (loss, grads, closed), (loss_alone, grads_alone, closed_alone) in zip(*found.values(), strict=True):
        assert closed == closed_alone and torch.equal(loss, loss_alone)
        assert all(
            (a is None) == (b is None) and (a is None or torch.equal(a, b))
            for a, b in zip(grads.values(), grads_alone.values(), strict=True)
        )


def test_other_outputs_have_a_shape_and_no_data():
    """What has no gradient stays as it is: predictions, and what the model counts."""
    model, session = reader(outputs="loss")
    plain = Reader()
    plain.load_state_dict(model.state_dict())
    expected, found = plain(*batch()), model(*batch())
    assert list(found) == list(expected)
    for name in ("logits", "features"):
        assert found[name].device.type == "meta" and not found[name].requires_grad
        for told in ("shape", "dtype"):
            assert getattr(found[name], told) == getattr(expected[name], told)
        assert found[name].stride() == expected[name].stride()
    assert torch.equal(found["best"], expected["best"]) and found["calls"] == expected["calls"] == 2
    assert model.calls == 1
    (note,) = session.plan.notes
    assert f"outputs beside the loss are left out: 2, the largest of size ({BATCH}, {LENGTH}, {VOCABULARY})" in note


@pytest.mark.parametrize(
    "misuse",
    [
        lambda out: out["logits"].softmax(-1).sum().item(),
        lambda out: out["logits"].numpy(),
        lambda out: (out["loss"] + out["logits"].mean()).backward(),
        lambda out: out["logits"].mean().backward(),
        lambda out: F.mse_loss(out["logits"], torch.zeros(BATCH, LENGTH, VOCABULARY)).backward(),
    ],
)
def test_whoever_reads_them_is_told(misuse):
    """A gradient that is not there is never taken for zero."""
    model, _ = reader(outputs="loss")
    found = model(*batch())
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta|grad"):
        misuse(found)


def test_without_a_loss_all_outputs_stay():
    model, session = reader(outputs="loss")
    data, labels = batch()
    found = model(data)
    assert found["logits"].device.type == "cpu" and found["logits"].requires_grad
    F.cross_entropy(found["logits"].flatten(0, 1), labels.flatten()).backward()
    assert any(p.grad is not None for p in model.parameters())
    assert session.plan.notes == (
        "graph 0: all outputs stay: none of them is a loss, a single number that has a gradient",
    )


def test_evaluation_gives_all():
    model, _ = reader(outputs="loss")
    model(*batch())["loss"].backward()
    model.eval()
    with torch.no_grad():
        assert model(*batch())["logits"].device.type == "cpu"


def test_what_passes_a_break_of_the_graph_stays():
    """Another graph computes with it: a number with a gradient is no loss there."""
    model, session = reader(outputs="loss")
    model.breaks = True
    found = model(*batch())
    found["loss"].backward()
    assert session.compiles == 2
    first, second = session.plan.notes
    assert "all outputs stay: the forward goes on in another graph" in first and "left out: 2" in second
    assert found["logits"].device.type == "meta"
    assert model.body.embed.weight.grad is not None or "body.embed.weight" in session.gates.closed
    plain = Reader()
    plain.load_state_dict(model.state_dict())
    plain.breaks = True
    assert torch.allclose(plain(*batch())["loss"], found["loss"])


@pytest.mark.parametrize("recompute", ["products", "blocks"])
def test_without_tiles_logits_are_saved_as_they_are(recompute):
    """Made again of values that were encoded they would not fit the sums of their exponentials, which are saved."""
    model, session = reader(outputs="loss", preset="balanced", recompute=recompute)
    model(*batch())["loss"].backward()
    kept = [row for row in session.plan.rows if row.shape == (BATCH * LENGTH, VOCABULARY)]
    assert kept and all(row.codec is None for row in kept)


def test_sizes_that_vary():
    model, session = reader(outputs="loss", dynamic=True)
    for rows, length in ((4, 8), (3, 6), (5, 7)):
        found = model(*batch(rows=rows, length=length))
        found["loss"].backward()
        assert found["logits"].shape == (rows, length, VOCABULARY)
        assert found["features"].shape == (rows, length, WIDTH) and found["best"].shape == (rows, length)
    assert session.recompiles == 0


def test_a_plan_says_what_large_outputs_take(monkeypatch):
    """To whom gets all of them, and has a loss."""
    model, session = reader()
    model(*batch())
    assert session.plan.notes == ()
    torch._dynamo.reset()
    monkeypatch.setattr(loss_only, "WORTH_SAYING", 1)
    model, session = reader()
    model(*batch())
    (note,) = session.plan.notes
    assert f'the largest of size ({BATCH}, {LENGTH}, {VOCABULARY}): outputs="loss" leaves them out' in note
    torch._dynamo.reset()
    model, session = reader()
    model(batch()[0])
    assert session.plan.notes == ()


def test_what_the_setting_may_be():
    with pytest.raises(ValueError, match="outputs.*'all', 'loss'"):
        slimfit_fx.Config(outputs="logits")
    with pytest.raises(TypeError, match="outputs must be a string"):
        slimfit_fx.Config(outputs=True)


@settings(max_examples=examples(15))
@given(spec=specs(), seed=st.integers(0, 2**16))
def test_any_model_has_the_same_gradients(spec, seed):
    """Of its loss, under preset exact, whatever is closed, whatever sizes and breaks it has."""
    spec, found = dataclasses.replace(spec, head="loss and logits"), []
    for outputs in ("all", "loss"):
        torch._dynamo.reset()
        chosen = {"preset": "exact", "units": spec.is_unit, "freeze_rate": 0.5, "seed": seed, "min_bytes": 0}
        model, session = optimized(build(spec), outputs=outputs, dynamic=spec.dynamic, **chosen)
        torch.manual_seed(seed)
        with spec.context():
            outs = model(*inputs(spec))
        outs["loss"].backward()
        assert (outs["logits"].device.type == "meta") is (outputs == "loss")
        assert outs["logits"].shape == (spec.batch, spec.length, len(model.head.weight))
        found.append([outs["loss"].detach(), *(param.grad for param in model.parameters())])
    assert unequal(*found) == []


@pytest.mark.inductor
@pytest.mark.slow
def test_a_step_never_holds_the_logits(monkeypatch):
    """Not in forward and not in backward: tiles of the head make a part of them, and make that again.

    The peak is the predicted one, gradients are the same but for rounding, and what logits are made of stays exact.
    """
    monkeypatch.setattr(batch_, "LEAST_FLOPS", {"cpu": 3e5})
    monkeypatch.setattr(outlined_, "FEWEST_SAVED", 4)
    monkeypatch.setattr(tile_bodies, "ADDED_AT_ONCE", 0)  # the gradient of the head is a large one
    vocabulary, rows, length = 1000, 64, 16
    logits_bytes, found = rows * length * vocabulary * 4, {}
    for outputs in ("all", "loss"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        chosen = {"preset": "exact", "scheduler": "none", "executor": "inductor", "tiles": outputs == "loss"}
        model, session = optimized(Reader(vocabulary, depth=2), outputs=outputs, **chosen)
        call = functools.partial(lambda m, *b: m(*b)["loss"], model, *batch(rows=rows, length=length))
        loss = call()
        loss.backward()
        grads = [param.grad for param in model.parameters()]
        model.zero_grad()
        memory = step_memory(call, lambda loss: loss.backward())
        assert memory.peak_bytes <= session.predict_peak().peak_bytes <= 1.02 * memory.peak_bytes
        found[outputs] = loss.detach(), grads, memory.peak_bytes
        if outputs == "loss":
            assert any("logits are made again from it" in row.reason for row in session.plan.rows)
    assert found["all"][2] > 2 * logits_bytes and found["loss"][2] < logits_bytes
    assert torch.allclose(found["all"][0], found["loss"][0], rtol=1e-6)
    for a, b in zip(found["all"][1], found["loss"][1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
