"""The passes, in order, and the runner that verifies the graphs after each of them.

The order is the list in ``build_pipeline``; each line says why it stands where it stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from slimfit_fx.codecs import Codec
from slimfit_fx.graph import batch, ops
from slimfit_fx.graph.joint import STATIC, GateLayout, JointGraph, read_joint
from slimfit_fx.passes.delay_products import delay_products
from slimfit_fx.passes.describe_plan import describe_plan
from slimfit_fx.passes.find_cones import ConePlan, find_cones
from slimfit_fx.passes.hand_over_parts import hand_over_parts
from slimfit_fx.passes.hold_recompute import hold_recompute
from slimfit_fx.passes.insert_codecs import insert_codecs
from slimfit_fx.passes.insert_gates import GATES, insert_gates
from slimfit_fx.passes.lay_out_masks import lay_out_masks
from slimfit_fx.passes.liveness import SERVES, tag_liveness
from slimfit_fx.passes.outline_repeats import outline_repeats
from slimfit_fx.passes.partition import simplify_joint, split_joint, tag_cut
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.sink_backward import sink_backward
from slimfit_fx.passes.split_gradients import split_gradients
from slimfit_fx.passes.tile_blocks import tile_blocks
from slimfit_fx.passes.verify import IllegalGraphError, verify_joint, verify_seam
from slimfit_fx.planning.levels import plan_paid
from slimfit_fx.planning.planner import Planner, Planning
from slimfit_fx.planning.prices import Prices
from slimfit_fx.planning.rows import GraphPlan

log = logging.getLogger("slimfit_fx.passes")
dump_log = logging.getLogger("slimfit_fx.passes.graphs")


@dataclass(frozen=True)
class Settings:
    """What the passes are told; bound to them in ``build_pipeline``."""

    codec_for: Callable[[str], Codec | None]
    freeze_rate: float
    min_bytes: int
    debug: bool
    decompositions: dict[Any, Any]
    disabled: tuple[str, ...] = ()
    recompute_price: float = 1.0
    recompute: tuple[str, ...] = ("cheap",)
    """The level; or those among which the planner takes what the closed units pay for."""
    recompute_share: float = 1.0
    """Of the blocks, from the first on: where that holds."""
    why_milder: Callable[[str], str | None] = lambda kind: None
    """Why a kind's codec is not that of the preset; None if it is."""
    prices_of: Callable[[torch.device], Prices] = lambda device: Prices()
    """What time is worth on a device."""
    outline: bool = True
    """Whether identical blocks become calls of one subgraph: of use to a compiler, of none to the interpreter."""
    tile: bool = False
    """Whether these run on a tile of the batch after the other."""


@dataclass
class Work:
    """What travels through the pipeline: first the joint graph, then the forward/backward pair."""

    joint: JointGraph
    joint_inputs: Sequence[Any]
    partitioner_args: dict[str, Any]
    planning: Planning | None = None
    seam: Seam | None = None
    cones: ConePlan = field(default_factory=ConePlan)
    plan: GraphPlan | None = None

    def pair(self) -> Seam:
        """The forward/backward pair; only after ``split_joint``."""
        assert self.seam is not None, "the joint graph is not split yet"
        return self.seam


@dataclass(frozen=True)
class Pass:
    """One step. ``stage`` names the rules that hold after it (verify.py); ``needed`` passes cannot be switched off."""

    name: str
    stage: str
    run: Callable[[Work], int]
    needed: bool = False


