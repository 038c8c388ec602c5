"""The accuracy benchmark: cells, resuming, the choice of learning rates, intervals, bounds, splits, and a small run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from side_work import seeds_as_cells

from bench.accuracy import claims, table
from bench.accuracy.__main__ import chosen_methods, main, parser
from bench.accuracy.cells import (
    FULL,
    GRIDS,
    HEAD,
    LORA,
    METHODS,
    QUICK_METHODS,
    Cell,
    Row,
    learning_rates,
    named_methods,
    slimfit,
)
from bench.accuracy.methods import Trainee
from bench.accuracy.run import best_learning_rate, count_cells, run
from bench.accuracy.side_by_side import train_side_by_side
from bench.accuracy.stats import Interval, interval_of, mean_over_tasks, paired_differences
from bench.accuracy.store import Store
from bench.accuracy.tasks import code, named_tasks
from bench.accuracy.tasks.base import ACCURACY, PERPLEXITY, Recipe, Splits, Task
from bench.accuracy.train import Trainer, fit, rate_factor
from bench.report import ROOT
from slimfit_fx.demo.data import Examples, digits
from slimfit_fx.demo.models import vision_transformer
from slimfit_fx.units import find_units

CPU = torch.device("cpu")
BALANCED = slimfit("balanced", 0.9)


def make_task(name: str = "digits", *, metric=ACCURACY, splits=None, **recipe) -> Task:
    """A task that trains in a moment: 96 digits, a ViT of width 32 with one layer."""
    train, test = digits()

    def part(first, last):
        return Examples({"pixel_values": train.inputs["pixel_values"][first:last]}, train.labels[first:last])

    def load(seed):
        return splits or Splits(part(0, 96), part(96, 160), test)

    settings = {"epochs": 2, "batch": 16, "learning_rate": 1e-3, **recipe}

    def make_model(seed):
        return vision_transformer(10, width=32, layers=1, seed=seed)

    return Task(name, "quick", "tiny", Recipe(**settings), metric, 0.9, make_model, load)


def make_row(cell: Cell, validation: float = 0.5, test: float = 0.5, **changes) -> Row:
    settings = {"loss": 0.1, "steps": 4, "seconds": 2.0, "frozen_share": 0.0, "recompiles": 0, "fingerprint": "f"}
    return Row(cell=cell, validation=validation, test=test, **{**settings, **changes})


def timeless(row: Row) -> Row:
    return dataclasses.replace(row, seconds=0.0)


# ---- cells


def test_every_kind_of_method_tries_as_many_learning_rates():
    assert len({len(grid) for grid in GRIDS.values()}) == 1
    assert learning_rates(FULL, 1e-4) == (1e-4, 2e-4, 4e-4)
    assert learning_rates(FULL, 1e-4, "quick") == (1e-4, 2e-4)
    assert {method.kind for method in METHODS} | {"unpaced"} == set(GRIDS)


def test_the_issue_is_covered():
    names = {method.name for method in METHODS}
    for rate in ("0.80", "0.90", "0.95"):
        assert {f"exact-{rate}-ils", f"balanced-{rate}-ils", f"max-{rate}-ils", f"paper-{rate}-ils_paper"} <= names
        assert {f"balanced-{rate}-ils_paper", f"balanced-{rate}-random", f"balanced-{rate}-round_robin"} <= names
    assert {"full", "head", "lora"} <= names
    assert len(names) == len(METHODS)
    assert set(QUICK_METHODS) < set(METHODS)


def test_unknown_names_are_refused_with_the_legal_ones(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"unknown method: got 'best'; legal: full, balanced-0\.90-ils"):
        named_methods(["best"], METHODS)
    with pytest.raises(ValueError, match="unknown task: got 'mnist'; legal: digits, docstrings, pairs, code"):
        named_tasks(["mnist"], "quick", tmp_path)
    with pytest.raises(ValueError, match="unknown scale: got 'huge'; legal: full, quick"):
        named_tasks([], "huge", tmp_path)
    with pytest.raises(SystemExit):
        main(["--tasks", "mnist"])
    assert "unknown task: got 'mnist'" in capsys.readouterr().err


def test_the_presets_at_the_freeze_rate_of_a_hub_task_are_compared():
    task = dataclasses.replace(make_task(), paper_rate=0.85)
    chosen = chosen_methods(parser().parse_args([]), [task])
    assert {slimfit(preset, 0.85) for preset in ("exact", "paper", "balanced", "max")} <= set(chosen)
    assert len(chosen) == len(METHODS) + 4


# ---- store and run


def test_rows_survive_the_file(tmp_path):
    store, cell = Store(tmp_path / "new" / "rows.jsonl"), Cell("t", "quick", "full", 0, 1e-4)
    row = make_row(cell, validation=1 / 3, test=math.pi)
    store.add_header({"machine": {"cores": 2}})
    store.add(row)
    again = Store(store.path)
    assert again.rows == (row,)
    assert again.find(cell, "f") == row
    assert again.find(cell, "other data") is None
    assert again.find(dataclasses.replace(cell, seed=1), "f") is None


def test_a_torn_line_counts_as_not_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = Store(path)
    rows = [make_row(Cell("t", "quick", "full", seed, 1e-4)) for seed in range(3)]
    store.add(rows[0])
    whole = path.read_bytes()
    store.add(rows[1])
    path.write_bytes(path.read_bytes()[: len(whole) + 25])
    torn = Store(path)
    assert torn.rows == (rows[0],)
    torn.add(rows[2])
    assert Store(path).rows == (rows[0], rows[2])


def test_rows_of_older_data_are_not_shown(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    cells = [Cell("t", "quick", "full", seed, 1e-4) for seed in range(3)]
    for cell in cells:
        store.add(make_row(cell, fingerprint="old"))
    store.add(make_row(cells[1], test=0.9, fingerprint="new"))
    for held in (store, Store(store.path)):
        assert [(row.cell.seed, row.test) for row in held.rows_of("t", "quick")] == [(1, 0.9)]
    assert store.rows_of("t", "full") == ()


class FakeTrainer:
    """Scores by arithmetic, and stops the run after ``limit`` cells."""

    def __init__(self, limit: int = 1000, test=lambda cell: 0.5) -> None:
        self.cells: list[Cell] = []
        self._limit, self._test = limit, test

    def __call__(self, cell: Cell, task: Task, method) -> Row:
        if len(self.cells) == self._limit:
            raise KeyboardInterrupt
        self.cells.append(cell)
        validation = 1.0 - abs(math.log(cell.learning_rate / 2e-3))
        return make_row(cell, validation, self._test(cell), fingerprint=task.fingerprint())


def test_the_best_rate_is_tried_with_the_first_seed_and_trained_with_the_others(tmp_path):
    trainer, task = FakeTrainer(), make_task()
    store = Store(tmp_path / "rows.jsonl")
    run([task], [FULL, BALANCED], [0, 1, 2], store, trainer)
    assert len(trainer.cells) == count_cells([task], [FULL, BALANCED], [0, 1, 2]) == 8
    chosen = [(c.seed, c.learning_rate) for c in trainer.cells if c.method == "full"]
    assert chosen == [(0, 1e-3), (0, 2e-3), (1, 2e-3), (2, 2e-3)]


def test_at_full_scale_three_seeds_choose(tmp_path):
    """The first seed's best rate is not that of the mean of three."""

    class Noisy(FakeTrainer):
        def __call__(self, cell, task, method):
            row = super().__call__(cell, task, method)
            return dataclasses.replace(row, validation=2.0) if (cell.seed, cell.learning_rate) == (0, 4e-3) else row

    trainer, task = Noisy(), dataclasses.replace(make_task(), scale="full")
    store = Store(tmp_path / "rows.jsonl")
    run([task], [FULL], [0, 1, 2, 3], store, trainer)
    assert len(trainer.cells) == count_cells([task], [FULL], [0, 1, 2, 3]) == 10
    assert (trainer.cells[-1].seed, trainer.cells[-1].learning_rate) == (3, 2e-3)
    (standing,) = claims.standings(store.rows, task, [FULL])
    assert standing.learning_rate == 2e-3 and sorted(standing.by_seed) == [0, 1, 2, 3]
    assert claims.standings(store.rows[:4], task, [FULL]) == []  # of the second seed, one rate only


