"""Hugging Face's architectures train under ILS: bit for bit as without us (``exact``), closely (``balanced``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hf_models
import pytest
import torch
from effort import THOROUGH
from reference import UNPACED, Gradients, compile_reference, cosine, differences, equal_bits, optimized, step
from torch import Tensor, nn

from slimfit_fx.schedule.ils import InterLayerScheduler

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
STEPS = 5


class OpenFirst(InterLayerScheduler):
    """ILS whose first step trains everything, so that every gradient can be held against the reference."""

    def select(self):
        chosen = super().select()
        return frozenset(unit.name for unit in self.units) if self.step == 0 else chosen


@dataclass
class Reference:
    name: str
    model: nn.Module
    compiled: Callable[..., Any]
    batch: dict[str, Any]
    first: tuple[Tensor, Gradients]


ALIKE = ("beit", "deit", "distilbert", "electra", "mpnet", "qwen2", "roberta")
"""Whose graphs differ little from those of vit, bert and llama."""
RARE = ("albert", "bart", "clip", "deberta-v2", "gemma2", "mixtral", "opt", "swin")
"""Others that make test-all runs; test_pass_split_gradients.py has mixtral's gradients in make test."""
NAMES = [pytest.param(n, marks=pytest.mark.thorough) if n in ALIKE + RARE else n for n in hf_models.CONFIGS]

COMPRESSED = ("gpt2", "vit")
"""What backward reads of the others is much what it reads of these: make test-all compresses them."""


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    """One architecture without us, and its first step: compiled once for all tests of it."""
    model, batch = hf_models.build(request.param), hf_models.batch(request.param)
    if request.param == "mixtral" and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("no graph of its experts can be captured before transformers has an operator for their gradients")
    compiled = compile_reference(model)
    loss, grads = step(compiled, model, batch, seed=0)
    first = loss, {n: None if g is None else g.clone() for n, g in grads.items()}
    return Reference(request.param, model, compiled, batch, first)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def runs_partly_eagerly(session):
    """Whether a graph break left layers to eager, where a closed unit keeps its gradient until the optimizer step.

    So do OPT and BART of transformers 5.17: they ask a random tensor, in the loop over their layers, what to leave out.
    """
    return any(unit.reason == "no gradient of it was found in any captured graph" for unit in session.plan.units)


def check_compiles(session, after_first_step):
    """Flipping gates compiles nothing; only what several parts of a broken forward share may be compiled for each."""
    assert session.compiles == after_first_step
    graphs = session.compiles - session.recompiles
    assert session.recompiles == 0 or graphs > 1


def check_plan(session):
    """Whatever is kept or refused says why; what has no gate says why, too."""
    plan = session.plan
    assert plan.rows and all(row.reason for row in plan.rows)
    assert all(unit.gated or unit.reason for unit in plan.units)
    assert all(what and why for what, why in plan.refusals)
    known = ('recompute "auto"', "attention masks made of constants")
    left = [note for note in plan.notes if not any(words in note for words in known)]
    assert not left, f"a graph was not rewritten: {left}"


def test_trains_exactly_as_without_us(reference):
    chosen = {"preset": "exact", "scheduler": OpenFirst, "freeze_rate": 0.7, **UNPACED}
    model, session = optimized(hf_models.build(reference.name), **chosen)
    ours, theirs = optimizer_of(model), optimizer_of(reference.model)
    compiles = []
    partly_eager = False
    for number in range(STEPS):
        loss, grads = step(model, model, reference.batch, seed=number)
        if number == 0:
            partly_eager = runs_partly_eagerly(session)
        expected_loss, expected = step(reference.compiled, reference.model, reference.batch, seed=number)
        closed = session.gates.closed
        assert bool(closed) == (number > 0)
        assert equal_bits(expected_loss, loss), f"step {number}: {expected_loss} != {loss}"
        if partly_eager:
            grads |= dict.fromkeys(closed)
        assert differences(expected, grads, closed=closed) == [], f"step {number}"
        for name, param in reference.model.named_parameters():
            param.grad = None if name in closed else param.grad
        ours.step()
        theirs.step()
        assert {n for n, p in model.named_parameters() if p.grad is not None}.isdisjoint(closed), f"step {number}"
        compiles.append(session.compiles)
    check_compiles(session, compiles[0])
    check_plan(session)


@pytest.mark.thorough
@pytest.mark.inductor
def test_gradients_under_inductor():
    """One block of a BERT, which has some sixty kernels: bit for bit as torch.compile has them, whatever the gates."""
    theirs, batch = hf_models.build("bert", num_hidden_layers=1), hf_models.batch("bert")
    expected_loss, expected = step(compile_reference(theirs, executor="inductor"), theirs, batch)
    model, session = optimized(
        hf_models.build("bert", num_hidden_layers=1), executor="inductor", preset="exact", scheduler="none"
    )
    names = session.gates.names
    for closed in ((), names[::2], names[1::3]):
        session.unfreeze()
        if closed:
            session.freeze(closed)
        loss, grads = step(model, model, batch)
        assert session.gates.closed == set(closed) and session.executor == "inductor"
        assert equal_bits(expected_loss, loss)
        assert differences(expected, grads, closed=set(closed)) == []
    assert (session.compiles, session.recompiles) == (1, 0)
    check_plan(session)


def test_trains_closely_when_compressed(reference):
    if reference.name not in COMPRESSED and not THOROUGH:
        pytest.skip("make test-all runs it")
    model, session = optimized(hf_models.build(reference.name), preset="balanced", scheduler=OpenFirst, freeze_rate=0.7)
    optimizer = optimizer_of(model)
    loss, grads = step(model, model, reference.batch, seed=0)
    expected_loss, expected = reference.first
    assert equal_bits(expected_loss, loss), "codecs must not touch the forward"
    assert cosine(expected, grads) > 0.99
    assert {n for n, g in grads.items() if g is None} == {n for n, g in expected.items() if g is None}
    optimizer.step()
    compiles = session.compiles
    for number in range(1, STEPS):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss, grads = step(model, model, reference.batch, seed=number)
        assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads.values())
        optimizer.step()
        still = {n for n, p in model.named_parameters() if torch.equal(before[n], p)}
        assert session.gates.closed and session.gates.closed <= still
    check_compiles(session, compiles)
    assert any(row.decision.startswith("codec") for row in session.plan.rows)
    check_plan(session)
