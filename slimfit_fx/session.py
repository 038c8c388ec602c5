"""The session of one optimized model: everything a user may ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimfit_fx._suggest import did_you_mean
from slimfit_fx.beside_steps import (
    ADAMW_STATE_PER_BYTE,
    bytes_of,
    copied_bytes,
    make_budget,
    make_fixed_bytes,
    open_count,
    seen_or_given,
    update_memory,
)
from slimfit_fx.capture.backend import SlimFitBackend
from slimfit_fx.capture.captured import CapturedGraph, step_trace
from slimfit_fx.capture.dynamo import one_graph
from slimfit_fx.config import Config
from slimfit_fx.planning.budget import FixedBytes, format_bytes
from slimfit_fx.planning.peak import StepPeak, forecast
from slimfit_fx.planning.rows import GraphPlan, MemoryPlan, merge_plans
from slimfit_fx.planning.timeline import read_timeline
from slimfit_fx.presets import FALLBACK
from slimfit_fx.refusals import FLATTENED, is_flattened
from slimfit_fx.runtime import peers
from slimfit_fx.runtime.gated_reduce import GatedReduce, install
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.optimizer_hooks import OptimizerHooks
from slimfit_fx.runtime.steps import StepTracker
from slimfit_fx.schedule import Scheduler
from slimfit_fx.units import GateUnit

_WORTH_SAYING_MS = 0.1
"""Less than a step takes before its first kernel runs."""


class Session:
    """One optimized model. Get it with ``slimfit_fx.session(model)``."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        units: Sequence[GateUnit],
        always: Sequence[tuple[str, str]],
        executor: str,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.config = config
        self.executor = executor
        """``inductor`` or ``interpreter``: what is really used."""
        self.always_training = tuple(always)
        """(parameter, reason) of those that train in every step."""
        self.warned = False
        """Whether the user was told that nothing was captured."""
        self._wrapper: weakref.ref[Any] | None = None
        self._reduce: GatedReduce | None = None
        self._model = weakref.ref(model)
        self._units = tuple(units)
        self._tracker = StepTracker(model, config, units)
        self._hooks = OptimizerHooks(self._tracker, frozenset(id(p) for p in model.parameters()))
        self._given = optimizer
        self._optimizers = seen_or_given(self._hooks.seen, optimizer)
        budget = make_budget(model, config, units, self.scheduler, self._optimizers)
        self._fixed = make_fixed_bytes(model, config, units, self.scheduler, self._optimizers)
        self._backend = SlimFitBackend(config, self._tracker.gates, executor, budget=budget)

    @property
    def backend(self) -> SlimFitBackend:
        """The torch.compile backend of this model."""
        return self._backend

    @property
    def gates(self) -> GateTable:
        """Names of all units, which are open and closed now, and the history of decisions."""
        return self._tracker.gates

    @property
    def scheduler(self) -> Scheduler:
        """What decides which units train."""
        return self._tracker.scheduler

    @property
    def steps(self) -> int:
        """Optimizer steps seen."""
        return self._tracker.steps

    @property
    def compiles(self) -> int:
        """Graphs compiled so far."""
        return len(self._backend.graphs)

    @property
    def recompiles(self) -> int:
        """How often a graph had to be compiled again. Flipping gates never does that."""
        return sum(g.is_recompile for g in self._backend.graphs)

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan of the graphs compiled so far.

        Raises:
            RuntimeError: nothing was compiled yet: run one training step, or ask ``slimfit_fx.plan(model, *inputs)``.
        """
        model = self._model()
        if model is None or not self._backend.graphs:
            raise RuntimeError(
                "no graph was captured yet: run one training step first, or call slimfit_fx.plan(model, *inputs)"
            )
        return build_plan(
            model,
            self.config,
            self._units,
            self._backend.graphs,
            self._state_bytes(),
            open_count=open_count(self.config, self.scheduler, self._units),
            beside=self._fixed(),
        )

    def _state_bytes(self) -> int | None:
        """Of optimizers: what they hold, or what the one that was given will; None if there is none."""
        held = self._hooks.state_bytes()
        return self._fixed().optimizer_state if held is None and self._given is not None else held

    def predict_peak(self, open_units: Iterable[str] | None = None) -> StepPeak:
        """The memory of a step with these units open (default: those open now), without running it.

        Timeline, peak, and who is alive at the peak, in bytes above what is there before the step (parameters,
        optimizer state, the batch); read off the compiled code.

        Raises:
            RuntimeError: not known: nothing was compiled yet (the reason is in the message).
            ValueError: a name that is no unit with a gate.
        """
        traced = step_trace(latest_graphs(self._backend.graphs))
        if isinstance(traced, str):
            raise RuntimeError(f"the peak of a step is not known: {traced}")
        trace, names = traced
        wanted = self._named(open_units)
        return trace.peak([k for k, name in enumerate(names) if name in wanted])

    def predict_update(self, open_units: Iterable[str] | None = None) -> int:
        """Bytes that the optimizer's step takes with these units open (default: those open now), without running it.

        Above parameters and optimizer state: the gradients, copies of open weights (of large ones a sample) if the
        scheduler wants to know how far they move, and what the optimizer takes for itself (``foreach`` makes lists as
        large as all gradients).

        Raises:
            RuntimeError: not known: the optimizer does what cannot be followed without values.
            ValueError: a name that is no unit with a gate.
        """
        model = self._model()
        assert model is not None, "the model is gone"
        wanted = self._named(open_units)
        memory = update_memory(model, self.config, self._units, self.scheduler, self._optimizers(), sorted(wanted))
        if memory is None:
            raise RuntimeError("the memory of the optimizer's step is not known: its step cannot run without values")
        opened = [p for name in wanted for p in self.gates.params_of(name)]
        closed = [p for name in self.gates.names if name not in wanted for p in self.gates.params_of(name)]
        gradients = sum(bytes_of(p) for p in model.parameters() if p.requires_grad) - sum(map(bytes_of, closed))
        copies = sum(copied_bytes(p, self.config, self.scheduler) for p in opened)
        return gradients + copies + memory.temporary_bytes

    def _named(self, open_units: Iterable[str] | None) -> frozenset[str]:
        wanted = self.gates.open if open_units is None else frozenset(open_units)
        unknown_names = sorted(wanted - frozenset(self.gates.names))
        if unknown_names:
            raise ValueError(
                "; ".join(f"{name!r} is no unit{did_you_mean(name, self.gates.names)}" for name in unknown_names)
            )
        return wanted

    @property
    def step_peak_bytes(self) -> int | None:
        """Peak of a step with the gates of now, as ``predict_peak`` has it; None while it is not known."""
        traced = step_trace(latest_graphs(self._backend.graphs))
        if isinstance(traced, str):
            return None
        trace, names = traced
        return trace.peak([k for k, name in enumerate(names) if name in self.gates.open]).peak_bytes

    def before_forward(self) -> None:
        """Called by the engine before each training forward."""
        model = self._model()
        if model is not None:
            self._refuse_flattened(model)
            if self._tracker.refresh():
                self._hooks.watch(frozenset(id(p) for p in model.parameters()))
            self._meet_peers(model)
        self._tracker.before_forward()

    def _refuse_flattened(self, model: nn.Module) -> None:
        """What wraps a model after ``optimize`` is seen in the first forward of a distributed job."""
        if self._tracker.forwarded or not peers.is_distributed():
            return
        if is_flattened(model):
            raise ValueError(f"this model was sharded by FullyShardedDataParallel after optimize, {FLATTENED}")

    def outgrows_its_plan(self) -> bool:
        """Called by the engine before each training forward: whether the model must be compiled again for its budget.

        Gradients that are there already belong to earlier micro-batches of the step. An optimizer that was seen for the
        first time may take more than was assumed.
        """
        under, model = self._backend.under, self._model()
        if under is None or model is None:
            return False
        again = under.begin_forward()
        if not under.budget.accumulates and any(p.grad is not None for p in model.parameters()):
            again |= under.expect_gradients()
        return under.meet_optimizers() or again

    def _meet_peers(self, model: nn.Module) -> None:
        """Find the other ranks in the first forward of a distributed job, and DDP, whose traffic is cut."""
        if not peers.is_distributed():
            return
        if self._tracker.peers is None:
            self._tracker.peers = peers.find_peers(model)
        wrapper = peers.active_wrapper(model)
        if wrapper is not None and wrapper._join_config.enable:
            raise ValueError(
                "Join (uneven inputs) does not work with freeze gates: ranks that have run out of batches would send "
                "gradients of another size. Use a DistributedSampler with drop_last=True: all ranks then end together"
            )
        if wrapper is not None and (self._wrapper is None or self._wrapper() is not wrapper):
            self._wrapper = weakref.ref(wrapper)
            installed = install(wrapper, self.gates)
            self._reduce = None if isinstance(installed, str) else installed
            if isinstance(installed, str):
                warnings.warn(
                    f"slimfit_fx: gradients of closed units are sent by DistributedDataParallel as zeros: {installed}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def say_it_starts_anew(self, what: str) -> None:
        """Called by integrations whose checkpoint holds no schedule, because it was saved without ``what``."""
        if self._tracker.anew_is_known:
            return
        self._tracker.anew_is_known = True
        warnings.warn(
            f"slimfit_fx: this checkpoint was saved without {what} and holds no schedule: the schedule starts again "
            "from its beginning",
            RuntimeWarning,
            stacklevel=3,
        )

    def one_graph(self) -> contextlib.AbstractContextManager[Any]:
        """Called by the engine around each training forward."""
        return one_graph(under_ddp=self._wrapper is not None)

    @property
    def traffic(self) -> GatedReduce | None:
        """What DDP's all-reduce sent and would have sent, in bytes; None without DDP."""
        return self._reduce

    def step(self) -> None:
        """Say that an optimizer step was done; only for optimizers that do not subclass ``torch.optim.Optimizer``."""
        self._tracker.step()

    def freeze(self, names: str | Iterable[str]) -> None:
        """Pin units closed (names or fnmatch patterns), from the next forward on.

        Raises:
            ValueError: a name or pattern that matches no unit.
        """
        self._tracker.freeze(names)

    def unfreeze(self, names: str | Iterable[str] = "*") -> None:
        """Release units that ``freeze`` pinned; the scheduler decides on them again."""
        self._tracker.unfreeze(names)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same gates, distances and random state.

        Plain values that survive JSON.
        """
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict()``.

        Raises:
            ValueError: the state is of another version, scheduler or set of units.
        """
        self._tracker.load_state_dict(state)

    def close(self) -> None:
        """Stop listening to optimizers and gradients."""
        self._hooks.remove()
        self._tracker.close()

    def __repr__(self) -> str:
        return (
            f"Session(preset={self.config.preset!r}, executor={self.executor!r}, {self.gates!r}, steps={self.steps}, "
            f"recompiles={self.recompiles})"
        )