def build_pipeline(settings: Settings) -> tuple[Pass, ...]:
    """The ordered list. Names are what ``Config.disabled_passes`` takes."""
    return (
        # one name for equal values, so that the planner and the partitioner see the same graph
        Pass("simplify_joint", "captured", _simplify),
        # before anything is tagged: what is one operator can be behind one gate only
        Pass("split_gradients", "captured", lambda w: split_gradients(w.joint.module)),
        # tags what everything after it reads
        Pass("tag_liveness", "captured", lambda w: tag_liveness(w.joint), needed=True),
        # decides keep / recompute / codec; acts on nothing
        Pass("plan_saved_values", "captured", lambda w: _plan(w, settings)),
        # the pair must exist before anything can be inserted on both of its sides
        Pass("split_joint", "split", _split, needed=True),
        # before gates: a cone then takes the small encoded parts, and decodes inside its branch
        Pass("insert_codecs", "compressed", lambda w: _encode(w, settings)),
        # on the final set of backward nodes
        Pass("insert_gates", "gated", lambda w: _gate(w, settings)),
        # every earlier pass may place nodes where it is convenient
        Pass("sink_backward", "gated", lambda w: sink_backward(w.pair().backward)),
        # what stands between a product and its reader is known now
        Pass("delay_products", "gated", lambda w: delay_products(w.pair().backward)),
        # on the final order, so that each decode waits for what really comes before it
        Pass("hold_recompute", "gated", lambda w: hold_recompute(w.pair().backward, holdable_placeholders(w.pair()))),
        # where each mask is made is known now
        Pass("lay_out_masks", "gated", lambda w: lay_out_masks(w.pair().backward)),
        # while every value still has its node
        Pass("describe_plan", "gated", _describe, needed=True),
        # behind all that looks at single nodes: a block hides what it holds from every other pass
        Pass("outline_repeats", "outlined", lambda w: _outline(w.pair()) if settings.outline else 0),
        # a block is what is large enough, and what is written once
        Pass("tile_blocks", "outlined", lambda w: _tile(w) if settings.outline and settings.tile else 0),
        # which blocks run in tiles is known now
        Pass(
            "hand_over_parts", "outlined", lambda w: _hand_over(w.pair()) if settings.outline and settings.tile else 0
        ),
    )


def pass_names() -> tuple[str, ...]:
    """Names of the passes that may be switched off; the first runs on dynamo's graph, before there is a joint one."""
    return (
        "simplify_masks",
        "simplify_joint",
        "split_gradients",
        "plan_saved_values",
        "insert_codecs",
        "insert_gates",
        "sink_backward",
        "delay_products",
        "hold_recompute",
        "lay_out_masks",
        "outline_repeats",
        "tile_blocks",
        "hand_over_parts",
    )