def test_more_seeds_may_choose_than_the_scale_asks_for(tmp_path):
    """The first seed alone would take the larger rate."""

    class Noisy(FakeTrainer):
        def __call__(self, cell, task, method):
            row = super().__call__(cell, task, method)
            low = -2.0 if cell.seed else 2.0
            return dataclasses.replace(row, validation=low) if cell.learning_rate == 2e-3 else row

    task = make_task()
    for tuning, rate, count in ((None, 2e-3, 5), (2, 1e-3, 6), (9, 1e-3, 8)):
        trainer, store = Noisy(), Store(tmp_path / f"{tuning}.jsonl")
        run([task], [FULL], range(4), store, trainer, tuning_seeds=tuning)
        assert len(trainer.cells) == count_cells([task], [FULL], range(4), tuning) == count
        (standing,) = claims.standings(store.rows, task, [FULL])
        assert standing.learning_rate == rate and sorted(standing.by_seed) == [0, 1, 2, 3]


def test_no_learning_rate_is_chosen_by_the_test_split(tmp_path):
    task, orders = make_task(), []
    for name, test in (("a", lambda cell: cell.learning_rate), ("b", lambda cell: -cell.learning_rate)):
        trainer = FakeTrainer(test=test)
        store = Store(tmp_path / name)
        run([task], [FULL], [0, 1], store, trainer)
        orders.append(trainer.cells)
        (standing,) = claims.standings(store.rows, task, [FULL])
        assert standing.learning_rate == 2e-3
    assert orders[0] == orders[1]


