"""A model's graphs under a budget: which settings each gets, and what happens when batches grow after that.

The first plan of a model is made before anything is allocated, and refused if nothing fits. Later the budget can be
exceeded by a larger batch, by gradients of earlier micro-batches that nobody spoke of, or by an optimizer that takes
more than the one that was assumed. Then the settings in use are given up and the model is compiled again with those
that come after them (``floor``), so that this happens a few times at most. If nothing smaller is left, training goes on
with a warning.

Where a forward breaks into several graphs, the first have run when a later one is planned. If that one does not fit,
this forward goes on with its smallest plan, and before the next one all graphs are planned again with settings as small
as those. Only if these do not fit either, the budget is refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch._dynamo import symbolic_convert

from slimfit_fx.capture.captured import CapturedGraph, step_trace
from slimfit_fx.capture.fit import Attempt, PlanOutgrown, SizeWatch, first_that_fits, fits, trace_at, with_fewer_blocks
from slimfit_fx.capture.partitioner import PLAN_SINK, GatedPartitioner, GivesUp
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.budget import (
    Budget,
    FixedBytes,
    Judged,
    MemoryBudgetError,
    Retry,
    describe_excess,
    explain,
    explain_part,
    judge,
)
from slimfit_fx.planning.candidates import candidates, place_of
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
    settled: bool = False
    """All graphs of a forward were planned: from now on nothing is refused."""
    _planned: bool = False
    """In the forward before, a graph was planned and none refused."""
    _beside: FixedBytes | None = None
    """What there was beside the steps when the plans were judged last."""

    def begin_forward(self) -> bool:
        """Called before a forward. True if the model must be planned again first."""
        again, self.outgrown, self.in_forward = self.outgrown, False, False
        self.settled |= self._planned and not again
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
            return self._attempt(partitioner, captured, write_code, self.budget)

        def retry(config: Config, budget: Budget) -> tuple[Judged, StepTrace]:
            again = self._attempt(GatedPartitioner(config, layout), captured, write_code, budget)
            return again.judged, again.step

        self._beside = self.budget.fixed()
        tried = candidates(self.config)[self.floor :]
        found, holds = first_that_fits(tried, attempt, self.budget)
        if holds:
            found = with_fewer_blocks(found, tried, attempt, self.budget)
        else:
            batch = next((int(v.shape[0]) for v in example_inputs if _is_data(v)), None)
            self._go_on_or_refuse(captured, found, batch, retry)
        self._planned = True
        captured.chosen, captured.judged, captured.plan = found.config, found.judged, found.plan
        captured.keep_trace(found.trace)
        if found.codes[0].symbolic is not None:
            takes = self._taker(captured, found.codes)
            captured.watch = SizeWatch(example_inputs, takes, self.budget.limit)
        return found.config

    def _go_on_or_refuse(self, captured: CapturedGraph, found: Attempt, batch: int | None, retry: Retry) -> None:
        """Nothing fits: go on with ``found``, the smallest, if the model trains already or is planned again anyway.

        Raises:
            MemoryBudgetError: else.
        """
        others = self._others(captured)
        if self.outgrown or self._shrink_all(others, found):
            return
        if self.settled:
            self._warn(found.judged, batch)
            self.exhausted = True
            return
        self._planned = False
        if others or ends_at_a_break():
            raise MemoryBudgetError(explain_part(self.budget, found.judged))
        text = explain(self.budget, found.judged, found.step, batch, retry)
        raise MemoryBudgetError(text, smallest_bytes=found.judged.total_bytes)

    def _shrink_all(self, others: Sequence[CapturedGraph], found: Attempt) -> bool:
        """Have all graphs planned again before the next forward, with settings no larger than those of ``found``.

        False if that would change nothing.
        """
        tried = candidates(self.config)
        floor = tried.index(found.config)
        chosen = [place_of(graph.chosen, tried) for graph in others if graph.chosen is not None]
        if floor <= self.floor or min(chosen, default=floor) >= floor or not self.budget.update_fits():
            return False
        self.floor, self.outgrown = floor, True
        warnings.warn(
            f"slimfit_fx: memory_budget: the forward breaks into several graphs, and with the plans of the others a "
            f"step takes {found.judged.total_bytes} of {self.budget.limit} bytes: before the next forward all are "
            f"compiled again with smaller ones ({found.config.label})",
            RuntimeWarning,
            stacklevel=3,
        )
        return True

    def _attempt(
        self, partitioner: GatedPartitioner, captured: CapturedGraph, write_code: WriteCode, budget: Budget
    ) -> Attempt:
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
        judged = judge(config, step, budget)
        written = tuple(c for c in codes if isinstance(c, GeneratedCode))
        return Attempt(config, plans[-1], written, trace, step, judged)

    def _step_with(self, captured: CapturedGraph, trace: StepTrace) -> StepTrace | str:
        """The events of a step through the other graphs, at the largest sizes they had so far, and this one."""
        joined = step_trace([*(g.at_its_largest() for g in self._others(captured)), captured.with_trace(trace)])
        return joined if isinstance(joined, str) else joined[0]

    def _others(self, captured: CapturedGraph) -> list[CapturedGraph]:
        """The other graphs of a forward, as they were planned last."""
        others = (g for g in self.graphs if g is not captured and g.unit_names != captured.unit_names)
        return list({g.unit_names: g for g in others}.values())

    def _taker(self, captured: CapturedGraph, codes: Sequence[GeneratedCode]) -> Callable[[Sequence[Any]], Judged]:
        """What tells the bytes of a step in which ``captured`` is called with other sizes."""

        def takes(arguments: Sequence[Any]) -> Judged:
            assert captured.chosen is not None and captured.judged is not None
            layout = captured.layout
            assert layout is not None
            trace = trace_at(codes, arguments, layout, captured.passed_on)
            step = self._step_with(captured, trace)
            assert isinstance(step, StepTrace), step
            judged = judge(captured.chosen, step, self.budget)
            if judged.total_bytes >= captured.judged.total_bytes:
                captured.largest, captured.judged = trace, judged
            return judged

        return takes

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
        """Try the settings of ``captured`` no more, with a warning; False if nothing smaller is left, or would help."""
        tried = candidates(self.config)
        assert captured.chosen is not None
        floor = max(self.floor, place_of(captured.chosen, tried) + (captured.chosen in tried))
        if floor >= len(tried) or self.exhausted or not self.budget.update_fits():
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
        return self._judge_again("a step that accumulates gradients (gradient_accumulation was not set)")

    def meet_optimizers(self) -> bool:
        """Called before a forward, when optimizers may have been seen. True if the model must be planned again.

        The first plan was made for AdamW, or for the optimizer that the user spoke of. Warns as for gradients.
        """
        beside = self.budget.fixed()
        if self._beside in (None, beside):
            return False
        self._beside = beside
        return self._judge_again("a step with the optimizer that is in use")

    def _judge_again(self, why: str) -> bool:
        graph = next((g for g in reversed(self.graphs) if g.chosen is not None and g.largest is not None), None)
        if graph is None or graph.largest is None or graph.chosen is None:
            return False
        step = self._step_with(graph, graph.largest)
        assert isinstance(step, StepTrace), step
        judged = judge(graph.chosen, step, self.budget)
        if fits(judged, self.budget):
            return False
        leaves = self._leave(graph, judged, why)
        if not leaves:
            self._warn(judged, None)
        return leaves

    def _warn(self, judged: Judged, batch: int | None) -> None:
        warnings.warn(describe_excess(self.budget, judged, batch), RuntimeWarning, stacklevel=3)


def ends_at_a_break() -> bool:
    """Whether dynamo compiles this graph because the forward breaks behind it, so that more graphs will follow."""
    translating = getattr(symbolic_convert.tls, "current_tx", None)
    reason = getattr(getattr(translating, "output", None), "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() > 0
