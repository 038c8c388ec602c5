"""The legal graph: each rule rejects the graphs that break it, and no graph that the passes make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from effort import examples
from graphs import Bench, Chain, Fork, chain_input, copy_joint, copy_seam, stopped_after, watching
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, branch_gets_a_constant, ghost_is_returned, stash_is_read_in_forward
from reference import optimized, step
from small_models import Tiny, tokens
from strategies import build, inputs, specs

from slimfit_fx.graph import batch
from slimfit_fx.passes import tile_bodies, tile_stretches, verify
from slimfit_fx.passes.verify import JOINT_RULES, SEAM_RULES, IllegalGraphError, verify_joint, verify_seam

LAST_PASS = {
    "captured": "plan_saved_values",
    "split": "split_joint",
    "compressed": "insert_codecs",
    "gated": "hold_recompute",
    "outlined": "hand_over_parts",
}
"""The graphs of a stage, as its last pass leaves them."""


# ---- every rule on one graph


@pytest.fixture(scope="module")
def legal() -> dict[str, Bench]:
    """The graphs of one model at each stage; lossy codecs at the stage ``compressed``, none later."""
    presets = {"captured": "exact", "split": "exact", "compressed": "balanced"}
    graphs = {
        stage: stopped_after(LAST_PASS[stage], Chain(), chain_input(), preset=preset)
        for stage, preset in presets.items()
    }
    graphs["gated"] = stopped_after(LAST_PASS["gated"], Fork(), chain_input(), units="*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_stretches, "WORTH", 1e9)
        patch.setattr(batch, "LEAST_FLOPS", {"cpu": 1})
        patch.setattr(tile_bodies, "ADDED_AT_ONCE", 0)
        in_tiles = {"tiles": True, "recompute": "blocks"}  # blocks that hand each other parts
        layers = stopped_after(LAST_PASS["outlined"], Tiny(depth=6), tokens(), executor="inductor", **in_tiles)
    return {**graphs, "outlined": layers}


def graph_of(work, stage: str):
    """A copy of what the rules of ``stage`` look at."""
    return copy_joint(work.joint) if stage == "captured" else copy_seam(work.pair())


def check(stage: str, graph) -> None:
    verify_joint(graph) if stage == "captured" else verify_seam(stage, graph)


def violated(stage: str, graph) -> list[Callable[..., Any]]:
    rules = JOINT_RULES if stage == "captured" else SEAM_RULES[stage]
    return [rule for rule in rules if list(rule(graph))]


def test_every_rule_has_a_mutation():
    rules = {*JOINT_RULES, *(rule for rules in SEAM_RULES.values() for rule in rules)}
    assert {mutation.rule for mutation in MUTATIONS} == rules
    defined = {getattr(verify, name) for name in vars(verify) if name.startswith("rule_")}
    assert defined == rules, "a rule that nobody checks"


def test_the_rules_of_a_stage_hold_at_all_later_ones():
    """But for the last: blocks hide what those rules look at."""
    *stages, last = SEAM_RULES
    assert (stages, last) == (["split", "compressed", "gated"], "outlined")
    for early, late in zip(stages, stages[1:], strict=False):
        assert set(SEAM_RULES[early]) < set(SEAM_RULES[late])


@pytest.mark.parametrize("stage", LAST_PASS)
def test_a_legal_graph_is_accepted(legal, stage):
    graph = graph_of(legal[stage].work, stage)
    check(stage, graph)
    assert violated(stage, graph) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.mutate.__name__)
def test_a_mutation_breaks_its_rule_and_no_other(legal, mutation):
    graph = graph_of(legal[mutation.stage].work, mutation.stage)
    assert mutation.mutate(graph), "this graph has no place for it"
    with pytest.raises(IllegalGraphError, match=f"illegal {mutation.stage} graph: .*{mutation.match}"):
        check(mutation.stage, graph)
    assert violated(mutation.stage, graph) == [mutation.rule]


@pytest.mark.parametrize("given", [(), (0,), (0, None, 2), (0, 1, 3), (0, 0, 0), "symbol"])
def test_slices_that_others_join_are_no_matter_of_parts(given):
    graph = torch.fx.Graph()
    whole, start = graph.placeholder("whole"), graph.placeholder("start")
    given = (0, start, 4) if given == "symbol" else given
    sliced = graph.call_function(torch.ops.aten.slice.Tensor, (whole, *given))
    whole.meta["val"], sliced.meta["val"] = torch.empty(4, 2), torch.empty(0 if given == (0, 0, 0) else 2, 2)
    assert verify._part(sliced, {}) == (sliced, (0, 1))


def test_one_error_lists_all_problems(legal):
    graph = graph_of(legal["gated"].work, "gated")
    assert ghost_is_returned(graph) and stash_is_read_in_forward(graph) and branch_gets_a_constant(graph)
    with pytest.raises(IllegalGraphError) as caught:
        check("gated", graph)
    for part in ("leaves the backward graph", "is read in forward", "neither a tensor nor a symbol"):
        assert part in str(caught.value)


# ---- every rule on any graph


@pytest.mark.slow
@settings(max_examples=examples(8, share=3))
@given(spec=specs(max_layers=3), preset=st.sampled_from(("exact", "balanced", "paper")))
def test_what_the_passes_make_is_legal_and_its_mutations_are_not(spec, preset):
    """After every pass; a mutation is tried wherever the graph has a place for it."""
    tried: set[str] = set()

    def watch(pass_, work):
        check(pass_.stage, graph_of(work, pass_.stage))
        for mutation in MUTATIONS:
            if LAST_PASS[mutation.stage] == pass_.name and mutation.mutate(graph := graph_of(work, pass_.stage)):
                assert list(mutation.rule(graph)), mutation.mutate.__name__
                tried.add(pass_.stage)

    torch._dynamo.reset()
    chosen = {"preset": preset, "min_bytes": 0, "dynamic": spec.dynamic, "units": spec.is_unit}
    model, _ = optimized(build(spec), scheduler="none", **chosen)
    with watching(watch), spec.context():
        step(model, model, inputs(spec))
    assert tried >= {"captured", "split"}
