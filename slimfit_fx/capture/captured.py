"""What is known of the graphs that were captured, and the memory events of a step through them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slimfit_fx.capture.fit import SizeWatch
from slimfit_fx.capture.loss_only import NOTHING_LEFT_OUT, LossOnly
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.budget import Judged
from slimfit_fx.planning.dry_run import StepCode, trace_step
from slimfit_fx.planning.peak import StepTrace, join
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.planning.store import load_codes, load_trace, save_trace

log = logging.getLogger("slimfit_fx.capture")


@dataclass
class CapturedGraph:
    """What is known of one compiled graph, for reports. ``unit_names[k]`` names gate ``k`` as it was at capture."""

    unit_names: tuple[str, ...]
    is_recompile: bool
    plan: GraphPlan | None = None
    key: str = ""
    """Names it in the store of plans; empty for one that is only tried."""
    layout: GateLayout | None = None
    """Its gates; None if nothing in it needs a gradient."""
    passed_on: frozenset[int] = frozenset()
    """Inputs that another graph of the step computed."""
    masks: tuple[str | None, ...] = ()
    """What the mask of each attention says (passes/simplify_masks.py)."""
    loss_only: LossOnly = NOTHING_LEFT_OUT
    """Outputs that a training forward does not give."""
    advice: str = ""
    """What it would spare not to."""
    codes: list[StepCode] = field(default_factory=list, repr=False)
    """What runs, forward and backward: as Inductor wrote it, or graphs."""
    chosen: Config | None = None
    """The settings that a budget led to, if there is one."""
    judged: Judged | None = None
    """What a step takes with them, by the largest sizes that were called so far."""
    largest: StepTrace | None = field(default=None, repr=False)
    """Under a budget: the memory events of those sizes."""
    watch: SizeWatch | None = field(default=None, repr=False)
    """Under a budget, where sizes are symbolic: notices larger ones."""
    _trace: StepTrace | None = field(default=None, repr=False)

    def trace(self) -> StepTrace | str:
        """All memory events of a step through this graph, or why they are not known."""
        if self._trace is None and self.key and len(self.codes) != 2:
            self._trace = load_trace(self.key)
        if self._trace is None:
            self._trace = self._dry_run(self.codes if len(self.codes) == 2 or not self.key else load_codes(self.key))
        if self._trace is not None:
            return self._trace
        return "no compiled backward of it was seen: run one training step"

    def is_known(self) -> bool:
        """Whether the memory events of a training step through it are known."""
        return self.layout is not None and not isinstance(self.trace(), str)

    def keep_trace(self, trace: StepTrace) -> None:
        """Take ``trace`` for its own, by the sizes that it was compiled for."""
        self.largest = self._trace = trace

    def with_trace(self, trace: StepTrace) -> CapturedGraph:
        """The same graph, as if a step through it were ``trace``."""
        return dataclasses.replace(self, codes=[], _trace=trace)

    def at_its_largest(self) -> CapturedGraph:
        """The same graph, called with the largest sizes it had so far."""
        return self if self.largest is None else self.with_trace(self.largest)

    def _dry_run(self, codes: list[Any]) -> StepTrace | None:
        if len(codes) != 2:
            return None
        forward, backward = codes
        assert self.layout is not None
        try:
            with torch.no_grad(), torch._C._DisableAutocast():
                trace = trace_step(forward, backward, self.layout, passed_on=self.passed_on)
        except Exception:  # for display only: what Inductor wrote may hold anything
            log.warning("the memory of a compiled graph could not be followed", exc_info=True)
            return None
        codes.clear()
        if self.key:
            save_trace(self.key, trace)
        return trace


def step_trace(graphs: Sequence[CapturedGraph]) -> tuple[StepTrace, tuple[str, ...]] | str:
    """The memory events of a step through all ``graphs`` and the names of its gates, or why they are not known."""
    training = [graph for graph in graphs if graph.unit_names or graph.is_known()]
    traces = [graph.trace() for graph in training]
    unknown = [trace for trace in traces if isinstance(trace, str)]
    if unknown or not any(graph.unit_names for graph in training):
        return unknown[0] if unknown else "no graph with a gate was captured"
    names = tuple(dict.fromkeys(name for graph in training for name in graph.unit_names))
    numbers = [[names.index(name) for name in graph.unit_names] for graph in training]
    return join([trace for trace in traces if not isinstance(trace, str)], numbers), names
