"""Plans and budgets count on what a scheduler never opens together."""

from __future__ import annotations

import pytest
import torch
from reference import optimized
from reference import step as step_of
from small_models import WIDTH, Tiny, tokens
from test_plan_table import row
from torch import nn

import slimfit_fx
from slimfit_fx.beside_steps import worst_for_the_update
from slimfit_fx.planning.budget import Budget, FixedBytes, fixed_bytes, held_alone
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.units import GateUnit


class Lopsided(Tiny):
    """Its embedding weighs as much as ten other matrices."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.embed = nn.Embedding(640, WIDTH)


def trained(scheduler: str, steps: int = 30) -> tuple[slimfit_fx.Session, list[int], list[int]]:
    """Peak and optimizer's step of each step, as predicted for the units that were open in it."""
    model, session = optimized(Lopsided(), scheduler=scheduler, freeze_rate=0.75, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    peaks, updates = [], []
    for number in range(steps):
        step_of(model, model, tokens(number))
        peaks.append(session.predict_peak().peak_bytes)
        updates.append(session.predict_update())
        optimizer.step()
    return session, peaks, updates


@pytest.mark.thorough
def test_no_step_exceeds_the_plan_and_that_of_ils_is_smaller():
    bounds = {}
    for name in ("ils", "ils_paper"):
        session, peaks, updates = trained(name)
        peak, timeline = session.plan.peak, session.plan.timeline
        assert peak is not None and timeline is not None
        assert max(peaks) <= peak.worst_bytes and max(updates) <= timeline.update[1]
        assert any("embed.weight" in units for _, units in session.gates.history), "the heaviest step was among them"
        said = f"worst choice of {peak.open_count} open units" + (" with at most" if name == "ils" else "")
        assert (said in str(session.plan)) and ("MB of gradients" in str(session.plan)) == (name == "ils")
        bounds[name] = peak.worst_bytes, timeline.update[1]
    beside_it = 640 * WIDTH * 4 // 4  # at least: no five large matrices beside the embedding
    assert bounds["ils"][0] < bounds["ils_paper"][0]
    assert bounds["ils"][1] < bounds["ils_paper"][1] - beside_it


def test_graphs_know_the_gradients_of_their_gates():
    """For the trace and for the plan, which tells before any code is written."""
    session, _, _ = trained("ils", steps=1)
    (graph,) = session._backend.graphs
    model = session._model()
    assert model is not None and graph.plan is not None
    sizes = tuple(model.get_parameter(name).numel() * 4 for name in graph.unit_names)
    trace = graph.trace()
    assert not isinstance(trace, str)
    assert graph.plan.gate_bytes == trace.gate_bytes == sizes


def test_what_is_beside_a_step_counts_gradients_up_to_the_level():
    model = nn.Linear(10, 10)
    sizes = [200, 190]
    any_two = fixed_bytes(model, sizes, 2, optimizer_state=7, copies=[5, 100], temporaries=0)
    level = fixed_bytes(model, sizes, 2, optimizer_state=7, copies=[5, 100], temporaries=0, most_open_bytes=200)
    assert (any_two.gradients, any_two.update, any_two.most_open_bytes) == (440, 440 + 105, None)
    assert (level.gradients, level.update, level.most_open_bytes) == (250, 250 + 105, 200)
    roomy = fixed_bytes(model, sizes, 1, optimizer_state=7, copies=[5, 100], temporaries=0, most_open_bytes=390)
    assert (roomy.gradients, roomy.update) == (250, 50 + 290), "no more than of any choice"


@pytest.mark.parametrize(
    ("most", "opened", "expected"),
    [
        (None, 3, [90, 50, 40]),
        (90, 3, [90, 2, 1]),
        (100, 3, [90, 50, 1]),
        (1000, 3, [90, 50, 40]),
        (100, 1, [90]),
        (0, 2, [90, 1]),
    ],
)
def test_the_update_is_judged_by_the_largest_units_that_take_as_much(most, opened, expected):
    units = [GateUnit(f"u{size}", (f"u{size}",), size // 4, size) for size in (1, 40, 2, 90, 50)]
    assert [unit.bytes for unit in worst_for_the_update(units, opened, most)] == expected


def test_saved_bytes_of_units_that_are_never_open_together_are_not_taken_for_held():
    rows = tuple(
        row(gates=(gate,), bytes_open=size, bytes_closed=0) for gate, size in (("0", 100), ("1", 90), ("2", 50))
    )
    fixed = FixedBytes(5, 1, 4, 0, most_open_bytes=80)

    def held(gate_bytes: tuple[int, ...], beside: FixedBytes = fixed) -> int:
        return held_alone(GraphPlan(rows, (), (0, 1, 2), gate_bytes=gate_bytes), Budget(0, 2, lambda _: beside))

    assert held((40, 40, 40)) == 10 + int(0.9 * 190)
    assert held((70, 40, 10)) == 10 + int(0.9 * 150), "the first and the last"
    assert held(()) == held((70, 40, 10), FixedBytes(5, 1, 4, 0)) == 10 + int(0.9 * 190), "not known: any two"
