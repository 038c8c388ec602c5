"""split_joint: torch's own partitioner, with the saved set that the plan chose."""

from __future__ import annotations

import pytest
from graphs import Bench, Chain, chain_input, copy_joint, names, run_joint, run_pair, stopped_after, unequal
from small_models import Tiny, tokens
from torch._functorch.partitioners import min_cut_rematerialization_partition

from slimfit_fx.graph import ops
from slimfit_fx.passes.partition import DECISION, split_joint


def planned(model, batch, **settings) -> Bench:
    return stopped_after("plan_saved_values", model, batch, **settings)


def computed(bench: Bench) -> set[str]:
    """Names of the saved tensors that are no inputs."""
    return {v.name for v, _ in bench.work.pair().saved() if v.op != "placeholder"}


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_what_the_plan_saves_is_saved_and_nothing_else(preset):
    bench = planned(Chain(), chain_input(), preset=preset)
    planning = bench.work.planning
    bench.run("split_joint")
    assert computed(bench) == {n.name for n in planning.cut.saved if n.op != "placeholder"} == {"addmm", "addmm_1"}


def test_what_the_plan_recomputes_runs_in_backward():
    bench = planned(Tiny(depth=1), tokens())
    wanted = names(bench.work.planning.recomputed_reads)
    bench.run("split_joint")
    backward = names(bench.work.pair().backward.graph.nodes)
    views = {n.name for n in bench.work.planning.recomputed_reads if ops.is_view(n)}
    assert wanted - views <= backward and len(wanted - views) > 5


def test_decisions_cross_over_and_tags_do_not():
    bench = planned(Chain(), chain_input())
    bench.run("split_joint")
    seam = bench.work.pair()
    assert {v.name: v.meta[DECISION].kind for v, _ in seam.saved() if DECISION in v.meta} == {
        "addmm": "linear_input",
        "addmm_1": "gelu_input",
    }
    assert not any("recompute" in n.meta for module in (seam.forward, seam.backward) for n in module.graph.nodes)


def test_without_a_plan_it_splits_as_torch_does():
    work = stopped_after("tag_liveness", Chain(), chain_input()).work
    ours = split_joint(copy_joint(work.joint).module, work.joint_inputs, **work.partitioner_args)
    theirs = min_cut_rematerialization_partition(
        copy_joint(work.joint).module, work.joint_inputs, **work.partitioner_args
    )
    assert [str(m.graph) for m in ours] == [str(m.graph) for m in theirs]


def test_random_numbers_are_drawn_in_forward_only():
    bench = planned(Tiny(depth=1, dropout=0.3), tokens())
    drawn = {n.name for n in bench.work.joint.graph.nodes if ops.is_random(n)}
    bench.run("split_joint")
    forward, backward = (module.graph.nodes for module in (bench.work.pair().forward, bench.work.pair().backward))
    assert len(drawn) == 3 and {n.name for n in forward if ops.is_random(n)} == drawn
    assert not any(ops.is_random(n) for n in backward)


@pytest.mark.parametrize("model", [Chain, lambda: Tiny(depth=1, dropout=0.0)], ids=["chain", "transformer"])
def test_the_numbers_are_those_of_the_joint_graph(model):
    bench = planned(model(), chain_input() if model is Chain else tokens())
    expected = run_joint(bench.work.joint)
    bench.run("split_joint")
    outputs, grads = run_pair(bench.work.pair())
    count = bench.work.joint.num_fwd_outputs
    assert unequal(expected, [*outputs, *grads]) == [] and len(outputs) == count
