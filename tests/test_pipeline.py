"""The list of passes and its runner: order, stages, what may be switched off, and what an illegal graph says."""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
from distributed_worker import Stack
from effort import first
from graphs import ATEN, Chain, chain_input
from reference import compile_reference, differences, equal_bits, optimized, step
from small_models import Tiny, tokens

import slimfit_fx
from slimfit_fx.capture.partitioner import settings_of
from slimfit_fx.config import Config
from slimfit_fx.passes import pipeline
from slimfit_fx.passes.pipeline import build_pipeline, pass_names
from slimfit_fx.passes.verify import SEAM_RULES

CLOSED = ("blocks.0.up.weight", "blocks.0.norm.weight", "embed.weight")


def listed():
    return build_pipeline(settings_of(Config()))


# ---- the list


def test_the_order_of_the_passes():
    """Update this list, and docs/architecture.md, when you add a pass."""
    assert [(step.name, step.stage, step.needed) for step in listed()] == [
        ("simplify_joint", "captured", False),
        ("split_gradients", "captured", False),
        ("tag_liveness", "captured", True),
        ("plan_saved_values", "captured", False),
        ("split_joint", "split", True),
        ("insert_codecs", "compressed", False),
        ("insert_gates", "gated", False),
        ("sink_backward", "gated", False),
        ("delay_products", "gated", False),
        ("hold_recompute", "gated", False),
        ("lay_out_masks", "gated", False),
        ("describe_plan", "gated", True),
        ("outline_repeats", "outlined", False),
        ("tile_blocks", "outlined", False),
        ("hand_over_parts", "outlined", False),
    ]


def test_what_is_not_needed_may_be_switched_off():
    assert pass_names() == ("simplify_masks", *(step.name for step in listed() if not step.needed))


def test_every_stage_has_rules_and_stages_come_in_their_order():
    order = ["captured", *SEAM_RULES]
    stages = [order.index(step.stage) for step in listed()]
    assert stages == sorted(stages) and set(stages) == set(range(len(order)))


# ---- switched off by name


@functools.cache
def reference_step():
    """(loss, gradients) without us."""
    reference = Stack()
    return step(compile_reference(reference), reference, tokens())


def held_against_the_reference(**settings):
    """(differences of gradients for some closed units, session); the loss must be equal bit for bit."""
    model, session = optimized(Stack(), preset="exact", scheduler="none", min_bytes=0, **settings)
    session.freeze(CLOSED)
    expected_loss, expected = reference_step()
    loss, grads = step(model, model, tokens())
    assert equal_bits(expected_loss, loss)
    return differences(expected, grads, closed=set(CLOSED)), session


ELSEWHERE = ("simplify_masks", "split_gradients", "lay_out_masks", "outline_repeats", "tile_blocks", "hand_over_parts")
"""They find nothing to do in this model with the interpreter: make test-all switches them off one by one."""
BY_EFFECT = sorted(pass_names(), key=lambda name: name in ELSEWHERE)


@pytest.mark.parametrize("name", first(BY_EFFECT, len(BY_EFFECT) - len(ELSEWHERE)))
def test_without_one_pass_gradients_are_the_same_bits(name, caplog):
    caplog.set_level(logging.DEBUG, "slimfit_fx.passes")
    wrong, session = held_against_the_reference(disabled_passes=(name,))
    assert wrong == []
    ran = [record.args[0] for record in caplog.records if record.name == "slimfit_fx.passes"]
    assert ran == [step.name for step in listed() if step.name != name]
    assert not session.plan.notes and bool({u.name for u in session.plan.units if u.gated}) == (name != "insert_gates")


def test_without_all_of_them_gradients_are_the_same_bits():
    wrong, session = held_against_the_reference(disabled_passes=pass_names())
    assert wrong == [] and not any(unit.gated for unit in session.plan.units)


@pytest.mark.parametrize("name", ["split_joint", "no_such_pass"])
def test_what_is_needed_or_unknown_cannot_be_switched_off(name):
    legal = r"disabled_passes: a name must be one of \['delay_products', 'hand_over_parts', .*\]"
    with pytest.raises(ValueError, match=f"{legal}, got '{name}'"):
        slimfit_fx.optimize(Tiny(depth=1), disabled_passes=("sink_backward", name))


# ---- an illegal graph


