"""Schedulers: the counts are exact, everybody has a turn, a resumed run is the same run."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from effort import first
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import optimized
from reference import step as step_of
from small_models import Tiny, tokens

from slimfit_fx.runtime.optimizer_hooks import _learning_rate
from slimfit_fx.schedule import (
    InterLayerScheduler,
    OpenScheduler,
    RandomScheduler,
    RoundRobinScheduler,
    Scheduler,
    UnitInfo,
    make_scheduler,
    register_scheduler,
    scheduler_names,
    update_distance,
)
from slimfit_fx.schedule.base import hash_fraction
from slimfit_fx.schedule.ils import first_visits

ILS = ("ils", "ils_paper")
BUILT_IN = (*ILS, "random", "round_robin", "none")
rates = st.floats(0.0, 1.0, exclude_max=True)
counts = st.integers(1, 40)
moves = st.floats(0.0, 1e3)


def units(n: int) -> list[UnitInfo]:
    return [UnitInfo(f"layer.{i}.weight", 16, 64) for i in range(n)]


def started(name: str, n: int, rate: float, seed: int = 0) -> Scheduler:
    scheduler = make_scheduler(name)
    scheduler.start(units(n), freeze_rate=rate, seed=seed)
    return scheduler


def run(scheduler: Scheduler, steps: int, first: int = 0) -> list[frozenset[str]]:
    """Drive it with distances that depend on the step and the unit only."""
    history = []
    for step in range(first, first + steps):
        names = scheduler.select()
        history.append(names)
        scheduler.observe({name: hash_fraction("move", step, name) for name in names})
    return history


@pytest.mark.parametrize("name", [*ILS, "random", "round_robin"])
@given(n=counts, rate=rates, seed=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_frozen_count_is_exact_in_every_step(name, n, rate, seed):
    scheduler = started(name, n, rate, seed)
    assert 0 <= scheduler.frozen_count == int(rate * n) < n
    assert all(n - len(names) == int(rate * n) for names in run(scheduler, 5))


of_all_sizes = given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    rate=st.sampled_from([0.5, 0.75, 0.9]),
    seed=st.integers(0, 5),
)


@of_all_sizes
@settings(deadline=None, max_examples=60)
def test_ils_first_visits_are_levelled(sizes, rate, seed):
    """The largest unit, if it outweighs all others together, is first visited with the smallest ones."""
    scheduler = make_scheduler("ils")
    known = [UnitInfo(f"u{i}", size, 4 * size) for i, size in enumerate([*sizes, 10 * sum(sizes)])]
    scheduler.start(known, freeze_rate=rate, seed=seed)
    bytes_of = {unit.name: unit.grad_bytes for unit in known}
    whole_steps = len(known) // scheduler.open_count
    for names in run(scheduler, whole_steps):
        if known[-1].name in names:
            company = sorted(bytes_of[name] for name in names)[:-1]
            assert company == sorted(bytes_of.values())[: scheduler.open_count - 1]
            break
    else:
        assert len(known) % scheduler.open_count, "it is visited in the last step, which has places left"


def test_ils_first_visits_of_a_transformer_cost_about_the_same():
    sizes = ([2_359_296] * 4 + [9_437_184] * 2 + [3072] * 2) * 12
    known = [UnitInfo(f"u{i}", size // 4, size) for i, size in enumerate(sizes)]
    scheduler = make_scheduler("ils")
    scheduler.start(known, freeze_rate=0.9, seed=0)
    loads = [sum(known[int(name[1:])].grad_bytes for name in names) for names in run(scheduler, 9)]
    assert max(loads) < 1.3 * sum(loads) / len(loads)


@pytest.mark.parametrize("name", [*ILS, "round_robin"])
@given(n=counts, rate=rates, seed=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_every_unit_is_visited_once_in_the_first_round(name, n, rate, seed):
    scheduler = started(name, n, rate, seed)
    history = run(scheduler, math.ceil(n / scheduler.open_count))
    assert frozenset().union(*history) == {unit.name for unit in scheduler.units}
    full = history[: n // scheduler.open_count]
    assert len(frozenset().union(*full)) == sum(map(len, full))  # nobody twice before all had a turn


@pytest.mark.parametrize("name", ILS)
@given(n=counts, rate=rates, data=st.data())
@settings(deadline=None, max_examples=50)
def test_ils_visits_everybody_whatever_the_distances(name, n, rate, data):
    scheduler = started(name, n, rate)
    seen: set[str] = set()
    for _ in range(math.ceil(n / scheduler.open_count)):
        names = sorted(scheduler.select())
        seen.update(names)
        moved = data.draw(st.lists(st.floats(1e-9, 1e300), min_size=len(names), max_size=len(names)))
        scheduler.observe(dict(zip(names, moved, strict=True)))
    assert len(seen) == n


@pytest.mark.parametrize("name", ILS)
@given(n=st.integers(2, 20), rate=rates, data=st.data())
@settings(deadline=None, max_examples=50)
def test_ils_freezes_the_smallest_distances(name, n, rate, data):
    scheduler = started(name, n, rate)
    assert isinstance(scheduler, InterLayerScheduler)
    values = data.draw(st.lists(moves, min_size=n, max_size=n).filter(any))
    scheduler.observe({unit.name: value for unit, value in zip(scheduler.units, values, strict=True)})
    opened = scheduler.select()
    distances = scheduler.distances
    frozen = [distances[unit.name] for unit in scheduler.units if unit.name not in opened]
    assert not frozen or max(frozen) <= min(distances[name] for name in opened)


@pytest.mark.parametrize("name", BUILT_IN)
@given(n=counts, rate=rates, seed=st.integers(0, 2**40), before=st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_resume_through_json_equals_the_uninterrupted_run(name, n, rate, seed, before):
    whole = run(started(name, n, rate, seed), before + 10)
    first = started(name, n, rate, seed)
    run(first, before)
    state = json.loads(json.dumps(first.state_dict()))
    second = started(name, n, rate, seed + 1)  # the seed comes back from the state
    second.load_state_dict(state)
    assert run(second, 10, first=before) == whole[before:]
    assert second.state_dict() == (run(first, 10, first=before), first.state_dict())[1]


@pytest.mark.parametrize("name", BUILT_IN)
def test_select_can_be_asked_again(name):
    scheduler = started(name, 10, 0.7)
    assert scheduler.select() == scheduler.select()


@pytest.mark.parametrize("name", [*ILS, "random"])
def test_seed_decides(name):
    history = run(started(name, 30, 0.8, seed=1), 4)
    assert history == run(started(name, 30, 0.8, seed=1), 4)
    assert history != run(started(name, 30, 0.8, seed=2), 4)


def test_start_forgets_the_last_run():
    scheduler = started("ils", 20, 0.8)
    first = run(scheduler, 6)
    scheduler.start(units(20), freeze_rate=0.8, seed=0)
    assert run(scheduler, 6) == first


def test_choices_do_not_depend_on_the_process():
    code = (
        "from slimfit_fx.schedule import *\n"
        "s = make_scheduler('random'); s.start([UnitInfo(f'u{i}', 1, 4) for i in range(9)], freeze_rate=.5, seed=3)\n"
        "print(sorted(s.select()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scheduler = make_scheduler("random")
    scheduler.start([UnitInfo(f"u{i}", 1, 4) for i in range(9)], freeze_rate=0.5, seed=3)
    assert out.strip() == str(sorted(scheduler.select()))


def test_none_opens_everything_and_random_is_uniform():
    assert len(started("none", 7, 0.9).select()) == 7
    hits = dict.fromkeys((unit.name for unit in units(10)), 0)
    for names in run(started("random", 10, 0.7), 1000):
        for name in names:
            hits[name] += 1
    assert all(230 < count < 370 for count in hits.values())  # 300 expected, deviation 14.5


def test_round_robin_goes_around():
    scheduler = started("round_robin", 5, 0.6)
    blocks = [sorted(int(name.split(".")[1]) for name in names) for names in run(scheduler, 3)]
    assert blocks == [[0, 1], [2, 3], [0, 4]]


# ---- ILS: what closed units miss adds up


def constant(scheduler: Scheduler, speeds: dict[str, float], steps: int, factor=lambda step: 1.0) -> dict[str, int]:
    """Drive it with units that always move as far, times ``factor`` of the step; return how often each was open."""
    visits = dict.fromkeys(speeds, 0)
    for step in range(steps):
        names = scheduler.select()
        for name in names:
            visits[name] += 1
        scheduler.observe({name: speeds[name] * factor(step) for name in names})
    return visits


@given(n=st.integers(4, 24), opened=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=50)
def test_ils_a_unit_that_moves_twice_as_fast_trains_four_times_as_often(n, opened, data):
    """Roughly, since periods are whole steps; where nobody would be open more often than in every second one."""
    powers = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    scheduler = started("ils", n, 1 - (opened + 0.5) / n)
    opened = scheduler.open_count
    weights = {unit.name: 2.0**power for unit, power in zip(scheduler.units, powers, strict=True)}
    share = opened / sum(weights.values())
    assume(max(weights.values()) * share < 0.5)
    steps = 100 * n
    visits = constant(scheduler, {name: math.sqrt(weight) for name, weight in weights.items()}, steps)
    for name, weight in weights.items():
        assert visits[name] == pytest.approx(steps * weight * share, rel=0.4, abs=2)


def test_the_papers_ils_holds_the_fastest_open_while_they_move_as_far():
    speeds = {f"layer.{i}.weight": 1.0 + i for i in range(10)}
    visits = constant(started("ils_paper", 10, 0.8), speeds, 105)
    assert visits == {**dict.fromkeys(speeds, 1), "layer.8.weight": 101, "layer.9.weight": 101}


def test_the_papers_ils_leaves_behind_what_is_first_visited_early_in_a_warmup():
    """Ten units alike, two open: the last pair is visited at the full rate, the first at a fifth of it."""
    speeds = dict.fromkeys((unit.name for unit in units(10)), 0.01)
    rates = [min(1.0, (step + 1) / 5) for step in range(100)]
    papers = constant(started("ils_paper", 10, 0.8), speeds, 100, rates.__getitem__)
    assert sorted(papers.values()) == [*[1] * 8, 96, 96]
    ours = constant(started("ils", 10, 0.8), speeds, 100)  # told how far they moved per learning rate
    assert set(ours.values()) == {20}


@pytest.mark.parametrize("name", first(ILS))
def test_a_session_tells_ils_how_far_units_moved_per_learning_rate(name):
    """The first step of an AdamW moves every weight by the rate. What the paper's rule is told follows it."""

    def moved(rate: float) -> dict[str, float]:
        torch.manual_seed(0)
        model, session = optimized(Tiny(depth=1), scheduler=name, freeze_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(2):
            step_of(model, model, tokens())
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.0  # said behind the first step, for the second
        distances = session.scheduler.distances
        return {unit: distances[unit] for unit in session.gates.history[0][1]}

    small, large = moved(1e-5), moved(1e-4)
    assert small.keys() == large.keys() and small
    for unit, distance in large.items():
        assert distance == pytest.approx(small[unit] * (10 if name == "ils_paper" else 1), rel=0.02)


def test_what_two_optimizers_move_is_divided_by_one_learning_rate():
    """Units of one that moves them a hundred times as far stay that far ahead."""
    torch.manual_seed(0)
    model, session = optimized(Tiny(), scheduler="ils", freeze_rate=0.0)
    parts = [list(block.parameters()) for block in model.blocks[:2]]
    optimizers = [torch.optim.AdamW(part, lr, weight_decay=0.0) for part, lr in zip(parts, (1e-2, 1e-4), strict=True)]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    step_of(model, model, tokens())
    for optimizer in optimizers:
        optimizer.step()
    session.before_forward()
    for name, distance in session.scheduler.distances.items():
        if name.startswith(("blocks.0.", "blocks.1.")):
            moved = update_distance(before[name], model.get_parameter(name).detach())
            assert distance == pytest.approx(float(moved) / 1e-2, rel=1e-5), name


def test_the_learning_rate_is_the_largest_of_the_groups_and_nobody_waits_for_it():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.1}])
    assert _learning_rate(optimizer) == 0.1
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert _learning_rate(optimizer) == 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, device="meta")  # as on a GPU
    assert _learning_rate(optimizer) == 1.0
    del optimizer.param_groups[0]["lr"]
    assert _learning_rate(optimizer) == 1.0


