"""What goes wrong in the middle of a step leaves everything usable; a killed run goes on as if nothing had happened."""

from __future__ import annotations

import functools
import itertools
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from effort import first
from reference import differences, equal_bits, optimized, step
from small_models import Tiny, optimizer_state, same_state, tokens
from torch import Tensor, nn
from training_loops import Skipped, grads_of, pair

import slimfit_fx

ERRORS = [torch.OutOfMemoryError("no memory left"), ValueError("a user's own"), KeyboardInterrupt()]
NAMES = [type(error).__name__ for error in ERRORS]


class Fragile(Tiny):
    """Raises ``error`` in the middle of the next forward, if it is set; dynamo breaks the graph there."""

    error: BaseException | None = None

    def features(self, tokens):
        x = self.blocks[0](self.embed(tokens))
        self.fail()
        return self.blocks[1](x)

    @torch.compiler.disable
    def fail(self):
        if self.error is not None:
            raise self.error


@functools.cache
def loss_and_grads_of_fragile():
    _, _, call, reference = pair(make=Fragile)
    return step(call, reference, tokens())


@pytest.mark.parametrize("compiled", [False, True], ids=["the first", "a later one"])
@pytest.mark.parametrize("error", first(ERRORS), ids=NAMES)
def test_an_error_in_forward(error, compiled):
    """In the first call, which compiles, or in a later one."""
    model, session, *_ = pair(make=Fragile, strict=False)
    if compiled:
        step(model, model, tokens())
    model.error = error
    with pytest.raises(type(error)):
        model(*tokens())
    model.error = None
    loss, grads = step(model, model, tokens())
    expected_loss, expected = loss_and_grads_of_fragile()
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert {unit.name for unit in session.plan.units if unit.gated} == set(session.gates.names)


@pytest.mark.parametrize("error", first(ERRORS), ids=NAMES)
def test_an_error_in_backward(error):
    model, session, call, reference = pair()
    step(model, model, tokens())

    def fail(grad):
        raise error

    hook = model.head.weight.register_hook(fail)
    with pytest.raises(type(error)):
        model(*tokens()).backward()
    hook.remove()
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(call, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert (session.compiles, session.recompiles, session.steps) == (1, 0, 0)


RAISED: list[BaseException] = []
"""What the backward of ``passed_on`` raises when it is called next."""


@torch.library.custom_op("slimfit_fx_tests::passed_back", mutates_args=())
def passed_back(grad: Tensor) -> Tensor:
    if RAISED:
        raise RAISED.pop()
    return grad.clone()


@torch.library.custom_op("slimfit_fx_tests::passed_on", mutates_args=())
def passed_on(x: Tensor) -> Tensor:
    return x.clone()


passed_back.register_fake(torch.empty_like)
passed_on.register_fake(torch.empty_like)
passed_on.register_autograd(lambda ctx, grad: passed_back(grad))


class Passing(Tiny):
    """One graph, in the middle of which an operator of the user's own stands."""

    def features(self, tokens):
        return self.blocks[1](passed_on(self.blocks[0](self.embed(tokens))))


def six_steps(executor: str, at: tuple[int, int] | None = None, error: BaseException | None = None):
    """Steps of two micro-batches. In step and micro-batch ``at`` backward raises, and the step is done once more."""
    model, session = optimized(Passing(), freeze_rate=0.6, executor=executor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def backward(number: int) -> None:
        torch.manual_seed(number)
        model(*tokens(number)).backward()

    for number in range(6):
        if at is not None and error is not None and number == at[0]:
            for earlier in range(at[1]):
                backward(2 * number + earlier)
            RAISED.append(error)
            with pytest.raises(type(error)):
                backward(2 * number + at[1])
            assert not RAISED
        optimizer.zero_grad()
        backward(2 * number)
        backward(2 * number + 1)
        optimizer.step()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return session, weights, {name: optimizer_state(optimizer, param) for name, param in model.named_parameters()}


whole_six_steps = functools.cache(six_steps)


@pytest.mark.parametrize(
    "executor", ["interpreter", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.thorough])]
)
@pytest.mark.parametrize(
    ("at", "error"),
    first(zip([(0, 0), (3, 1), (0, 1), (3, 0)], [*ERRORS, ERRORS[0]], strict=True), 2),
    ids=["first step", "fourth step, second batch", "first step, second batch", "fourth step"],
)
def test_an_error_inside_the_compiled_backward(at, error, executor):
    """Saved values are half used up by then; the run goes on as if nothing had happened."""
    whole, expected_weights, expected_state = whole_six_steps(executor)
    session, weights, state = six_steps(executor, at, error)
    assert session.state_dict() == whole.state_dict() and session.gates.history == whole.gates.history
    assert len({opened for _, opened in whole.gates.history}) > 3
    assert (session.compiles, session.recompiles, session.steps) == (1, 0, 6)
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
        assert same_state(state[name], expected_state[name]), name