def breaking(monkeypatch, name: str, damage) -> None:
    """Let pass ``name`` do ``damage(work)`` after its own work."""
    original = pipeline.build_pipeline

    def broken(step):
        def run(work):
            count = step.run(work)
            damage(work)
            return count

        return dataclasses.replace(step, run=run) if step.name == name else step

    monkeypatch.setattr(pipeline, "build_pipeline", lambda settings: tuple(map(broken, original(settings))))


def misorder(graph) -> None:
    """A node before its input."""
    node = next(n for n in graph.nodes if any(i.op == "call_function" for i in n.all_input_nodes))
    node.all_input_nodes[0].prepend(node)


DAMAGES = {
    "simplify_joint": (
        lambda work: misorder(work.joint.graph),
        r"after pass simplify_joint \(before it: none\): illegal captured graph: joint graph does not lint",
    ),
    "split_joint": (
        lambda work: work.pair().saved()[0][1].meta.update(val=None),
        r"after pass split_joint \(before it: simplify_joint, split_gradients, tag_liveness, plan_saved_values\): "
        r"illegal split graph: "
        "saved value .* has no example tensor",
    ),
    "insert_codecs": (
        lambda work: misorder(work.pair().forward.graph),
        r"after pass insert_codecs \(before it: .*, split_joint\): illegal compressed graph: forward graph does not",
    ),
    "insert_gates": (
        lambda work: _read_a_ghost(work.pair()),
        r"after pass insert_gates \(before it: .*, insert_codecs\): illegal gated graph: ghost .* outside every branch",
    ),
    "hold_recompute": (
        lambda work: misorder(work.pair().backward.graph),
        r"after pass hold_recompute \(before it: .*, delay_products\): illegal gated graph: backward graph does not",
    ),
}


def _read_a_ghost(seam) -> None:
    ghost = next(p for p in seam.backward.graph.find_nodes(op="placeholder") if "slimfit_gates" in p.meta)
    with seam.backward.graph.inserting_before(seam.backward.graph.output_node()):
        seam.backward.graph.call_function(ATEN.neg.default, (ghost,))


@pytest.mark.parametrize("name", DAMAGES)
def test_an_illegal_graph_names_the_pass_and_those_before_it(monkeypatch, name):
    damage, message = DAMAGES[name]
    breaking(monkeypatch, name, damage)
    model, _ = optimized(Chain(), preset="exact", min_bytes=0)
    with pytest.raises(Exception, match=f"IllegalGraphError: {message}"):
        model(*chain_input())


def test_without_strict_a_broken_pass_costs_memory_only(monkeypatch):
    breaking(monkeypatch, "insert_gates", lambda work: misorder(work.pair().backward.graph))
    with pytest.warns(RuntimeWarning, match="compiled without compression and gates: IllegalGraphError: after pass"):
        wrong, session = held_against_the_reference(strict=False)
    assert wrong == []
    (note,) = session.plan.notes
    assert "after pass insert_gates (before it: simplify_joint" in note
    assert all(not unit.gated and "after pass insert_gates" in unit.reason for unit in session.plan.units)


# ---- the log


def test_debug_dumps_the_graphs_after_each_pass(caplog):
    caplog.set_level(logging.INFO, "slimfit_fx.passes.graphs")
    model, _ = optimized(Chain(), debug=True, min_bytes=0)
    step(model, model, chain_input())
    dumps = [record.getMessage() for record in caplog.records if record.name == "slimfit_fx.passes.graphs"]
    heads = [text.split(":\n")[0].removeprefix("after ") for text in dumps]
    names = [step.name for step in listed()]
    joint, pair = names[:4], names[4:]
    assert heads == [*joint, *(name for name in pair for _ in ("forward", "backward"))]
    assert all("graph():" in text for text in dumps)
    assert "slimfit_fx.stash" in dumps[-2] and "higher_order.cond" in dumps[-1]


def test_without_debug_nothing_is_dumped(caplog):
    caplog.set_level(logging.DEBUG, "slimfit_fx")
    model, _ = optimized(Chain(), debug=False, min_bytes=0)
    step(model, model, chain_input())
    assert not [record for record in caplog.records if record.name == "slimfit_fx.passes.graphs"]
    lines = [record.getMessage() for record in caplog.records if record.name == "slimfit_fx.passes"]
    assert len(lines) == len(listed())
    for line, pass_ in zip(lines, listed(), strict=True):
        assert line.startswith(f"{pass_.name}: ") and line.endswith(" ms") and " changes, " in line