def test_choice_of_a_rate():
    assert best_learning_rate({1e-4: 0.8, 2e-4: 0.9, 4e-4: 0.7}, higher_is_better=True) == 2e-4
    assert best_learning_rate({1e-4: 8.0, 2e-4: 9.0, 4e-4: 7.0}, higher_is_better=False) == 4e-4
    assert best_learning_rate({1e-4: 0.9, 2e-4: 0.9}, higher_is_better=True) == 1e-4
    assert best_learning_rate({1e-4: math.nan, 2e-4: 0.1}, higher_is_better=True) == 2e-4
    assert best_learning_rate({1e-4: math.nan, 2e-4: 99.0}, higher_is_better=False) == 2e-4


def test_a_stopped_run_goes_on_with_the_next_cell(tmp_path):
    task, seeds = make_task(), [0, 1]
    whole, store = FakeTrainer(), Store(tmp_path / "whole.jsonl")
    run([task], [FULL, LORA], seeds, store, whole)
    parts: list[Cell] = []
    for _ in range(3):
        trainer = FakeTrainer(limit=3)
        try:
            run([task], [FULL, LORA], seeds, Store(tmp_path / "parts.jsonl"), trainer)
        except KeyboardInterrupt:
            pass
        parts += trainer.cells
    assert parts == whole.cells  # none twice, none left out
    assert Store(tmp_path / "parts.jsonl").rows == store.rows


