"""The interpreter's timeline is known to the byte: every allocation and release of a step, in its order.

Models are drawn at random, with any gates open. The allocator's own events of a real step are held against the events
of the walk through the graphs (planning/graph_run.py). One thread: several would free their temporaries in any order.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import optimized
from strategies import Spec, build, inputs, specs

from bench.measure import Event as Measured
from bench.measure import recorded_step
from slimfit_fx.capture.backend import step_trace
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


def measured_events(spec: Spec, model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> list[Measured]:
    """What the allocator does in one step; the step before it has flipped the gates and warmed up libraries."""

    def forward() -> torch.Tensor:
        with spec.context():
            return model(*batch)

    for _ in range(2):
        model.zero_grad(set_to_none=True)
        events = recorded_step(forward, lambda loss: loss.backward())
    return events


def predicted_events(session: Session) -> list[int]:
    traced = step_trace(latest_graphs(session.backend.graphs))
    assert not isinstance(traced, str), traced
    trace, names = traced
    chosen = frozenset(k for k, name in enumerate(names) if name in session.gates.open)
    return [e.delta_bytes for e in trace.events if happens(e, chosen) and (e.branch is None or e.branch in chosen)]


@settings(max_examples=60)
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
    found = measured_events(spec, model, batch)
    expected = predicted_events(session)
    assert [e.delta_bytes for e in found] == expected, f"closed: {closed}"
    assert session.predict_peak().peak_bytes == max(itertools.accumulate(expected))
