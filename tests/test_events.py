"""The interpreter's timeline is known to the byte: every allocation and release of a step, in its order.

Models are drawn at random, with any gates open. The allocator's own events of a real step are held against the events
of the walk through the graphs (planning/graph_run.py). One thread: several would free their temporaries in any order.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from strategies import Spec, build, inputs, specs

from bench.measure import Event as Measured
from bench.measure import recorded_step
from slimfit_fx.capture.captured import step_trace
from slimfit_fx.planning.peak import happens
from slimfit_fx.session import Session, latest_graphs

SMALLER = {"sizes": ("static", "static", "batch"), "max_layers": 3}


def prepared(spec: Spec, preset: str) -> tuple[torch.nn.Module, Session, tuple[torch.Tensor, ...]]:
    """The model after one step, which compiled it."""
    torch._dynamo.reset()
    model, session = optimized(build(spec), scheduler="none", preset=preset, units=spec.is_unit)
    batch = inputs(spec)
    with spec.context():
        model(*batch).backward()
    return model, session, batch


def measured_events(
    spec: Spec, model: torch.nn.Module, session: Session, batch: tuple[torch.Tensor, ...]
) -> list[Measured]:
    """What the allocator does in one step, its gates flipped before."""

    def forward() -> torch.Tensor:
        with spec.context():
            return model(*batch)

    model.zero_grad(set_to_none=True)
    session.before_forward()
    return recorded_step(forward, lambda loss: loss.backward())


def predicted_events(session: Session) -> list[int]:
    traced = step_trace(latest_graphs(session.backend.graphs))
    assert not isinstance(traced, str), traced
    trace, names = traced
    chosen = frozenset(k for k, name in enumerate(names) if name in session.gates.open)
    return [e.delta_bytes for e in trace.events if happens(e, chosen) and (not e.branch or e.branch & chosen)]


@pytest.mark.slow
@settings(max_examples=examples(25, share=9))
@given(
    spec=specs(**SMALLER),
    head=st.sampled_from(("loss", "tied to the embedding")),
    preset=st.sampled_from(("exact", "balanced", "max", "paper")),
    data=st.data(),
)
def test_the_timeline_is_that_of_the_allocator(spec, head, preset, data):
    spec = dataclasses.replace(spec, head=head, break_at=None)
    model, session, batch = prepared(spec, preset)
    names = sorted(session.gates.names)
    closed = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))
    if closed:
        session.freeze(closed)
    found = measured_events(spec, model, session, batch)
    expected = predicted_events(session)
    assert [e.delta_bytes for e in found] == expected, f"closed: {closed}"
    assert session.predict_peak().peak_bytes == max(itertools.accumulate(expected))


@pytest.mark.thorough
@pytest.mark.slow
@settings(max_examples=3)
@given(spec=specs(**SMALLER), preset=st.sampled_from(("exact", "max")))
def test_no_choice_of_gates_exceeds_the_bound(spec, preset):
    check_every_choice(dataclasses.replace(spec, head="loss", break_at=None, every_parameter=True), preset, most=4)


@pytest.mark.parametrize(
    "spec", [Spec(("ffn",)), Spec(("linear",), tokens=False, every_parameter=True)], ids=["ffn", "shared"]
)
def test_no_choice_of_three_gates_exceeds_the_bound(spec):
    check_every_choice(spec, "exact", most=3)


def check_every_choice(spec: Spec, preset: str, *, most: int) -> None:
    """All patterns of up to ``most`` gates, each run and measured."""
    units = [name for name, param in build(spec).named_parameters() if param.requires_grad][-most:]
    torch._dynamo.reset()
    model, session = optimized(build(spec), scheduler="none", preset=preset, units=lambda name, _: name in units)
    batch = inputs(spec)
    with spec.context():
        model(*batch).backward()
    trace, names = step_trace(latest_graphs(session.backend.graphs))
    reached: dict[int, int] = {}
    for pattern in itertools.product((False, True), repeat=len(names)):
        session.unfreeze()
        closed = [name for name, is_open in zip(names, pattern, strict=True) if not is_open]
        if closed:
            session.freeze(closed)
        peak = max(itertools.accumulate(e.delta_bytes for e in measured_events(spec, model, session, batch)))
        assert peak == session.predict_peak().peak_bytes
        count = sum(pattern)
        assert peak <= trace.worst(count)[0], f"open: {pattern}"
        reached[count] = max(reached.get(count, 0), peak)
    assert reached[0] == trace.worst(0)[0] and reached[len(names)] == trace.worst(len(names))[0]


@pytest.mark.parametrize("layers", [("ffn", "attention"), ("convolution", "layernorm")])
def test_graph_breaks_are_followed(layers):
    """Gradients that one graph hands to another are counted once; its results are taken to be kept: a bound."""
    spec = Spec(layers, break_at=1)
    model, session, batch = prepared(spec, "exact")
    assert len(session.backend.graphs) > 1
    peak = max(itertools.accumulate(e.delta_bytes for e in measured_events(spec, model, session, batch)))
    handed_over = batch[0].numel() * spec.width * 4
    assert peak <= session.predict_peak().peak_bytes <= peak + handed_over