def test_a_real_run_that_was_stopped_ends_like_one_that_was_not(tmp_path):
    task, methods, seeds = make_task(), [BALANCED], [0]
    whole = Store(tmp_path / "whole.jsonl")
    run([task], methods, seeds, whole, Trainer(device=CPU, executor="interpreter"))

    class Stops(Trainer):
        left = 1

        def __call__(self, *given):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().__call__(*given)

    path = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run([task], methods, seeds, Store(path), Stops(device=CPU, executor="interpreter"))
    assert len(Store(path).rows) == 1
    run([task], methods, seeds, Store(path), Trainer(device=CPU, executor="interpreter"))
    assert [timeless(row) for row in Store(path).rows] == [timeless(row) for row in whole.rows]
    units = len(find_units(task.make_model(0)).units)
    assert all(row.frozen_share == pytest.approx(int(0.9 * units) / units) for row in whole.rows)
    assert all(row.recompiles == 0 and row.steps == 12 for row in whole.rows)


# ---- side by side


def test_pieces_side_by_side_end_in_one_file(tmp_path):
    store, seen = Store(tmp_path / "rows.jsonl"), []
    pieces = [["0", "1"], ["2"], ["7"], ["3"]]
    train_side_by_side(pieces, 2, seeds_as_cells, store, lambda row, is_new: seen.append((row.cell.seed, is_new)))
    assert sorted(seen) == [(0, True), (1, True), (2, True), (3, True), (7, False)]
    assert sorted(row.cell.seed for row in Store(store.path).rows) == [0, 1, 2, 3], "7 was there already"


def test_a_piece_that_fails_ends_the_run_and_loses_nothing(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="this piece fails"):
        train_side_by_side([["0", "!"], *([str(n)] for n in range(1, 9))], 1, seeds_as_cells, store, lambda *_: None)
    assert 0 in {row.cell.seed for row in Store(store.path).rows}


def test_the_processes_end_with_the_one_that_started_them_even_if_that_is_killed(tmp_path):
    script, beats = tmp_path / "parent.py", tmp_path / "beats"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from bench.accuracy.side_by_side import train_side_by_side\nfrom bench.accuracy.store import Store\n"
        "from side_work import beat\n"
        "if __name__ == '__main__':\n"
        "    train_side_by_side([[sys.argv[1]]], 1, beat, Store(Path(sys.argv[1] + '.jsonl')), print)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    parent = subprocess.Popen([sys.executable, str(script), str(beats)], env={**os.environ, "PYTHONPATH": paths})
    wait_until(lambda: beats.exists() and beats.stat().st_size > 3)
    parent.kill()
    parent.wait()

    def is_over() -> bool:
        before = beats.stat().st_size
        time.sleep(1.0)
        return beats.stat().st_size == before

    wait_until(is_over)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@pytest.mark.thorough
def test_two_jobs_train_what_one_does(tmp_path):
    body = vision_transformer(5, width=128, layers=4, seed=0).base_model.state_dict()
    torch.save(body, tmp_path / "digits-128x4-300-split0.pt")  # or the task would train one
    given = ["--quick", "--tasks", "digits", "--methods", "head", "full", "--seeds", "1", "--cache", str(tmp_path)]
    small = Store(tmp_path / "two.jsonl")
    rates = learning_rates(HEAD, 1e-3, "quick")
    (task,) = named_tasks(["digits"], "quick", tmp_path)
    for cell in (Cell("digits", "quick", "full", 0, rate) for rate in learning_rates(FULL, 1e-3, "quick")):
        small.add(make_row(cell, fingerprint=task.fingerprint()))
    before = small.path.read_bytes()
    assert main([*given, "--jobs", "2", "--threads", "1", "--out", str(small.path)]) == 0
    after = small.path.read_bytes()
    assert after.startswith(before), "what was finished is not trained again"
    new = [row for row in Store(small.path).rows if row.cell.method == "head"]
    assert [row.cell.learning_rate for row in new] == list(rates)
    main([*given, "--jobs", "1", "--threads", "1", "--out", str(tmp_path / "one.jsonl"), "--methods", "head"])
    assert [timeless(row) for row in Store(tmp_path / "one.jsonl").rows] == [timeless(row) for row in new]


# ---- training