def run_pipeline(
    module: fx.GraphModule,
    joint_inputs: Sequence[Any],
    *,
    layout: GateLayout,
    settings: Settings,
    partitioner_args: dict[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule, GraphPlan]:
    """Rewrite one joint graph into a forward and a backward graph; also returns the plan of what was done.

    Raises:
        IllegalGraphError: a pass broke a rule of its stage. The message names the pass and those before it.
    """
    joint = read_joint(
        module, partitioner_args["num_fwd_outputs"], layout, partitioner_args.get("static_lifetime_input_indices") or ()
    )
    work = Work(joint, joint_inputs, partitioner_args)
    done: list[str] = []
    for step in build_pipeline(settings):
        if step.name in settings.disabled and not step.needed:
            continue
        began = time.perf_counter()
        before = _size(work)
        count = step.run(work)
        _verify(step, work, done)
        done.append(step.name)
        spent = (time.perf_counter() - began) * 1e3
        log.debug("%s: %d changes, %+d operators, %.0f ms", step.name, count, _size(work) - before, spent)
        if settings.debug:
            _dump(step.name, work)
    seam = work.pair()
    assert work.plan is not None
    return seam.forward, seam.backward, work.plan


def _graphs(work: Work) -> tuple[fx.Graph, ...]:
    return (work.joint.graph,) if work.seam is None else (work.seam.forward.graph, work.seam.backward.graph)


def _size(work: Work) -> int:
    return sum(len(graph.nodes) for graph in _graphs(work))


def _dump(name: str, work: Work) -> None:
    """Write the graphs as they stand after a pass to the log ``slimfit_fx.passes.graphs``."""
    for graph in _graphs(work):
        dump_log.info("after %s:\n%s", name, graph)


def _verify(step: Pass, work: Work, done: list[str]) -> None:
    try:
        if work.seam is None:
            verify_joint(work.joint)
        else:
            verify_seam(step.stage, work.seam)
    except IllegalGraphError as error:
        raise IllegalGraphError(f"after pass {step.name} (before it: {', '.join(done) or 'none'}): {error}") from error


def holdable_placeholders(seam: Seam) -> list[fx.Node]:
    """Saved values that forward computed, gated ones left out: those are read inside branches only."""
    return [p for v, p in seam.saved() if v.op != "placeholder" and GATES not in p.meta]


def _simplify(work: Work) -> int:
    count = simplify_joint(work.joint.module)
    args = work.partitioner_args
    work.joint = read_joint(
        work.joint.module, args["num_fwd_outputs"], work.joint.layout, args.get("static_lifetime_input_indices") or ()
    )
    return count


def make_planner(work: Work, settings: Settings) -> Planner:
    """The planner of a joint graph, at the first level of recompute."""
    return Planner(
        work.joint,
        lambda n: n.meta.get(SERVES, frozenset()),
        codec_for=settings.codec_for,
        freeze_rate=settings.freeze_rate,
        min_bytes=settings.min_bytes,
        recompute_price=settings.recompute_price,
        recompute=settings.recompute[0],
        recompute_share=settings.recompute_share,
        why_milder=settings.why_milder,
        prices=settings.prices_of(_device(work)),
        cut=batch.cut_batch([work.joint.graph], _least_flops(work)) if settings.outline and settings.tile else None,
    )


def _device(work: Work) -> torch.device:
    inputs = [n for n in work.joint.graph.find_nodes(op="placeholder") if ops.is_tensor(n)]
    return next((n.meta["val"].device for n in inputs if n.meta["val"].dim()), torch.device("cpu"))


def _plan(work: Work, settings: Settings) -> int:
    planner, levels = make_planner(work, settings), settings.recompute
    planning = planner.plan() if len(levels) == 1 else plan_paid(levels, planner)
    work.planning = replace(planning, time=planner.expected_time(planning))
    return tag_cut(work.joint.module, work.planning)


def _describe(work: Work) -> int:
    work.plan = describe_plan(work.pair(), work.cones, work.planning, work.joint.layout)
    return 0


def _outline(seam: Seam) -> int:
    return outline_repeats(seam.forward, spare_kernels=True) + outline_repeats(seam.backward)


def _least_flops(work: Work) -> float:
    return batch.LEAST_FLOPS["cpu" if _device(work).type == "cpu" else "gpu"]


def _tile(work: Work) -> int:
    done = tile_blocks(work.pair(), _least_flops(work))
    told = [
        f"blocks run on a part of the batch after the other: {done.calls} tiles" if done.calls else "",
        f"blocks run on the whole batch: {done.left}" if done.left else "",
    ]
    if work.plan is not None:
        work.plan = replace(work.plan, note="; ".join(filter(None, (work.plan.note, *told))))
    return done.calls


def _hand_over(seam: Seam) -> int:
    return hand_over_parts(seam.forward) + hand_over_parts(seam.backward)


def _split(work: Work) -> int:
    forward, backward = split_joint(work.joint.module, work.joint_inputs, **work.partitioner_args)
    work.seam = Seam(forward, backward, work.joint.num_fwd_outputs)
    return len(work.seam.saved())


def _encode(work: Work, settings: Settings) -> int:
    gates = _gates_of_outputs(work)
    grads_of = work.joint.grads_of + [None] * (len(gates) - len(work.joint.grads_of))
    return insert_codecs(work.pair(), gates, grads_of, decompositions=settings.decompositions)


def _gates_of_outputs(work: Work) -> list[int]:
    """Of each output of the backward graph the gate, or STATIC."""
    known = [gate if gate in work.joint.gates else STATIC for gate in work.joint.grads]
    outputs = work.pair().backward.graph.output_node().args[0]
    return known + [STATIC] * (len(outputs) - len(known))  # type: ignore[arg-type]


def _gate(work: Work, settings: Settings) -> int:
    seam = work.pair()
    forward_inputs = {n.name: n for n in seam.forward.graph.find_nodes(op="placeholder")}
    gates = {gate: forward_inputs[node.name] for gate, node in work.joint.gates.items()}
    saved = [p for _, p in seam.saved()]
    work.cones = find_cones(seam.backward.graph, _gates_of_outputs(work), saved, min_bytes=settings.min_bytes)
    return insert_gates(seam, work.cones, gates, debug=settings.debug)
