"""Units under an Adam go by optimizer steps: what a step is then, and that nobody sees other groups."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effort import first
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import UNPACED, compile_reference, equal_bits, optimized
from small_models import Tiny, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.runtime.moments import Pace, pace_of, paced_groups
from slimfit_fx.schedule import UnitInfo, make_scheduler

ADAMS = (Adam, AdamW, NAdam, RAdam, Adamax)
STEPS = 7


def model_of(**changes: Any) -> tuple[nn.Module, slimfit_fx.Session]:
    settings = {"preset": "exact", "scheduler": "random", "freeze_rate": 0.7, **changes}
    return optimized(Tiny(depth=1, dropout=0.0), **settings)


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS, after: Callable[[], None] = lambda: None) -> None:
    for number in range(steps):
        model(*tokens(number)).backward()
        optimizer.step()
        after()
        optimizer.zero_grad()


def rarity(session: slimfit_fx.Session) -> float:
    return len(session.gates.names) / session.scheduler.open_count


def by_hand(make: Callable[[Any], Optimizer], session: slimfit_fx.Session, exponent: float, factor: float) -> nn.Module:
    """Plain training of the same model: closed units have no gradient, units a group with settings of its own."""
    model, names = Tiny(depth=1, dropout=0.0), set(session.gates.names)
    named = dict(model.named_parameters())
    units = [p for n, p in named.items() if n in names]
    optimizer = make([{"params": [p for n, p in named.items() if n not in names]}, {"params": units}])
    apart = optimizer.param_groups[1]
    apart["betas"], apart["lr"] = tuple(b**exponent for b in apart["betas"]), apart["lr"] * factor
    torch._dynamo.reset()
    call = compile_reference(model)
    for number, (_, opened) in enumerate(session.gates.history):
        call(*tokens(number)).backward()
        for name in names - set(opened):
            named[name].grad = None
        optimizer.step()
        optimizer.zero_grad()
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(equal_bits(p, theirs[n]) for n, p in one.named_parameters())


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    theirs = dict(other.named_parameters())
    return max((p - theirs[n]).abs().max().item() for n, p in one.named_parameters())


@pytest.mark.parametrize(
    ("scheduler", "kind"), first([("ils", AdamW), ("round_robin", Adam), *(("random", kind) for kind in ADAMS)], 2)
)
def test_a_step_is_one_with_other_settings_for_units(scheduler, kind):
    def make(params: Any) -> Optimizer:
        return kind(params, lr=1e-2, weight_decay=0.05, foreach=False)

    model, session = model_of(scheduler=scheduler)
    train(model, make(model.parameters()))
    times = rarity(session)
    assert times > 2
    assert same_weights(model, by_hand(make, session, times, times**0.5))
    if kind is AdamW:
        assert not same_weights(model, by_hand(make, session, 1.0, times**0.5))
        assert not same_weights(model, by_hand(make, session, times, 1.0))


@pytest.mark.parametrize("way", first(["fused", "foreach", "amsgrad"]))
def test_every_way_of_adamw(way):
    def make(params: Any) -> Optimizer:
        return AdamW(params, lr=1e-2, **{way: True})

    model, session = model_of()
    train(model, make(model.parameters()))
    assert same_weights(model, by_hand(make, session, rarity(session), rarity(session) ** 0.5))


@pytest.mark.parametrize(
    "changes",
    first([{"preset": "paper"}, {"moments": "updates", "catch_up": 0}, {"scheduler": "none"}, {"freeze_rate": 0.0}], 2),
)
def test_the_users_settings_hold_for_all(changes):
    model, session = model_of(**changes)
    seen = []
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups))
    own = optimizer.param_groups
    train(model, optimizer, 2)
    assert all(groups is own for groups in seen)
    if changes.get("preset") != "paper":
        assert same_weights(model, by_hand(lambda params: AdamW(params, lr=1e-2), session, 1.0, 1.0))


@pytest.mark.parametrize("changes", [{"moments": "updates", "catch_up": 1}, {"catch_up": 0.0}])
def test_one_without_the_other(changes):
    model, session = model_of(**changes)
    train(model, AdamW(model.parameters(), lr=1e-2), 3)
    times = rarity(session)
    expected = (1.0, times) if "moments" in changes else (times, 1.0)
    assert same_weights(model, by_hand(lambda params: AdamW(params, lr=1e-2), session, *expected))


def test_what_is_no_adam_steps_with_its_own_groups():
    model, session = model_of()
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    assert session._tracker.parts_of(optimizer) is None
    assert session._tracker.parts_of(AdamW(Tiny(depth=1).parameters())) is not None


@pytest.mark.parametrize("make", [
    lambda o: LambdaLR(o, [lambda step: 1 / (1 + step)] * 2),
    lambda o: OneCycleLR(o, max_lr=[1e-2, 2e-2], total_steps=STEPS + 1),  # changes beta1, too
])  # fmt: skip
def test_schedules_logs_and_checkpoints_see_the_users_groups(make):
    model, session = model_of()
    params = list(model.parameters())
    optimizer = AdamW([{"params": params[::2], "lr": 1e-2}, {"params": params[1::2], "lr": 2e-2, "weight_decay": 0.0}])
    schedule, own, layout = (
        make(optimizer),
        optimizer.param_groups,
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    rates, betas = [], []

    def after() -> None:
        assert optimizer.param_groups is own
        schedule.step()
        rates.append([group["lr"] for group in own])
        betas.append([group["betas"] for group in own])

    train(model, optimizer, after=after)
    state = optimizer.state_dict()
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in layout]
    alone = AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-2, 2e-2)])
    expected, plain = [], make(alone)
    for _ in range(STEPS):
        alone.step()
        plain.step()
        expected.append([group["lr"] for group in alone.param_groups])
    assert rates == expected
    other, again = model_of()
    optimizer2 = AdamW([{"params": list(other.parameters())[::2]}, {"params": list(other.parameters())[1::2]}])
    optimizer2.load_state_dict(state)
    assert again.steps == 0 and session.steps == STEPS


def test_a_step_that_raises_leaves_no_trace_in_the_next():
    model, session = model_of()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    own = optimizer.param_groups
    train(model, optimizer, 1)

    model(*tokens()).backward()
    own[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    for group in optimizer.param_groups:  # in parts now, but what is written reaches the user's group
        group["lr"] = 1e-3
    train(model, optimizer, 1)
    assert own[0]["lr"] == 1e-3
    assert optimizer.param_groups is own
    own[0]["lr"] = "fast"
    model(*tokens()).backward()
    with pytest.raises(TypeError):
        optimizer.step()
    assert len(optimizer.state_dict()["param_groups"]) == 1 and optimizer.param_groups is own


class Counting(AdamW):
    """Counts steps in its groups, and copies them, as optimizers of others do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.copy().get("count", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_stays_there():
    model, _ = model_of()
    optimizer = Counting(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    assert [group["count"] for group in optimizer.param_groups] == [3]
    assert [group["count"] for group in optimizer.state_dict()["param_groups"]] == [3]


@pytest.mark.thorough
def test_a_compiled_step():
    """``torch.compile`` of the step takes it as it takes that of plain training, and compiles no more graphs."""

    def compiled(changes: dict[str, Any]) -> tuple[nn.Module, slimfit_fx.Session, int]:
        model, session = model_of(**changes)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        compile_counter = CompileCounter()
        call = torch.compile(optimizer.step, backend=compile_counter)
        for number in range(STEPS):
            model(*tokens(number)).backward()
            call()
            optimizer.zero_grad()
        return model, session, compile_counter.frame_count

    torch._dynamo.reset()
    model, session, count = compiled({})
    assert session.steps == STEPS
    times = rarity(session)
    apart = [
        largest_difference(model, by_hand(lambda params: AdamW(params, lr=1e-2), session, *pace))
        for pace in ((times, times**0.5), (times, 1.0), (1.0, times**0.5))
    ]
    assert 10 * apart[0] < min(apart[1:]), "torch compiles other arithmetic for plain training, too"
    torch._dynamo.reset()
    assert count <= compiled(UNPACED)[2]


def test_two_models_in_one_optimizer():
    def together(seeds: tuple[int, int]) -> list[nn.Module]:
        pair = [model_of(seed=seed) for seed in seeds]
        optimizer = AdamW([p for model, _ in pair for p in model.parameters()], lr=1e-2)
        own = optimizer.param_groups
        for number in range(STEPS):
            for model, _ in pair:
                model(*tokens(number)).backward()
            optimizer.step()
            assert optimizer.param_groups is own
            optimizer.zero_grad()
        return [model for model, _ in pair]

    def alone(seed: int) -> nn.Module:
        model, _ = model_of(seed=seed)
        train(model, AdamW(model.parameters(), lr=1e-2))
        return model

    assert all(same_weights(one, alone(seed)) for seed, one in zip((3, 4), together((3, 4)), strict=True))


def test_nothing_is_left_of_an_optimizer_that_is_gone():
    model, session = model_of()
    train(model, AdamW(model.parameters(), lr=1e-2), 1)
    gc.collect()
    assert not session._hooks._regrouped._whole


@settings(max_examples=60)
@given(
    count=st.integers(1, 12),
    groups=st.integers(1, 3),
    chosen=st.sets(st.integers(0, 11)),
    pace=st.builds(Pace, st.floats(1.0, 40.0), st.floats(1.0, 40.0)),
    betas=st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.9999)),
)
def test_groups_hold_every_parameter_once(count, groups, chosen, pace, betas):
    params = [nn.Parameter(torch.zeros(1)) for _ in range(count)]
    parts = [part for part in (params[k::groups] for k in range(groups)) if part]
    optimizer = AdamW([{"params": part, "lr": 0.1 * (k + 1)} for k, part in enumerate(parts)], betas=betas)
    units = {id(p) for k, p in enumerate(params) if k in chosen}
    found = paced_groups(optimizer, units, pace)
    if pace == Pace():
        assert found is None
        return
    own = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    shown = [part.shown for part in found]
    assert sorted(id(p) for group in shown for p in group["params"]) == sorted(own)
    for group in shown:
        for param in group["params"]:
            expected = {**own[id(param)], "params": 0}
            if id(param) in units:
                expected |= {"betas": tuple(b**pace.exponent for b in betas), "lr": expected["lr"] * pace.factor}
            assert {**group, "params": 0} == expected


def test_the_pace_is_that_of_the_units_that_may_open():
    units = [UnitInfo(str(k), 1, 4) for k in range(10)]
    for name, expected in (("ils", 10.0), ("random", 10.0), ("round_robin", 10.0), ("none", 1.0)):
        scheduler = make_scheduler(name)
        scheduler.start(units, freeze_rate=0.9, seed=0)
        assert pace_of(scheduler, Config()) == Pace(expected, expected**0.5)
        assert pace_of(scheduler, Config(moments="updates", catch_up=1)) == Pace(1.0, expected)
        assert pace_of(scheduler, Config(preset="paper")) == Pace()
        scheduler.pin(frozenset("01234"))
        assert pace_of(scheduler, Config(catch_up=0)) == Pace(max(1.0, expected / 2))
        scheduler.pin(frozenset("0123456789"))
        assert pace_of(scheduler, Config()) == Pace()