@of_all_sizes
@settings(deadline=None, max_examples=60)
def test_ils_no_step_is_heavier_than_first_visits_or_little_more_and_all_have_their_turn(sizes, rate, seed):
    scheduler = make_scheduler("ils")
    known = [UnitInfo(f"u{i}", size, 4 * size) for i, size in enumerate(sizes)]
    scheduler.start(known, freeze_rate=rate, seed=seed)
    bytes_of = {unit.name: unit.grad_bytes for unit in known}
    count, tour = scheduler.open_count, math.ceil(len(known) / scheduler.open_count)
    loads, visits = [], dict.fromkeys(bytes_of, 0)
    for _ in range(20 * tour):
        names = scheduler.select()
        loads.append(sum(bytes_of[name] for name in names))
        for name in names:
            visits[name] += 1
        scheduler.observe(dict.fromkeys(names, 1.0))
    first = loads[:tour]
    smallest = sum(sorted(bytes_of.values())[:count])
    assert max(loads) <= max([*first, 1.5 * sum(first) / tour]) + smallest
    assert max(loads) <= scheduler.most_open_bytes(count) <= sum(sorted(bytes_of.values())[-count:])
    assert min(visits.values()) >= 5, "of twenty each, if nothing had a weight"


@pytest.mark.parametrize("name", BUILT_IN)
@given(n=counts, rate=rates, data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_step_opens_more_bytes_than_the_scheduler_says(name, n, rate, data):
    """Whatever the sizes, the distances, the seed and the pins; this is what budgets count on."""
    scheduler = make_scheduler(name)
    sizes = data.draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n))
    known = [UnitInfo(f"u{i}", size, 4 * size) for i, size in enumerate(sizes)]
    scheduler.start(known, freeze_rate=rate, seed=data.draw(st.integers(0, 99)))
    bytes_of = {unit.name: unit.grad_bytes for unit in known}
    opened = n if name == "none" else scheduler.open_count
    bound = scheduler.most_open_bytes(opened)
    for _ in range(8):
        if data.draw(st.booleans()):
            scheduler.pin(frozenset(data.draw(st.sets(st.sampled_from(sorted(bytes_of))))))
        names = scheduler.select()
        assert sum(bytes_of[name] for name in names) <= bound
        scheduler.observe({name: data.draw(moves) for name in names})


