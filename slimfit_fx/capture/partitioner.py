"""Our entry into torch.compile: Inductor's official ``custom_partitioner_fn``.

The partitioner is stateless: what it does follows from the joint graph, the settings and the gate layout, all of which
go into its ``uuid``. So Inductor's and AOTAutograd's caches stay in force, and a graph that comes from a cache needs
nothing that only partitioning would have produced.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import gc
import hashlib
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import partitioners
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx._lazy_graph_module import _LazyGraphModule

import slimfit_fx
import slimfit_fx.passes
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.passes.pipeline import Settings, run_pipeline
from slimfit_fx.planning.prices import prices_of
from slimfit_fx.planning.rows import GraphPlan

log = logging.getLogger("slimfit_fx.capture")

GivesUp = Callable[[Config, GraphPlan], bool]
"""Told of a plan before any code is written: whether it is not worth more."""

PLAN_SINK: contextvars.ContextVar[list[GraphPlan] | None] = contextvars.ContextVar("slimfit_fx_plan_sink", default=None)
"""Where the plan of the graph being compiled goes; for display only, nothing at run time reads it."""


class PlanTooLarge(Exception):  # noqa: N818  (not an error: it ends an attempt whose saved values alone do not fit)
    """Raised after partitioning, before any code is written."""


class PlanReady(Exception):  # noqa: N818  (not an error: it ends a compile that was started for its plan only)
    """Raised after partitioning when only the plan is wanted."""


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash of this package's source: a new version never reads graphs that an older one cached."""
    digest = hashlib.sha256()
    for package in (slimfit_fx, slimfit_fx.passes):
        for path in sorted(pathlib.Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class GatedPartitioner(CustomPartitionerFn):
    """Partitions a joint graph through our pipeline. ``plan_only`` stops the compile there and bypasses all caches."""

    config: Config
    layout: GateLayout
    plan_only: bool = False
    gives_up: GivesUp | None = field(default=None, compare=False, repr=False)
    """Whether the plan alone tells enough, in a compile that was started for its peak."""
    others: tuple[Config, ...] = ()
    """What is tried instead on the same joint graph, in this order, when ``gives_up`` says so of those before."""
    taken: list[Config] = field(default_factory=list, compare=False, repr=False)
    """Receives the settings that the graph was partitioned by."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Enter cache keys, which pickle Inductor's whole configuration, as the ``uuid`` and nothing else."""
        return str, (str(self.uuid()),)

    def __copy__(self) -> GatedPartitioner:
        return self

    def __deepcopy__(self, _: object) -> GatedPartitioner:
        return self

    def uuid(self) -> Any | None:
        """Everything that decides what the partition looks like."""
        if self.plan_only or self.others:
            return None
        parts = source_hash(), self.config.fingerprint(), repr(self.layout), torch.__version__, _prices_in_use()
        return ":".join(("slimfit_fx", *parts))

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split ``gm``; ``kwargs`` are what Inductor hands to every partitioner.

        Raises:
            PlanTooLarge: every plan was given up.
            PlanReady: with ``plan_only``.
        """
        with _no_garbage_collection():
            return self._partition(gm, joint_inputs, kwargs)

    def _partition(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], kwargs: dict[str, Any]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        compared = _saved_by_torch(_copy_module(gm), joint_inputs, kwargs)
        tried = (self.config, *self.others)
        for number, config in enumerate(tried, 1):
            module = gm if number == len(tried) else _copy_module(gm)
            forward, backward, found = partition_joint(module, joint_inputs, config, self.layout, kwargs)
            plan = dataclasses.replace(found, torch_compile_saved=compared)
            if self.gives_up is None or not self.gives_up(config, plan):
                break
        else:
            raise PlanTooLarge
        self.taken.append(config)
        sink = PLAN_SINK.get()
        if sink is not None:
            sink.append(plan)
        if self.plan_only:
            raise PlanReady
        return forward, backward


def _prices_in_use() -> str:
    """The prices of the devices that a graph may be for: they decide what is saved."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_initialized():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return str([prices_of(device) for device in devices])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Look for no garbage: passes make a hundred thousand objects that live on, and each search visits millions."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def partition_joint(
    module: fx.GraphModule,
    joint_inputs: Sequence[Any],
    config: Config,
    layout: GateLayout,
    partitioner_args: dict[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule, GraphPlan]:
    """Run the pipeline; if a pass fails, partition the untouched graph as torch would, with the reason in the plan.

    Every parameter then gets its full gradient from the graph; closed units still drop theirs at run time.
    """
    pristine = _copy_module(module)
    try:
        forward, backward, plan = run_pipeline(
            module, joint_inputs, layout=layout, settings=settings_of(config), partitioner_args=partitioner_args
        )
    except Exception as error:
        if config.strict:
            raise
        reason = f"{type(error).__name__}: {error}"
        log.warning("a graph could not be rewritten", exc_info=True)
        warnings.warn(
            f"slimfit_fx: one graph is compiled without compression and gates: {reason}", RuntimeWarning, stacklevel=2
        )
        forward, backward = min_cut_rematerialization_partition(pristine, joint_inputs, **partitioner_args)
        plan = GraphPlan((), tuple((f"gate {g}", reason) for g in range(len(layout.params))), (), None, reason)
    return forward, backward, plan


def settings_of(config: Config) -> Settings:
    """What the passes need to know of the user's settings."""
    from torch._inductor.decomposition import select_decomp_table

    return Settings(
        codec_for=config.codec_for,
        why_milder=config.why_milder,
        freeze_rate=config.freeze_rate,
        min_bytes=config.min_bytes,
        debug=config.debug,
        decompositions=select_decomp_table(),
        disabled=config.disabled_passes,
        recompute_price=config.recompute_price,
        prices_of=prices_of,
        recompute=config.recompute_levels,
        recompute_share=config.recompute_share,
        outline=config.executor == "inductor",
        tile=config.tiles,
    )


def _copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in nodes of its own; example values are shared."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, env)
    graph.output(output)
    graph.output_node().meta = copy.copy(module.graph.output_node().meta)
    return _LazyGraphModule(module, graph)  # few of them ever run


class _Chosen(Exception):  # noqa: N818  (not an error: it ends torch's partitioner)
    """Raised when torch has chosen what to save."""


def _saved_by_torch(
    module: fx.GraphModule, joint_inputs: Sequence[Any], partitioner_args: dict[str, Any]
) -> int | None:
    """Bytes that plain torch.compile would hold between forward and backward of this graph.

    Inputs and parameters are left out.
    """
    from slimfit_fx.graph.joint import nbytes

    def stop(_: fx.GraphModule, saved: Sequence[fx.Node], **__: Any) -> None:
        raise _Chosen(sum(nbytes(n) for n in saved if n.op != "placeholder"))

    try:
        with mock.patch.object(partitioners, "_extract_fwd_bwd_modules", stop):
            forward, _ = min_cut_rematerialization_partition(module, joint_inputs, **partitioner_args)
    except _Chosen as chosen:
        return int(chosen.args[0])
    except Exception:
        log.debug("torch's own partition of this graph failed; no comparison", exc_info=True)
        return None
    saved = list(forward.graph.output_node().args[0])[partitioner_args["num_fwd_outputs"] :]  # type: ignore[arg-type]
    return sum(nbytes(n) for n in saved if isinstance(n, fx.Node) and n.op != "placeholder")
