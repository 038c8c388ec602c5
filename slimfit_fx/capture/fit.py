"""Which settings fit a budget, and whether they still do when a batch grows.

Before a graph is compiled, candidates are tried from the least lossy on: Inductor writes the code of each, and a dry
run of that code tells its physical peak (planning/budget.py). A graph with symbolic sizes serves larger batches
without being compiled again, so each call with larger sizes runs the same code dry at those sizes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimfit_fx.capture.partitioner import GivesUp, PlanTooLarge
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout, hint
from slimfit_fx.planning.budget import Budget, Judged, held_alone
from slimfit_fx.planning.candidates import between
from slimfit_fx.planning.dry_run import GeneratedCode, codes_at, trace_step
from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.rows import GraphPlan

log = logging.getLogger("slimfit_fx.capture")


class PlanOutgrown(Exception):  # noqa: N818  (not an error: it asks for another plan before anything has run)
    """A graph was called with sizes at which its plan exceeds the budget."""


@dataclass(frozen=True)
class Attempt:
    """One candidate for one graph."""

    config: Config
    plan: GraphPlan
    codes: tuple[GeneratedCode, ...]
    trace: StepTrace
    """Of this graph alone."""
    step: StepTrace
    """Of a step through this graph and those planned before it."""
    judged: Judged


def fits(judged: Judged, budget: Budget) -> bool:
    """Whether the budget holds."""
    return judged.total_bytes <= budget.limit


AttemptMaker = Callable[[Sequence[Config], GivesUp | None], Attempt]
"""Plans the first candidate of which it is not told to give it up; raises ``PlanTooLarge`` if there is none."""


def first_that_fits(configs: Sequence[Config], attempt: AttemptMaker, budget: Budget) -> tuple[Attempt, bool]:
    """(the first candidate that fits, True), or (the smallest one, False).

    A candidate whose saved values alone are too much is given up before its code is written. If nothing fits, those
    that may still be the smallest are planned to the end, so that what is said to fit is the least that does. Where a
    step takes no more than the optimizer's, no other candidate can take less. And a candidate that may run more again
    than one with the same codecs before it, but holds no less, is none.
    """
    fixed = budget.fixed()
    least = fixed.total + fixed.update
    seen: list[Attempt] = []
    given_up: list[tuple[int, Config]] = []
    least_held: dict[tuple[tuple[str, str | None], ...], int] = {}

    def gives_up(config: Config, plan: GraphPlan) -> bool:
        held, codecs = held_alone(plan, budget), tuple(config.codec_map.items())
        if config.recompute != "cheap" and held >= least_held.get(codecs, held + 1):
            log.info("budget: %s holds no less than what runs less again", config.label)
            return True
        least_held[codecs] = min(held, least_held.get(codecs, held))
        if held > budget.limit:
            log.info("budget: %s holds %d bytes between forward and backward alone", config.label, held)
            given_up.append((held, config))
        return held > budget.limit

    left = list(configs)
    while left:
        try:
            found = attempt(left, gives_up)
        except PlanTooLarge:
            break
        log.info("budget: %s takes %d bytes", found.config.label, found.judged.total_bytes)
        seen.append(found)
        if fits(found.judged, budget):
            return found, True
        if found.judged.total_bytes == least:
            return found, False
        left = left[left.index(found.config) + 1 :]
    for held, config in sorted(given_up, key=lambda pair: pair[0]):
        if all(held < known.judged.total_bytes for known in seen):
            seen.append(attempt([config], None))
            log.info("budget: %s takes %d bytes", config.label, seen[-1].judged.total_bytes)
    return min(seen, key=lambda a: a.judged.total_bytes), False


def with_fewer_blocks(found: Attempt, tried: Sequence[Config], attempt: AttemptMaker, budget: Budget) -> Attempt:
    """``found``, or what fits as well and runs fewer blocks again, down to the candidate before it, which does not fit.

    What takes less than ``found`` though it runs less again is left aside, so that a smaller budget still never leads
    to a larger peak: whoever takes it up has found something that takes no more.
    """

    def gives_up(config: Config, plan: GraphPlan) -> bool:
        return held_alone(plan, budget) > budget.limit

    for config in between(tried, found.config, found.plan.blocks):
        try:
            other = attempt([config], gives_up)
        except PlanTooLarge:
            continue
        log.info("budget: %s takes %d bytes", config.label, other.judged.total_bytes)
        if found.judged.total_bytes <= other.judged.total_bytes <= budget.limit:
            return other
    return found


def trace_at(
    codes: Sequence[GeneratedCode], arguments: Sequence[Any], layout: GateLayout, passed_on: frozenset[int]
) -> StepTrace:
    """The memory events of a compiled graph in a call with ``arguments``, whatever sizes it was compiled for.

    Raises:
        LookupError: a size depends on more than the arguments.
        NotImplementedError: the code does what a dry run cannot follow.
    """
    forward, backward = codes_at(codes, arguments)
    with torch.no_grad(), torch._C._DisableAutocast():
        return trace_step(forward, backward, layout, passed_on=passed_on)


class SizeWatch:
    """Notices calls of one symbolic graph that are larger than those its plan was judged for.

    ``takes(arguments)`` is what a step of such sizes takes. Sizes below ones that fit are taken to fit.
    """

    def __init__(self, planned: Sequence[Any], takes: Callable[[Sequence[Any]], Judged], limit: int) -> None:
        self._takes, self._limit = takes, limit
        self._fitting = [sizes_of(planned)]

    def outgrown_by(self, arguments: Sequence[Any]) -> Judged | None:
        """What the step would take, if that is more than the budget; None if it fits."""
        sizes = sizes_of(arguments)
        if any(all(a <= b for a, b in zip(sizes, known, strict=True)) for known in self._fitting):
            return None
        judged = self._takes(arguments)
        if judged.total_bytes > self._limit:
            return judged
        self._fitting.append(sizes)
        return None

    def allow(self, arguments: Sequence[Any]) -> None:
        """Ask no more about these sizes."""
        self._fitting.append(sizes_of(arguments))


def sizes_of(arguments: Sequence[Any]) -> tuple[int, ...]:
    """The numbers among the arguments of a graph: its symbols, by their examples while it is compiled."""
    return tuple(hint(a) for a in arguments if isinstance(a, (int, torch.SymInt)) and not isinstance(a, bool))
