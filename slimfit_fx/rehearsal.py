"""Training steps that are planned but not run: on fake tensors, with nothing compiled and no memory for activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.optim import Optimizer

from slimfit_fx.beside_steps import Optimizers, make_budget, make_fixed_bytes, open_count, seen_or_given
from slimfit_fx.capture.backend import SlimFitBackend
from slimfit_fx.capture.call_stack import with_room
from slimfit_fx.capture.captured import CapturedGraph, step_trace
from slimfit_fx.capture.dynamo import compile_forward, one_graph
from slimfit_fx.capture.lower import write_plain_code
from slimfit_fx.capture.off_meta import off_meta
from slimfit_fx.capture.partitioner import GivesUp, PlanReady, PlanTooLarge
from slimfit_fx.capture.under_budget import ends_at_a_break
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.budget import Budget, MemoryBudgetError, fixed_bytes
from slimfit_fx.planning.dry_run import GeneratedCode, trace_step
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.rows import MemoryPlan
from slimfit_fx.planning.timeline import Timeline, read_timeline
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.schedule import Scheduler, UnitInfo, make_scheduler
from slimfit_fx.session import build_plan
from slimfit_fx.units import GateUnit

E = TypeVar("E", bound=BaseException)
_BREAKS = (
    "the forward breaks into several graphs, and only the first can be planned before the model has run: train one "
    "step and ask slimfit_fx.session(model).plan (TORCH_LOGS=graph_breaks tells where it breaks)"
)


@dataclass
class Rehearsal:
    """One model and its units. Every method takes what the model's forward takes, as ``args`` and ``kwargs``.

    Inputs and model may be real, or on the meta device; ``faked`` makes fake tensors of real ones, too.
    """

    model: nn.Module
    units: Sequence[GateUnit]
    faked: bool = False
    optimizer: Optimizer | None = None
    """What the model will be trained with; AdamW is assumed if nobody says so."""

    @property
    def _optimizers(self) -> Optimizers:
        return seen_or_given(list, self.optimizer)

    def plan(self, config: Config, args: Any, kwargs: Any, *, peak: bool = False, compare: bool = False) -> MemoryPlan:
        """The plan of one step. ``peak``: with its physical peak; ``compare``: and that of plain torch.compile.

        Raises:
            MemoryBudgetError: ``config`` has a budget, and nothing fits, or the forward breaks into several graphs.
            ValueError: the model cannot be captured.
        """
        scheduler = self.scheduler(config)
        budget = make_budget(self.model, config, self.units, scheduler, self._optimizers)
        graphs, breaks = self._captured(config, args, kwargs, peak=peak or budget is not None, budget=budget)
        if breaks and budget is not None:
            raise MemoryBudgetError(f"memory_budget cannot be promised: {_BREAKS}")
        opened = open_count(config, scheduler, self.units)
        fixed = make_fixed_bytes(self.model, config, self.units, scheduler, self._optimizers)()
        state = None if self.optimizer is None else fixed.optimizer_state
        found = build_plan(self.model, config, self.units, graphs, state, open_count=opened, beside=fixed)
        found = dataclasses.replace(found, notes=(*found.notes, _BREAKS)) if breaks else found
        return found.with_comparison(self.plain_timeline(args, kwargs)) if compare else found

    def budget(self, config: Config) -> Budget:
        """What steps of the model may take under ``config``, which has a budget."""
        found = make_budget(self.model, config, self.units, self.scheduler(config), self._optimizers)
        assert found is not None
        return found

    def graphs(
        self,
        config: Config,
        args: Any,
        kwargs: Any,
        *,
        peak: bool,
        budget: Budget | None = None,
        gives_up: GivesUp | None = None,
    ) -> list[CapturedGraph]:
        """What is captured of a step: with just the settings of ``config``, or with those that fit into ``budget``.

        Raises:
            PlanTooLarge: ``gives_up`` said so of the plan of a graph, before its code was written.
            MemoryBudgetError: nothing fits.
            ValueError: the model cannot be captured, or not in one graph.
        """
        found, breaks = self._captured(config, args, kwargs, peak=peak, budget=budget, gives_up=gives_up)
        if breaks:
            raise ValueError(_BREAKS)
        return found

    def _captured(
        self, config: Config, args: Any, kwargs: Any, *, peak: bool, **limits: Any
    ) -> tuple[list[CapturedGraph], bool]:
        """What is captured of a step, up to the first graph that trains; and whether the forward goes on behind it.

        ``limits``: ``budget`` or ``gives_up``, as the backend takes them.
        """
        breaks = False

        def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            nonlocal breaks
            breaks = ends_at_a_break()
            return backend(gm, inputs)

        with off_meta(self.model, args, kwargs, always=self.faked) as (real, args, kwargs):
            by_name = dict(real.named_parameters(remove_duplicate=False))
            gates = GateTable({u.name: [by_name[u.name]] for u in self.units})
            backend = SlimFitBackend(config, gates, "inductor", plan_only=True, with_peak=peak, **limits)
            capture_only(real, capture, args, kwargs)
        return backend.graphs, breaks

    def plain_timeline(self, args: Any, kwargs: Any) -> Timeline | str:
        """The memory of a step under plain torch.compile, or why it is not known."""
        trace = self.plain_trace(args, kwargs)
        if trace is None:
            return "no graph that trains was captured"
        everything = fixed_bytes(self.model, [], 0, optimizer_state=0)
        return read_timeline(trace, (), update_bytes=everything.update)

    def plain_trace(self, args: Any, kwargs: Any) -> StepTrace | None:
        """The memory events of a step under plain torch.compile; None if no graph that trains was captured."""
        traced: list[StepTrace] = []
        with off_meta(self.model, args, kwargs, always=self.faked) as (real, args, kwargs):
            capture_only(real, lambda gm, inputs: _trace_plain(gm, inputs, traced), args, kwargs)
        return traced[0] if traced else None

    def scheduler(self, config: Config) -> Scheduler:
        """A scheduler as a session with ``config`` starts it."""
        scheduler = make_scheduler(config.scheduler)
        units = [UnitInfo(u.name, u.numel, u.bytes) for u in self.units]
        scheduler.start(units, freeze_rate=config.freeze_rate, seed=0)
        return scheduler


def _trace_plain(gm: fx.GraphModule, inputs: Sequence[Any], traced: list[StepTrace]) -> Any:
    codes: list[GeneratedCode] = []
    write_plain_code(gm, inputs, codes)
    if len(codes) == 2:
        with torch.no_grad(), torch._C._DisableAutocast():
            traced.append(trace_step(codes[0], codes[1], GateLayout(len(inputs), ())))
    raise PlanReady


def known_step(graphs: Sequence[CapturedGraph]) -> StepTrace:
    """The memory events of a step through ``graphs``.

    Raises:
        MemoryBudgetError: they are not known.
    """
    traced = step_trace(graphs)
    if isinstance(traced, str):
        raise MemoryBudgetError(f"memory_budget cannot be promised: {traced}")
    return traced[0]


@with_room
def capture_only(model: nn.Module, backend: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Let dynamo capture one training forward for ``backend``, which ends it with ``PlanReady``.

    Raises:
        MemoryBudgetError, PlanTooLarge: the backend did.
        ValueError: the model cannot be captured.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.enable_grad(), one_graph():
            compile_forward(model, backend, dynamic=False)(*args, **kwargs)
    except Exception as error:
        over = caused_by(error, MemoryBudgetError) or caused_by(error, PlanTooLarge)
        if over is not None:
            raise over from None
        if caused_by(error, PlanReady) is None:
            raise ValueError(f"this model cannot be captured: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode


def caused_by(error: BaseException | None, kind: type[E]) -> E | None:
    """The first exception of this kind among ``error`` and its causes, as dynamo wraps them; or None."""
    while error is not None:
        for candidate in (error, getattr(error, "inner_exception", None)):
            if isinstance(candidate, kind):
                return candidate
        error = error.__cause__ or error.__context__
    return None