def fit_once(trainee: Trainee, seed: int):
    model = trainee.begin(seed)
    torch.manual_seed(seed)
    recipe, train = trainee.task.recipe, trainee.task.load(0).train
    fit(model, train, recipe, learning_rate=2e-3, seed=seed, device=CPU, progress=lambda *_: None)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_compiled_model_that_is_used_again_trains_as_a_fresh_one_does():
    task = make_task()
    shared = Trainee(task, BALANCED, device=CPU, executor="interpreter")
    first = fit_once(shared, 0)
    second = fit_once(shared, 1)
    again = fit_once(shared, 0)
    fresh = fit_once(Trainee(task, BALANCED, device=CPU, executor="interpreter"), 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(second[name], fresh[name]) for name in second)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [HEAD, LORA])
def test_rivals_train_what_they_say(kind):
    task = make_task()
    model = Trainee(task, kind, device=CPU, executor="interpreter").begin(0)
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    if kind is HEAD:
        assert trains == {"classifier.weight", "classifier.bias"}
    else:
        outside = {name for name in trains if "lora_" not in name}
        assert all("classifier" in name for name in outside) and len(outside) == 2
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trains if "lora_" in name}
        assert len(adapted) == 6  # query, key, value, output and the two of the MLP
    loss = model(**task.load(0).train[slice(0, 8)]).loss
    loss.backward()
    assert all((param.grad is not None) == param.requires_grad for param in model.parameters())


def test_a_training_that_diverges_ends_and_scores_nan():
    task = make_task()
    cell = Cell("digits", "quick", "full", 0, 1e30)
    row = Trainer(device=CPU, executor="interpreter")(cell, task, FULL)
    assert math.isnan(row.validation) and math.isnan(row.test) and row.steps < 12


def test_the_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True) and 0 < factors[-1] < 0.1
    assert rate_factor(0, 20, 0.0) == 1.0


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    model = code.language_model(50, seed=0, width=64, layers=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    pieces = torch.randint(0, 50, (10, 16), generator=torch.Generator().manual_seed(0))
    found = PERPLEXITY.score(model, Examples({"input_ids": pieces}, pieces), CPU)
    assert found == pytest.approx(50.0, rel=1e-4)


def test_accuracy_counts():
    labels = torch.tensor([0, 1, 1, 0, 1])

    class Says(torch.nn.Module):
        def forward(self, x, labels=None):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(x, 2).float()})

    said = torch.tensor([0, 1, 0, 0, 0])
    assert ACCURACY.score(Says(), Examples({"x": said}, labels), CPU) == pytest.approx(0.6)


# ---- statistics


def test_interval_is_students():
    found = interval_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0 and found.count == 5
    # t(0.975, 4 degrees of freedom) = 2.776445, standard deviation sqrt(2.5)
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert interval_of([1.0, 1.2]).half_width == pytest.approx(12.706205 * 0.1, rel=1e-6)
    assert math.isnan(interval_of([2.0]).half_width)
    assert found.scaled(-2) == Interval(-6.0, 2 * found.half_width, 5)
    with pytest.raises(ValueError, match="at least one value, got none"):
        interval_of([])


def test_differences_are_paired_by_seed():
    assert paired_differences({0: 3.0, 2: 5.0, 1: 1.0}, {2: 4.0, 0: 1.0, 7: 9.0}) == (2.0, 1.0)
    assert mean_over_tasks([{0: 1.0, 1: 2.0}, {1: 4.0, 0: 3.0, 2: 9.0}]) == (2.0, 3.0)
    assert mean_over_tasks([]) == mean_over_tasks([{0: 1.0}, {}]) == ()


def finished(task: Task, scores: dict) -> list[claims.Standing]:
    """Standings of methods with these test scores (points) by seed."""
    rows, worse = [], 0.5 if task.metric.higher_is_better else 2.0
    for method, by_seed in scores.items():
        rates = learning_rates(method, task.recipe.learning_rate, task.scale)
        for seed, points in by_seed.items():
            for rate in rates if seed == 0 else rates[:1]:
                cell = Cell(task.name, task.scale, method.name, seed, rate)
                rows.append(make_row(cell, 1.0 if rate == rates[0] else worse, points / 100))
    return claims.standings(rows, task, list(scores))


