"""A model's graphs under a budget: which settings each gets, and what happens when batches grow after that.

The first plan of a model is made before anything is allocated, and refused if nothing fits. Later the budget can be
exceeded by a larger batch, or by gradients of earlier micro-batches that nobody spoke of. Then the settings in use are
given up and the model is compiled again with those that come after them (``floor``), so that this happens a few times
at most. If nothing smaller is left, training goes on with a warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimfit_fx.capture.captured import CapturedGraph, step_trace
from slimfit_fx.capture.fit import Attempt, PlanOutgrown, SizeWatch, first_that_fits, fits, judged_under, trace_at
from slimfit_fx.capture.partitioner import PLAN_SINK, GatedPartitioner, GivesUp
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.budget import Budget, Judged, MemoryBudgetError, candidates, describe_excess, explain
from slimfit_fx.planning.dry_run import GeneratedCode, StepCode
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.rows import GraphPlan

WriteCode = Callable[[GatedPartitioner, list[StepCode]], object]
"""Lowers a graph without compiling it; the list receives its code."""


@dataclass(eq=False)
class UnderBudget:
    """The budget of one model. ``graphs`` is the backend's list of what was captured."""

    config: Config
    budget: Budget
    graphs: list[CapturedGraph] = field(repr=False)
    floor: int = 0
    """How many of the first candidates are tried no more."""
    exhausted: bool = False
    """A batch was met that nothing fits: a larger one does not help."""
    outgrown: bool = False
    """Set when a graph was outgrown in the middle of a forward: plan again before the next one."""
    in_forward: bool = False
    """Whether a graph of the forward that runs now has run."""

    def begin_forward(self) -> bool:
        """Called before a forward. True if the model must be planned again first."""
        again, self.outgrown, self.in_forward = self.outgrown, False, False
        return again

    def choose(
        self, captured: CapturedGraph, layout: GateLayout, example_inputs: Sequence[Any], write_code: WriteCode
    ) -> Config:
        """The first candidate whose physical peak fits; nothing is compiled or allocated to find out.

        Raises:
            MemoryBudgetError: none does, and the model was not planned before.
        """

        def attempt(configs: Sequence[Config], gives_up: GivesUp | None) -> Attempt:
            first, *others = configs if gives_up is not None else configs[:1]
            partitioner = GatedPartitioner(first, layout, gives_up=gives_up, others=tuple(others))
            return self._attempt(partitioner, captured, write_code)

        found, holds = first_that_fits(candidates(self.config)[self.floor :], attempt, self.budget)
        if not holds:
            batch = next((int(v.shape[0]) for v in example_inputs if _is_data(v)), None)
            if not self._planned_before(captured):
                text = explain(self.budget, found.judged, found.step, batch)
                raise MemoryBudgetError(text, smallest_bytes=found.judged.total_bytes)
            self._warn(found.judged, batch)
            self.exhausted = True
        captured.chosen, captured.judged, captured.plan = found.config, found.judged, found.plan
        captured.keep_trace(found.trace)
        if found.codes[0].symbolic is not None:
            takes = self._taker(captured, found.codes)
            captured.watch = SizeWatch(example_inputs, takes, self.budget.limit)
        return found.config

    def _attempt(self, partitioner: GatedPartitioner, captured: CapturedGraph, write_code: WriteCode) -> Attempt:
        """Write the code of one candidate, of which the partitioner knows, and run it dry."""
        plans: list[GraphPlan] = []
        token = PLAN_SINK.set(plans)
        codes: list[StepCode] = []
        try:
            write_code(partitioner, codes)
        finally:
            PLAN_SINK.reset(token)
        tried = dataclasses.replace(captured, codes=list(codes), key="", _trace=None)
        trace = tried.trace()
        step = trace if isinstance(trace, str) else self._step_with(captured, trace)
        if isinstance(trace, str) or isinstance(step, str):
            raise MemoryBudgetError(f"memory_budget cannot be promised: {step}")
        config = partitioner.taken[-1]
        judged = judged_under(config, step, self.budget)
        written = tuple(c for c in codes if isinstance(c, GeneratedCode))
        return Attempt(config, plans[-1], written, trace, step, judged)

    def _step_with(self, captured: CapturedGraph, trace: StepTrace) -> StepTrace | str:
        """The events of a step through the other graphs, at the largest sizes they had so far, and this one."""
        others = {g.unit_names: g for g in self.graphs if g is not captured and g.unit_names != captured.unit_names}
        joined = step_trace([*(g.at_its_largest() for g in others.values()), captured.with_trace(trace)])
        return joined if isinstance(joined, str) else joined[0]

    def _taker(self, captured: CapturedGraph, codes: Sequence[GeneratedCode]) -> Callable[[Sequence[Any]], Judged]:
        """What tells the bytes of a step in which ``captured`` is called with other sizes."""

        def takes(arguments: Sequence[Any]) -> Judged:
            assert captured.chosen is not None and captured.judged is not None
            layout = captured.layout
            assert layout is not None
            trace = trace_at(codes, arguments, layout, captured.passed_on)
            step = self._step_with(captured, trace)
            assert isinstance(step, StepTrace), step
            judged = judged_under(captured.chosen, step, self.budget)
            if judged.total_bytes >= captured.judged.total_bytes:
                captured.largest, captured.judged = trace, judged
            return judged

        return takes

    def _planned_before(self, captured: CapturedGraph) -> bool:
        return any(g.chosen is not None and g.unit_names == captured.unit_names for g in self.graphs)

    def check(self, captured: CapturedGraph, arguments: Sequence[Any]) -> None:
        """Called with the arguments of a graph before it runs.

        Raises:
            PlanOutgrown: it would exceed the budget, smaller plans are left, and nothing of this forward has run.
        """
        exceeding = None if captured.watch is None else captured.watch.outgrown_by(arguments)
        if exceeding is not None and captured.watch is not None:
            leaves = self._leave(captured, exceeding, "a larger batch")
            if leaves and not self.in_forward:
                raise PlanOutgrown
            self.outgrown |= leaves
            captured.watch.allow(arguments)
            if not leaves:
                self._warn(exceeding, None)
        self.in_forward = True

    def _leave(self, captured: CapturedGraph, judged: Judged, why: str) -> bool:
        """Try the settings of ``captured`` no more, with a warning; False if there is nothing smaller."""
        tried = candidates(self.config)
        assert captured.chosen is not None
        floor = max(self.floor, tried.index(captured.chosen) + 1)
        if floor >= len(tried) or self.exhausted:
            return False
        self.floor = floor
        warnings.warn(
            f"slimfit_fx: memory_budget: {why} would take {judged.total_bytes} of {self.budget.limit} bytes with the "
            f"plan that was chosen ({captured.chosen.label}): the model is compiled again with a smaller one",
            RuntimeWarning,
            stacklevel=4,
        )
        return True

    def expect_gradients(self) -> bool:
        """From now on gradients of earlier micro-batches are alive in a step. True if the model must be planned again.

        Warns if they exceed the budget and nothing smaller is left.
        """
        self.budget = dataclasses.replace(self.budget, accumulates=True)
        graph = next((g for g in reversed(self.graphs) if g.chosen is not None and g.largest is not None), None)
        if graph is None or graph.largest is None or graph.chosen is None:
            return False
        step = self._step_with(graph, graph.largest)
        assert isinstance(step, StepTrace), step
        judged = judged_under(graph.chosen, step, self.budget)
        if fits(judged, self.budget):
            return False
        leaves = self._leave(graph, judged, "a step that accumulates gradients (gradient_accumulation was not set)")
        if not leaves:
            self._warn(judged, None)
        return leaves

    def _warn(self, judged: Judged, batch: int | None) -> None:
        warnings.warn(describe_excess(self.budget, judged, batch), RuntimeWarning, stacklevel=3)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() > 0