@of_all_sizes
@settings(deadline=None, max_examples=60)
def test_the_level_of_ils_is_the_same_for_all_seeds(sizes, rate, seed):
    known = [UnitInfo(f"u{i}", size, size) for i, size in enumerate(sizes)]
    per_step = len(sizes) - int(rate * len(sizes))
    loads = []
    for each in (0, seed):
        order = first_visits(known, per_step, each)
        bytes_of = {unit.name: unit.grad_bytes for unit in known}
        loads.append(sorted(sum(bytes_of[n] for n in order[i : i + per_step]) for i in range(0, len(order), per_step)))
    assert loads[0] == loads[1]


def test_ils_opens_fewer_where_what_is_not_pinned_is_too_large():
    known = [UnitInfo(f"u{i}", size, size) for i, size in enumerate([1] * 8 + [100] * 2)]
    scheduler = make_scheduler("ils")
    scheduler.start(known, freeze_rate=0.8, seed=0)
    scheduler.pin(frozenset(f"u{i}" for i in range(8)))
    assert scheduler.most_open_bytes(2) == 103
    assert len(scheduler.select()) == 1


def test_ils_never_opens_an_embedding_with_large_matrices():
    sizes = [94_000_000] + ([2_359_296] * 4 + [9_437_184] * 2 + [3072] * 2) * 12
    known = [UnitInfo(f"u{i}", size // 4, size) for i, size in enumerate(sizes)]
    heaviest = {}
    for name in ILS:
        scheduler = make_scheduler(name)
        scheduler.start(known, freeze_rate=0.9, seed=0)
        history = run(scheduler, 300)
        heaviest[name] = max(sum(known[int(n[1:])].grad_bytes for n in names) for names in history)
        assert sum("u0" in names for names in history) >= 5
    assert heaviest["ils"] < 95e6 and heaviest["ils_paper"] > 110e6


def test_ils_a_pinned_unit_has_missed_most_when_it_is_released():
    scheduler = started("ils", 10, 0.9)
    constant(scheduler, {unit.name: 1.0 for unit in scheduler.units}, 10)
    scheduler.pin(frozenset({"layer.3.weight"}))
    constant(scheduler, {unit.name: 1.0 for unit in scheduler.units}, 40)
    scheduler.pin(frozenset())
    assert scheduler.select() == {"layer.3.weight"}


# ---- ILS: the cases that the paper leaves open


def test_ils_ties_go_to_the_first_in_the_model():
    scheduler = started("ils", 5, 0.6)
    scheduler.observe({unit.name: 0.5 for unit in scheduler.units})
    assert scheduler.select() == {"layer.0.weight", "layer.1.weight"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ils_keeps_the_last_finite_distance(bad):
    scheduler = started("ils", 3, 0.5)
    assert isinstance(scheduler, InterLayerScheduler)
    start = scheduler.distances
    scheduler.observe({"layer.0.weight": bad, "layer.1.weight": 0.25})
    assert scheduler.distances == {**start, "layer.1.weight": 0.25}
    scheduler.observe({"layer.1.weight": bad})
    assert scheduler.distances["layer.1.weight"] == 0.25


def test_ils_frozen_units_keep_their_distance():
    scheduler = started("ils", 10, 0.5)
    assert isinstance(scheduler, InterLayerScheduler)
    run(scheduler, 4)
    before, opened = scheduler.distances, scheduler.select()
    scheduler.observe({name: 0.125 for name in opened})
    assert all(scheduler.distances[name] == (0.125 if name in opened else before[name]) for name in before)


def test_ils_steps_at_learning_rate_zero_freeze_nobody_for_good():
    scheduler = started("ils", 12, 0.75)
    for _ in range(30):  # a warmup that begins with thirty steps at 0
        scheduler.observe(dict.fromkeys(scheduler.select(), 0.0))
    visited = frozenset().union(*run(scheduler, 4))
    assert len(visited) == 12


def test_ils_a_unit_that_does_not_move_while_others_do_is_frozen():
    scheduler = started("ils", 4, 0.5)
    scheduler.observe({"layer.0.weight": 0.0, "layer.1.weight": 0.1, "layer.2.weight": 0.2, "layer.3.weight": 0.3})
    assert scheduler.select() == {"layer.2.weight", "layer.3.weight"}


@pytest.mark.parametrize("name", ILS)
@given(n=counts, rate=rates, lag=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_ils_with_late_distances_still_visits_everybody_once(name, n, rate, lag):
    scheduler = started(name, n, rate)
    waiting: list[frozenset[str]] = []
    history = []
    for step in range(math.ceil(n / scheduler.open_count)):
        waiting.append(scheduler.select())
        history.append(waiting[-1])
        ready = waiting.pop(0) if step >= lag else frozenset()
        scheduler.observe(dict.fromkeys(ready, 0.5))
    assert len(frozenset().union(*history)) == n
    assert sum(map(len, history[:-1])) == len(frozenset().union(*history[:-1]))


def test_ils_a_unit_never_reported_loses_its_place():
    scheduler = started("ils", 6, 0.5)
    lost = sorted(scheduler.select())[0]
    opened = 0
    for step in range(20):
        names = scheduler.select()
        opened += lost in names
        scheduler.observe({name: hash_fraction(step, name) for name in names if name != lost})
    assert opened == 1


@given(rate=rates, closed=st.sets(st.integers(0, 9)))
@pytest.mark.parametrize("name", BUILT_IN)
@settings(deadline=None, max_examples=30)
def test_pinned_units_take_no_place(name, rate, closed):
    scheduler = started(name, 10, rate)
    pinned = frozenset(f"layer.{i}.weight" for i in closed)
    scheduler.pin(pinned)
    for names in run(scheduler, 5):
        assert not names & pinned
        assert len(names) == min(scheduler.open_count, 10 - len(pinned))


# ---- errors and registry


def test_start_refuses_twins_and_bad_rates():
    with pytest.raises(ValueError, match=r"unique, got \['a'\]"):
        OpenScheduler().start([UnitInfo("a", 1, 4)] * 2, freeze_rate=0.5, seed=0)
    with pytest.raises(ValueError, match=r"freeze_rate must be in \[0, 1\), got 1.0"):
        OpenScheduler().start(units(2), freeze_rate=1.0, seed=0)


def test_observe_refuses_strangers_and_negative_distances():
    scheduler = started("ils", 3, 0.5)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match=r"no unit is called 'layer.0.weigth' \(did you mean 'layer.0.weight'\?\)"):
        scheduler.observe({"layer.0.weigth": 1.0})
    with pytest.raises(ValueError, match=r"distance of 'layer.0.weight' must be >= 0, got -1.0"):
        scheduler.observe({"layer.0.weight": -1.0})
    with pytest.raises(ValueError, match="pin: no unit is called 'x'"):
        scheduler.pin(frozenset({"x"}))
    assert scheduler.state_dict() == state


def test_load_refuses_the_state_of_another_run():
    scheduler = started("ils", 3, 0.5)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match="state is of scheduler 'RandomScheduler', this one is 'InterLayerScheduler'"):
        scheduler.load_state_dict(started("random", 3, 0.5).state_dict())
    with pytest.raises(ValueError, match=r"other units \(4 there, 3 here\).*unexpected \['layer.3.weight'\]"):
        scheduler.load_state_dict(started("ils", 4, 0.5).state_dict())
    with pytest.raises(ValueError, match="same names, other order"):
        scheduler.load_state_dict({**state, "units": state["units"][::-1]})
    with pytest.raises(ValueError, match="zip"):
        scheduler.load_state_dict({**state, "step": 9, "distances": [1.0]})
    assert scheduler.state_dict() == state


def test_make_scheduler_takes_a_name_a_class_or_an_instance():
    instance = RoundRobinScheduler()
    assert make_scheduler(instance) is instance
    assert type(make_scheduler(RandomScheduler)) is RandomScheduler
    assert set(BUILT_IN) <= set(scheduler_names())
    with pytest.raises(ValueError, match=r"must be one of \['ils', .*got 'round-robin' \(did you mean 'round_robin'\?"):
        make_scheduler("round-robin")
    with pytest.raises(TypeError, match="a name, a Scheduler or a subclass of it, got 3"):
        make_scheduler(3)  # type: ignore[arg-type]


class TopBlocks(Scheduler):
    """The example of the documentation."""

    def select(self):
        return frozenset(unit.name for unit in self.candidates[-self.open_count :])


def test_own_scheduler_needs_select_only():
    register_scheduler("top_blocks", TopBlocks)
    register_scheduler("top_blocks", TopBlocks)  # again: fine
    assert run(started("top_blocks", 5, 0.6), 2) == [{"layer.3.weight", "layer.4.weight"}] * 2


def test_a_registered_scheduler_decides_what_trains():
    register_scheduler("top_blocks", TopBlocks)
    model, session = optimized(Tiny(depth=1), scheduler="top_blocks", freeze_rate=0.8)
    last = frozenset(session.gates.names[-session.scheduler.open_count :])
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for number in range(3):
        model(*tokens(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, param in model.named_parameters() if not torch.equal(before[name], param)}
    assert moved == last | {name for name, _ in session.always_training}
    assert [opened for _, opened in session.gates.history] == [last] * 3
    assert (session.compiles, session.scheduler.step) == (1, 2), "it hears of the third step at the next forward"


def test_register_refuses_nonsense():
    class NoSelect(Scheduler):
        pass

    with pytest.raises(TypeError, match=r"NoSelect must implement \['select'\]"):
        register_scheduler("bad", NoSelect)
    with pytest.raises(TypeError, match="subclass of slimfit_fx.Scheduler, got <class 'int'>"):
        register_scheduler("bad", int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a string, got 1"):
        register_scheduler(1, TopBlocks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be empty"):
        register_scheduler("", TopBlocks)
    with pytest.raises(ValueError, match="'ils' is registered already, as .*InterLayerScheduler"):
        register_scheduler("ils", TopBlocks)


# ---- distances


def test_relative_mean_leaves_zeros_out():
    before = torch.tensor([0.0, 2.0, -4.0, 1e-45])
    after = torch.tensor([5.0, 1.0, -5.0, 1.0])
    assert update_distance(before, after).item() == pytest.approx((0.5 + 0.25) / 2)


def test_relative_norm():
    before, after = torch.tensor([0.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 4.0])
    assert update_distance(before, after, metric="relative_norm").item() == pytest.approx(0.2)


@pytest.mark.parametrize("metric", ["relative_mean", "relative_norm"])
def test_distance_corner_cases(metric):
    zero, one = torch.zeros(3), torch.ones(3)
    assert update_distance(zero, one, metric=metric).item() == math.inf
    assert update_distance(zero, zero, metric=metric).item() == 0.0
    assert update_distance(one, one, metric=metric).item() == 0.0
    assert update_distance(torch.empty(0, 4), torch.empty(0, 4), metric=metric).item() == 0.0
    for bad in (math.nan, math.inf):
        broken = torch.tensor([1.0, 1.0, bad])
        assert math.isnan(update_distance(one, broken, metric=metric).item())
        assert math.isnan(update_distance(broken, one, metric=metric).item())
        assert math.isnan(update_distance(torch.tensor([1.0, 1.0, 0.0]), broken, metric=metric).item())


@pytest.mark.parametrize("metric", ["relative_mean", "relative_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(shape=st.lists(st.integers(1, 9), max_size=3), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_distance_equals_the_definition(metric, dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator).to(dtype)
    after = (before + 0.01 * torch.randn(shape, generator=generator).to(dtype)).to(dtype)
    got = update_distance(before, after, metric=metric)
    assert got.dtype == torch.float32 and got.dim() == 0
    b, a = before.double(), after.double()
    want = ((b - a) / b).abs()[b != 0].mean() if metric == "relative_mean" else (a - b).norm() / b.norm()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("metric", ["relative_mean", "relative_norm"])
def test_distance_in_chunks_equals_the_distance_in_one(metric, monkeypatch):
    before, after = torch.randn(37, 5, 3), torch.randn(37, 5, 3)
    whole = update_distance(before, after, metric=metric)
    monkeypatch.setattr("slimfit_fx.schedule.distance._CPU_CHUNK_NUMEL", 40)
    torch.testing.assert_close(update_distance(before, after, metric=metric), whole)
    swapped = update_distance(before.transpose(0, 1), after.transpose(0, 1), metric=metric)  # no copy of a view
    torch.testing.assert_close(swapped, whole)


def test_distance_refuses():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        update_distance(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"got 'relative_means' \(did you mean 'relative_mean'\?"):
        update_distance(torch.ones(2), torch.ones(2), metric="relative_means")  # type: ignore[arg-type]