def latest_graphs(graphs: Sequence[CapturedGraph]) -> list[CapturedGraph]:
    """The graphs in use: a recompile replaces the graph that it recompiled."""
    return list({g.unit_names or index: g for index, g in enumerate(graphs)}.values())


def _unseen(graph: CapturedGraph) -> GraphPlan:
    """What stands in for the plan of a graph that came from a compile cache: it was never partitioned here."""
    reason = "not known: its graph came from a compile cache; slimfit_fx.plan(model, *inputs) works it out"
    return GraphPlan((), tuple((f"gate {gate}", reason) for gate in range(len(graph.unit_names))), (), None)


def _preset_of(graphs: Sequence[CapturedGraph], config: Config) -> str:
    """The preset in use: the one a budget led to, if it is the same for all graphs."""
    chosen = {graph.chosen.preset for graph in graphs if graph.chosen is not None}
    return chosen.pop() if len(chosen) == 1 else config.preset


def build_plan(
    model: nn.Module,
    config: Config,
    units: Sequence[GateUnit],
    graphs: Sequence[CapturedGraph],
    optimizer_bytes: int | None,
    *,
    open_count: int,
    beside: FixedBytes | None = None,
) -> MemoryPlan:
    """Merge the plans of a model's graphs into one, with the peak of a step in which ``open_count`` units train.

    ``beside``: what there is beside the step.
    """
    chosen = latest_graphs(graphs)
    traced = step_trace(chosen)
    known: dict[str, Any] = {"peak_unknown": traced}
    if not isinstance(traced, str):
        trace, names = traced
        peak = forecast(trace, names, open_count, None if beside is None else beside.most_open_bytes)
        pattern = [k for k, name in enumerate(names) if name in peak.worst_units]
        update = None if beside is None else beside.update
        known = {"peak": peak, "timeline": read_timeline(trace, pattern, update_bytes=update)}
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    merged = merge_plans(
        [g.plan or _unseen(g) for g in chosen],
        [g.unit_names for g in chosen],
        [(u.name, u.numel, u.bytes) for u in units],
        preset=_preset_of(chosen, config),
        freeze_rate=config.freeze_rate,
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        optimizer_bytes=ADAMW_STATE_PER_BYTE * trainable if optimizer_bytes is None else optimizer_bytes,
    )
    if any(graph.plan is None for graph in chosen):
        known["expected_gradient_error"] = None
    fitted = [
        f"graph {i}: {g.chosen.label} was chosen to fit memory_budget={config.memory_budget!r}"
        for i, g in enumerate(chosen)
        if g.chosen is not None
    ]
    notes = (*merged.notes, *fitted, *_milder_codecs(chosen, config))
    found = dataclasses.replace(merged, notes=notes, **known)
    needless = needless_recompute(found, accumulates=config.gradient_accumulation)
    return dataclasses.replace(found, notes=(*notes, *needless))


