"""The core promises once more where graphs become machine code; models are tiny, since compiling takes the time."""

from __future__ import annotations

import pytest
import torch
from graphs import Chain, chain_input
from reference import Gradients, compile_reference, cosine, differences, equal_bits, optimized, step
from torch import Tensor
from tower import Tower, rows

pytestmark = pytest.mark.inductor

PATTERNS = [(), ("up.weight",), ("mid.weight",), ("norm.weight", "down.weight"), ("*",)]


def ours(**settings):
    """(model, session), all gates open."""
    return optimized(Tower(), **{"executor": "inductor", "preset": "exact", "scheduler": "none", **settings})


def theirs(batch: tuple[Tensor, ...]) -> tuple[Tensor, Gradients]:
    """(loss, gradients) of torch.compile."""
    model = Tower()
    return step(compile_reference(model, executor="inductor"), model, batch)


def close(session, patterns) -> set[str]:
    session.unfreeze()
    if patterns:
        session.freeze(patterns)
    return {n for n in session.gates.names if n in patterns or "*" in patterns}


def test_any_gates_give_what_torch_compile_computes_bit_for_bit():
    expected_loss, expected = theirs(rows())
    model, session = ours()
    for pattern in PATTERNS:
        closed = close(session, pattern)
        loss, grads = step(model, model, rows())
        assert session.executor == "inductor" and session.gates.closed == closed
        assert equal_bits(expected_loss, loss)
        assert differences(expected, grads, closed=closed) == []
    assert (session.compiles, session.recompiles) == (1, 0)
    assert {unit.name for unit in session.plan.units if unit.gated} == set(session.gates.names) and not (
        session.plan.notes
    )


def test_no_ghost_is_read_in_nan_mode():
    expected_loss, expected = theirs(rows())
    model, session = ours(debug=True)
    for pattern in PATTERNS:
        closed = close(session, pattern)
        loss, grads = step(model, model, rows())
        assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=closed) == []


def test_compressed_gradients_are_finite_and_close():
    expected_loss, expected = theirs(rows())
    model, session = ours(preset="balanced")
    loss, grads = step(model, model, rows())
    assert equal_bits(expected_loss, loss), "codecs must not touch the forward"
    assert all(grad.isfinite().all() for grad in grads.values())
    assert 0.999 < cosine(expected, grads) and differences(expected, grads) != []
    closed = close(session, ("mid.weight",))
    _, again = step(model, model, rows())
    assert differences(grads, again, closed=closed) == [], "open units do not see the gates of others"


def test_twenty_steps_of_ils_never_recompile():
    model, session = ours(scheduler="ils", freeze_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for number in range(20):
        loss, grads = step(model, model, rows(seed=number % 2), seed=number)
        closed = session.gates.closed
        assert closed and {n for n, g in grads.items() if g is None} == closed
        before = {n: model.get_parameter(n).detach().clone() for n in closed}
        optimizer.step()
        assert all(torch.equal(before[n], model.get_parameter(n)) for n in closed)
        losses.append(loss.item())
    assert (session.compiles, session.recompiles, session.steps) == (1, 0, 20)
    assert len({chosen for _, chosen in session.gates.history}) > 1 and losses[-1] < losses[0]


def test_a_batch_of_any_size():
    def batch(count: int) -> tuple[Tensor]:
        (data,) = rows(count)
        torch._dynamo.mark_dynamic(data, 0)
        return (data,)

    model, session = ours()
    reference = Tower()
    compiled = compile_reference(reference, executor="inductor")
    for count, pattern in ((8, ()), (12, ("mid.weight",)), (5, ("norm.weight", "down.weight"))):
        closed = close(session, pattern)
        loss, grads = step(model, model, batch(count))
        expected_loss, expected = step(compiled, reference, batch(count))
        assert equal_bits(expected_loss, loss) and differences(expected, grads, closed=closed) == []
    assert (session.compiles, session.recompiles) == (1, 0)


def test_autocast():
    reference = Chain()
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected = step(compile_reference(reference, executor="inductor"), reference, chain_input())
        model, session = optimized(Chain(), executor="inductor", preset="exact", scheduler="none")
        for pattern in ((), ("two.weight",)):
            closed = close(session, pattern)
            loss, grads = step(model, model, chain_input())
            assert equal_bits(expected_loss, loss)
            assert all(g is None or g.dtype == torch.float32 for g in grads.values())
            assert differences(expected, grads, closed=closed) == []
