"""What must hold for every model: drawn by hypothesis, held against the same graph compiled without us."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from effort import examples
from graphs import Stop, copy_seam, texts, watching
from hypothesis import Phase, example, find, given, settings
from hypothesis import strategies as st
from reference import compile_reference, cosine, differences, equal_bits, optimized, step
from strategies import Spec, build, inputs, specs

from slimfit_fx.graph.joint import STATIC, JointGraph, backward_closure, forward_needs
from slimfit_fx.passes.liveness import SERVES
from slimfit_fx.passes.outline_repeats import outline_repeats
from slimfit_fx.presets import RECOMPUTE_SHARES
from slimfit_fx.schedule import OpenScheduler

REWRITES = (
    "simplify_joint",
    "split_gradients",
    "insert_codecs",
    "insert_gates",
    "sink_backward",
    "delay_products",
    "hold_recompute",
    "outline_repeats",
)
"""Passes that change graphs. The others tag, decide, or make new graphs (split_joint)."""
AGAIN = st.sampled_from(
    [{"recompute": level, "recompute_share": s} for level, shares in RECOMPUTE_SHARES.items() for s in shares]
)


def ours(spec: Spec, **changes):
    """(model, session) of a spec, with every gate open until ``close`` is called."""
    chosen = {"scheduler": "none", "preset": "exact", "min_bytes": 0, "dynamic": spec.dynamic, "units": spec.is_unit}
    return optimized(build(spec), **{**chosen, **changes})


def run(spec: Spec, call, model, *, batch=None):
    torch.manual_seed(1)
    data = inputs(spec, batch=batch)
    with spec.context():
        return step(call, model, data)


def pattern_of(names, seed: int) -> list[str]:
    """A subset of the units to close: all, one, or a random half."""
    chooser = random.Random(seed)
    kinds = [lambda: list(names), lambda: [chooser.choice(names)], lambda: [n for n in names if chooser.random() < 0.5]]
    return kinds[seed % 3]()


def close(session, names) -> frozenset[str]:
    session.unfreeze()
    if names:
        session.freeze(list(names))
    return frozenset(names)


def alike_whatever_is_closed(spec: Spec, model, session, seed: int, expected_loss, expected) -> None:
    """Under three patterns: the loss, and the gradients of open units, bit for bit; closed units have none."""
    for number in range(3):
        closed = close(session, pattern_of(session.gates.names, seed + number))
        model.load_state_dict(build(spec).state_dict())
        loss, grads = run(spec, model, model)
        assert equal_bits(expected_loss, loss)
        assert differences(expected, grads, closed=closed) == []


# ---- gradients


@settings(max_examples=examples(30, share=10))
@given(spec=specs(), seed=st.integers(0, 2**16), again=AGAIN)
@example(spec=Spec(("linear", "batchnorm", "linear"), sizes="all"), seed=0, again={})
@example(spec=Spec(("plain layernorm", "image convolution"), tokens=False, break_at=1, sizes="all"), seed=0, again={})
@example(spec=Spec(("attention masked by content", "attention that is handed a causal mask")), seed=0, again={})
def test_gradients_are_those_of_torch(spec, seed, again):
    """All gates open: bit for bit what torch computes. Any pattern: the same for open units, None for closed."""
    torch._dynamo.reset()
    reference = build(spec)
    expected_loss, expected = run(spec, compile_reference(reference, dynamic=spec.dynamic), reference)
    model, session = ours(spec, **again)
    loss, grads = run(spec, model, model)
    assert equal_bits(expected_loss, loss)
    assert differences(expected, grads) == []
    buffers = dict(model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in reference.named_buffers())
    alike_whatever_is_closed(spec, model, session, seed, expected_loss, expected)
    assert session.recompiles == 0


class StaysOpen(OpenScheduler):
    """Opens every unit, under a freeze rate: plans reckon with closed units, and the test says which are."""


PAID = (
    Spec(("fused attention", "layernorm") * 3),
    Spec(("attention masked by content", "gelu") * 3),
    Spec(("attention that is handed a causal mask", "masked") * 3),
)
"""Products or blocks of these run again, in the examples below."""


@settings(max_examples=examples(20, share=10))
@given(
    spec=specs(max_layers=4, repeats=(2, 3, 4)),
    preset=st.sampled_from(("exact", "balanced", "max")),
    rate=st.sampled_from((0.7, 0.95)),
    seed=st.integers(0, 2**16),
)
@example(spec=PAID[0], preset="exact", rate=0.7, seed=0)
@example(spec=PAID[1], preset="exact", rate=0.95, seed=1)
@example(spec=PAID[2], preset="balanced", rate=0.7, seed=2)
def test_whatever_auto_runs_again_changes_no_gradient(spec, preset, rate, seed):
    """Levels that closed units pay for: bits of torch without codecs, with them those of all gates open."""
    torch._dynamo.reset()
    model, session = ours(
        spec, preset=preset, scheduler=StaysOpen, freeze_rate=rate, recompute="auto", debug=seed % 2 == 0
    )
    expected_loss, expected = run(spec, model, model)
    assert any('recompute "auto"' in note for note in session.plan.notes) or spec not in PAID
    if preset == "exact":
        reference = build(spec)
        expected_loss, expected = run(spec, compile_reference(reference, dynamic=spec.dynamic), reference)
    alike_whatever_is_closed(spec, model, session, seed, expected_loss, expected)
    assert session.recompiles == 0


@settings(max_examples=examples(20))
@given(spec=specs(), seed=st.integers(0, 2**16), again=AGAIN)
def test_no_ghost_is_ever_read(spec, seed, again):
    """In debug mode ghosts hold NaN: whoever reads one, passes it on."""
    torch._dynamo.reset()
    reference = build(spec)
    expected_loss, expected = run(spec, compile_reference(reference, dynamic=spec.dynamic), reference)
    model, session = ours(spec, debug=True, **again)
    alike_whatever_is_closed(spec, model, session, seed, expected_loss, expected)


# ---- passes and liveness


THREE_BLOCKS = Spec(("ffn",) * 3)
NORMED = Spec(("linear", "layernorm", "ffn", "layernorm", "ffn"))


@settings(max_examples=examples(20, share=10))
@given(
    spec=specs(),
    preset=st.sampled_from(("exact", "balanced", "max", "paper")),
    again=AGAIN,
)
@example(spec=THREE_BLOCKS, preset="balanced", again={})
def test_a_second_run_of_a_pass_changes_nothing(spec, preset, again):
    """The interpreter has no blocks outlined: that pass runs on a copy of what it would get."""
    seen = set()

    def watch(step, work):
        if step.name == "tag_liveness":
            tags = tags_of(work.joint)
            step.run(work)
            assert tags_of(work.joint) == tags
        elif step.name == "outline_repeats":
            copied = dataclasses.replace(work, seam=copy_seam(work.pair()))
            assert outline(copied) or spec != THREE_BLOCKS
            changes_nothing(step.name, outline, copied)
        elif step.name in REWRITES:
            cones = work.cones
            changes_nothing(step.name, step.run, work)
            work.cones = cones
        seen.add(step.name)

    torch._dynamo.reset()
    model, session = ours(spec, preset=preset, **again)
    with watching(watch), pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimfit_fx.passes.outline_repeats.FEWEST_SAVED", 4)
        run(spec, model, model)
    assert seen >= {"tag_liveness", *REWRITES}
    assert not session.plan.notes


def outline(work) -> int:
    return outline_repeats(work.seam.forward, spare_kernels=True) + outline_repeats(work.seam.backward)


def changes_nothing(name, run, work) -> None:
    before = texts(work)
    assert run(work) == 0, f"{name} found something to do twice"
    assert texts(work) == before


def tags_of(joint: JointGraph) -> dict[str, frozenset[int]]:
    return {node.name: node.meta[SERVES] for node in joint.graph.nodes if node.op != "output"}


def surviving(joint: JointGraph, closed: set[int]) -> set[str]:
    """Forward values that backward reads when the gradients of ``closed`` are deleted and dead code is removed."""
    graph, copied = torch.fx.Graph(), {}
    results = graph.graph_copy(joint.graph, copied)
    gates = [None] * joint.num_fwd_outputs + joint.grads
    graph.output(tuple(None if gate in closed else r for r, gate in zip(results, gates, strict=True)))
    graph.eliminate_dead_code()
    alive = set(graph.nodes)
    backward, forward = backward_closure(joint), forward_needs(joint)
    late = {n for n in joint.graph.nodes if n.op != "output" and (n in backward or n not in forward)}
    return {
        node.name
        for node in joint.graph.nodes
        if node in forward and node not in backward and any(u in late and copied[u] in alive for u in node.users)
    }


@settings(max_examples=examples(25, share=9))
@given(spec=specs(sizes=("static",)), seed=st.integers(0, 2**16))
def test_liveness_is_what_dead_code_elimination_finds(spec, seed):
    """A forward value is needed in backward exactly if it serves a gradient that is left."""
    checked = []

    def watch(step, work):
        if step.name != "tag_liveness":
            return
        joint, chooser = work.joint, random.Random(seed)
        backward, forward = backward_closure(joint), forward_needs(joint)
        tags = {n.name: n.meta[SERVES] for n in joint.graph.nodes if n in forward and n not in backward}
        gates = set(joint.grads)
        some = ({g for g in gates if chooser.random() < 0.5} for _ in range(5))
        for closed in (set(), gates - {STATIC}, gates, *some):
            assert surviving(joint, closed) == {name for name, tag in tags.items() if tag - closed}
            checked.append(closed)

    torch._dynamo.reset()
    model, _ = ours(spec)
    with watching(watch):
        run(spec, model, model)
    assert checked


def shared_cones(spec: Spec) -> list[int]:
    """How many gates open each cone that is there for what several gradients read; the compile ends there."""
    found: list[int] = []

    def watch(step, work):
        if step.name == "insert_gates":
            found.extend(len(cone.gates) for cone in work.cones.cones if cone.output is None)
            raise Stop

    torch._dynamo.reset()
    model, _ = ours(spec)
    with watching(watch), pytest.raises(Exception, match="Stop"):
        run(spec, model, model)
    return found


@pytest.mark.parametrize(("least", "gates"), [(1, 2), (1, 1), pytest.param(3, 2, marks=pytest.mark.thorough)])
def test_models_are_drawn_whose_units_share_work(least, gates):
    """Else none of these tests would see a cone on the OR of several gates, cones inside of cones, or early parts."""
    quickly = settings(max_examples=40, phases=[Phase.generate], database=None)
    find(
        specs(sizes=("static",), max_layers=4),
        lambda s: sum(min(count, 2) == gates for count in shared_cones(s)) >= least,
        settings=quickly,
        random=random.Random(0),
    )


# ---- codecs


@settings(max_examples=examples(15, share=7))
@given(spec=specs(max_layers=3), preset=st.sampled_from(("balanced", "max", "paper")))
def test_lossy_codecs_change_gradients_a_little(spec, preset):
    torch._dynamo.reset()
    exact, lossy = ours(spec)[0], ours(spec, preset=preset)[0]
    expected_loss, expected = run(spec, exact, exact)
    loss, grads = run(spec, lossy, lossy)
    assert equal_bits(expected_loss, loss), "codecs must not touch the forward"
    assert {n for n, g in grads.items() if g is None} == {n for n, g in expected.items() if g is None}
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert cosine(expected, grads) > {"balanced": 0.97, "max": 0.8, "paper": 0.8}[preset]


@settings(max_examples=examples(15, share=7))
@given(
    spec=specs(max_layers=4),
    preset=st.sampled_from(("balanced", "max", "paper")),
    seed=st.integers(0, 2**16),
    again=AGAIN,
)
@example(spec=NORMED, preset="paper", seed=2, again={})
def test_lossy_gradients_do_not_depend_on_what_is_closed(spec, preset, seed, again):
    """Those of an open unit: also where a value is stored twice, and whole only while a unit reads it."""
    torch._dynamo.reset()
    model, session = ours(spec, preset=preset, debug=True, **again)
    expected_loss, expected = run(spec, model, model)
    assert any(row.kind == "normalised_static" for row in session.plan.rows) or (spec, preset) != (NORMED, "paper")
    alike_whatever_is_closed(spec, model, session, seed, expected_loss, expected)