def needless_recompute(plan: MemoryPlan, *, accumulates: bool = False) -> list[str]:
    """That another level of recompute takes less time and no more memory: the optimizer's step is the peak.

    Nothing is said where a step ``accumulates`` gradients: the timeline leaves those of earlier micro-batches out.
    """
    step, faster = plan.timeline, plan.faster
    if accumulates or faster is None or step is None or step.phase != "optimizer step":
        return []
    if faster.less_ms < _WORTH_SAYING_MS or not 0 < faster.more_bytes <= step.highest_bytes - step.peak_bytes:
        return []
    error = plan.expected_gradient_error or 0.0
    loses = f", with a gradient error of {faster.gradient_error:.2g} to expect" * (faster.gradient_error > error)
    return [
        f'recompute="{faster.recompute}" is expected to take {faster.less_ms:.3g} ms less and no more memory in all'
        f"{loses}: the optimizer's step takes {format_bytes(step.highest_bytes)}, forward and backward take "
        f"{format_bytes(step.peak_bytes)} and would take {format_bytes(faster.more_bytes)} more"
    ]


def _milder_codecs(graphs: Sequence[CapturedGraph], config: Config) -> list[str]:
    """What ``max_gradient_error`` changed, once for all graphs."""
    used = [graph.chosen or config for graph in graphs]
    reasons = [f"{kind}: {why}" for one in used for kind in FALLBACK if (why := one.why_milder(kind)) is not None]
    return list(dict.fromkeys(reasons))