def test_a_wrong_batch_is_the_users_error_and_settles_nothing():
    """Dynamo meets it while it traces; the model must not be given up for it."""
    model, session, call, reference = pair(strict=False)
    data, labels = tokens()
    with pytest.raises((ValueError, RuntimeError), match="atch"):
        model(data, labels[:-1])
    loss, grads = step(model, model, tokens())
    expected_loss, expected = step(call, reference, tokens())
    assert equal_bits(loss, expected_loss) and differences(expected, grads, closed=session.gates.closed) == []
    assert session.plan.units and all(unit.gated for unit in session.plan.units)


def test_an_error_in_the_optimizer_measures_nothing():
    model, session = optimized(Tiny(depth=1), freeze_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, model, tokens())
    rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    assert session.steps == 0
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    step(model, model, tokens())
    assert session.steps == 1 and any(d < 2**40 for d in session.scheduler.distances.values())


def test_clipping_does_not_count_closed_units_that_run_eagerly():
    """The embedding runs outside of every graph: nothing but autograd knows of its gradient."""
    model, session, call, reference = pair(make=Skipped, closed=("embed.weight", "blocks.1.*"))
    step(model, model, tokens())
    step(call, reference, tokens())
    assert differences(grads_of(reference), grads_of(model), closed=session.gates.closed) == []
    assert model.embed.weight.grad is None, "before the optimizer's step"
    for name, param in reference.named_parameters():
        param.grad = None if name in session.gates.closed else param.grad
    assert torch.equal(*(nn.utils.clip_grad_norm_(net.parameters(), 0.01) for net in (model, reference)))
    session.unfreeze()
    _, grads = step(model, model, tokens())
    assert grads["embed.weight"] is not None
    slimfit_fx.restore(model)
    assert not model.embed.weight._post_accumulate_grad_hooks


WORKER, STEPS = pathlib.Path(__file__).with_name("killed_run.py"), 60


def start_run(folder: pathlib.Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, str(WORKER), str(folder), str(STEPS)], cwd=WORKER.parent)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What a run that nobody kills ends with."""
    folder = tmp_path_factory.mktemp("whole")
    assert start_run(folder).wait(300) == 0
    return torch.load(folder / "end.pt")


def kill_within_a_step(victim: subprocess.Popen[bytes], marker: pathlib.Path, at: int, share: float) -> int:
    """Kill the run when step ``at`` has gone on for ``share`` of what the longest of the last three took.

    Every third step writes a checkpoint. Returns the step in which the run really ended.
    """
    begun: dict[int, float] = {}
    deadline = time.monotonic() + 300
    while max(begun, default=0) < at:
        assert victim.poll() is None and time.monotonic() < deadline
        if marker.exists():
            begun.setdefault(int(marker.read_text()), time.monotonic())
        time.sleep(0.0005 if max(begun, default=0) else 0.02)
    lately = [begun[number] for number in sorted(begun) if number > max(at - 4, 1)]
    time.sleep(share * max((later - earlier for earlier, later in itertools.pairwise(lately)), default=0.0))
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    return int(marker.read_text())


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("repeat", [0, *(pytest.param(number, marks=pytest.mark.thorough) for number in range(1, 8))])
def test_a_run_killed_at_a_random_moment_goes_on_bit_for_bit(repeat, whole_run, tmp_path):
    """In forward, backward, the optimizer's step or while a checkpoint is written."""
    at, share = random.randint(8, 30), random.random()
    ended = kill_within_a_step(start_run(tmp_path), tmp_path / "step", at, share)
    assert start_run(tmp_path).wait(300) == 0
    resumed, said = torch.load(tmp_path / "end.pt"), f"killed in step {ended}, {share:.2f} of step {at}"
    assert whole_run["from"] == 0 and resumed["from"] in (ended // 3 * 3, (ended + 1) // 3 * 3), said
    assert whole_run["slimfit_fx"] == resumed["slimfit_fx"], said
    assert all(torch.equal(whole_run["model"][n], resumed["model"][n]) for n in whole_run["model"]), said