def three_tasks(balanced: tuple[float, ...]) -> list[claims.Claim]:
    tasks = [make_task(name) for name in ("digits", "docstrings", "pairs")]
    found = {
        task.name: finished(task, {FULL: {0: 90.0, 1: 92.0}, BALANCED: {0: 90.0 + gain, 1: 92.0 + gain}})
        for task, gain in zip(tasks, balanced, strict=True)
    }
    return claims.claims(found, tasks)


def test_bounds_hold_or_say_by_how_much_they_fall_short():
    mean, worst, maximum, *_ = three_tasks((0.1, -0.1, -0.3))
    assert (mean.verdict, worst.verdict, maximum.verdict) == ("holds", "holds", "not measured")
    assert mean.points.mean == pytest.approx(-0.1) and worst.points.mean == pytest.approx(-0.3)
    mean, worst, *_ = three_tasks((0.0, 0.0, -0.9))
    assert (mean.verdict, worst.verdict) == ("short by 0.10", "short by 0.50")


def test_an_interval_that_cannot_decide_says_so():
    assert claims.Claim("x", -0.2, Interval(0.1, 0.5, 3)).verdict == "holds; the interval lies on both sides"
    assert claims.Claim("x", -0.2, Interval(-0.3, 0.5, 3)).verdict == "short by 0.10; the interval lies on both sides"


def test_lower_perplexity_is_a_gain():
    task = make_task("code", metric=PERPLEXITY)
    found = finished(task, {FULL: {0: 900.0, 1: 910.0}, LORA: {0: 800.0, 1: 805.0}})
    assert claims.gains(found, task, "lora", "full") == {0: pytest.approx(1.0), 1: pytest.approx(1.05)}


def test_a_method_counts_only_when_its_whole_grid_is_tried():
    task = make_task()
    rates = learning_rates(FULL, 1e-3, "quick")
    rows = [make_row(Cell("digits", "quick", "full", 0, rate)) for rate in rates]
    assert claims.standings(rows[:1], task, [FULL]) == []
    assert [s.learning_rate for s in claims.standings(rows, task, [FULL])] == [rates[0]]


def test_the_tables_state_every_figure():
    task = make_task()
    found = finished(task, {FULL: {0: 90.0, 1: 92.0}, BALANCED: {0: 89.5, 1: 92.5}, HEAD: {0: 50.0}})
    shown = table.report([task], {task.name: found}, claims.claims({task.name: found}, [task]))
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "91.00 +- 12.71" in lines["full"] and "0.001" in lines["full"]
    assert "+0.00 +- 6.35" in lines["balanced-0.90-ils"]
    assert "50.00" in lines["head"] and "-40.00" in lines["head"] and "-40.00 +-" not in lines["head"]
    assert "not measured" in shown and "balanced against full, worst task" in shown


def test_the_command_only_prints_with_table(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    store = Store(out)
    for rate in learning_rates(FULL, 1e-3):
        store.add(make_row(Cell("digits", "quick", "full", 0, rate), test=0.875))
    before = out.read_bytes()
    assert main(["--quick", "--tasks", "digits", "--table", "--out", str(out)]) == 0
    assert "87.50" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert json.loads(before.splitlines()[0])["cell"]["task"] == "digits"


def test_the_fingerprint_tells_recipes_and_data_apart():
    task = make_task()
    splits = task.load(0)
    fewer = Splits(splits.train, splits.validation, Examples(splits.validation.inputs, splits.validation.labels))
    found = {
        task.fingerprint(), make_task(epochs=3).fingerprint(), make_task("other").fingerprint(),
        make_task(splits=fewer).fingerprint(),
    }  # fmt: skip
    assert len(found) == 4
    assert task.fingerprint() == make_task().fingerprint()
