"""The torch.compile backend: one captured graph in, one gated and compressed function out."""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfit_fx.capture.lower import add_gate_inputs, lower_with_inductor, lower_with_interpreter
from slimfit_fx.capture.partitioner import PLAN_SINK, GatedPartitioner, PlanReady
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.planning.budget import Budget, Judged, MemoryBudgetError, candidates, explain, judge
from slimfit_fx.planning.dry_run import GeneratedCode, trace_step
from slimfit_fx.planning.peak import StepTrace, join
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.planning.store import load_plan, load_trace, plan_key, save_plan, save_trace
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.grad_gate import gate_gradients

log = logging.getLogger("slimfit_fx.capture")


@dataclass
class CapturedGraph:
    """What is known of one compiled graph, for reports. ``unit_names[k]`` names gate ``k`` as it was at capture."""

    unit_names: tuple[str, ...]
    is_recompile: bool
    plan: GraphPlan | None = None
    num_inputs: int = 0
    key: str = ""
    """Names it in the store of plans; empty for one that is only tried."""
    codes: list[GeneratedCode] = field(default_factory=list, repr=False)
    """What Inductor wrote for it: forward, backward."""
    chosen: Config | None = None
    """The settings that a budget led to, if there is one."""
    _trace: StepTrace | None = field(default=None, repr=False)

    def trace(self) -> StepTrace | str:
        """All memory events of a step through this graph, or why they are not known."""
        if self._trace is None:
            self._trace = self._dry_run() if len(self.codes) == 2 else self._kept()
        if self._trace is not None:
            return self._trace
        return "no compiled backward of it was seen: run one training step with executor inductor"

    def _kept(self) -> StepTrace | None:
        return load_trace(self.key) if self.key else None

    def _dry_run(self) -> StepTrace | None:
        forward, backward = self.codes
        try:
            trace = trace_step(forward, backward, first_gate=self.num_inputs, num_gates=len(self.unit_names))
        except Exception:  # for display only: what Inductor wrote may hold anything
            log.warning("the memory of a compiled graph could not be followed", exc_info=True)
            return None
        self.codes.clear()
        if self.key:
            save_trace(self.key, trace)
        return trace


def step_trace(graphs: Sequence[CapturedGraph]) -> tuple[StepTrace, tuple[str, ...]] | str:
    """The memory events of a step through all ``graphs`` and the names of its gates, or why they are not known."""
    training = [graph for graph in graphs if graph.unit_names]
    traces = [graph.trace() for graph in training]
    unknown = [trace for trace in traces if isinstance(trace, str)]
    if unknown or not traces:
        return unknown[0] if unknown else "no graph with a gate was captured"
    names = tuple(dict.fromkeys(name for graph in training for name in graph.unit_names))
    numbers = [[names.index(name) for name in graph.unit_names] for graph in training]
    return join([trace for trace in traces if not isinstance(trace, str)], numbers), names


@dataclass(eq=False, repr=False)
class SlimFitBackend:
    """Callable for ``torch.compile(backend=...)``.

    Fails soft: a graph that cannot be compiled runs as the user wrote it.
    """

    config: Config
    gates: InitVar[GateTable]
    executor: str
    graphs: list[CapturedGraph] = field(default_factory=list)
    plan_only: bool = False
    """Stop when the plan is known, with ``PlanReady``; nothing is compiled."""
    with_peak: bool = False
    """With ``plan_only``: let Inductor write its code, too, so that the physical peak is known."""
    budget: Budget | None = None
    """What the steps of the model may take."""
    _frames: set[int] = field(default_factory=set)
    _said: bool = False

    def __post_init__(self, gates: GateTable) -> None:
        """Hold the table weakly: dynamo keeps every backend for ever, and the table keeps the model's parameters."""
        self._table = weakref.ref(gates)

    def __repr__(self) -> str:
        return f"SlimFitBackend({self.executor}, preset={self.config.preset!r})"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph; dynamo calls this once per graph and once more per recompile."""
        layout, units = gate_layout(example_inputs, self._gates())
        captured = CapturedGraph(units, self._seen_before(_frame_id()), num_inputs=layout.num_inputs)
        self.graphs.append(captured)
        self._say_if_checkpointed(gm)
        if not torch.is_grad_enabled() or not _trains_anything(gm, example_inputs):
            captured.plan = GraphPlan((), (("the graph", "nothing in it needs a gradient"),), (), 0)
            return self._lower_plain(gm, example_inputs)
        sink: list[GraphPlan] = []
        token = PLAN_SINK.set(sink)
        try:
            config = (
                self.config if self.budget is None else self._fit(gm, example_inputs, layout, captured, self.budget)
            )
            partitioner = GatedPartitioner(config, layout, self.plan_only and not self.with_peak)
            captured.key = plan_key(gm.graph, example_inputs, str(partitioner.uuid()))
            return self._lower(gm, example_inputs, partitioner, captured.codes)
        except MemoryBudgetError:
            raise
        except torch._dynamo.exc.RestartAnalysis:  # dynamo captures this function again, having learned something
            self._forget(captured)
            raise
        except Exception as error:
            if self.config.strict or self.plan_only:
                raise
            reason = f"{type(error).__name__}: {error}"
            if self.budget is not None:
                raise MemoryBudgetError(f"memory_budget cannot be promised: {reason}") from error
            sink.append(GraphPlan((), (("the graph", reason),), (), None, reason))
            log.warning("a graph could not be compiled", exc_info=True)
            warnings.warn(
                f"slimfit_fx: one graph of {len(gm.graph.nodes)} operators runs uncompiled and uncompressed: "
                f"{reason[:500]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return bind_gates(lambda *args: gm.forward(*args[: layout.num_inputs]), layout, self._gates())
        finally:
            PLAN_SINK.reset(token)
            captured.plan = sink[-1] if sink else load_plan(captured.key)
            if sink and not sink[-1].fallback:
                save_plan(captured.key, sink[-1])

    def _gates(self) -> GateTable:
        table = self._table()
        assert table is not None, "the session of this model is gone"
        return table

    def _say_if_checkpointed(self, gm: fx.GraphModule) -> None:
        checkpointed = torch.ops.higher_order.tag_activation_checkpoint
        if self._said or self.plan_only or not any(n.target is checkpointed for n in gm.graph.nodes):
            return
        self._said = True
        warnings.warn(
            "slimfit_fx: this model checkpoints activations (torch.utils.checkpoint): inside of the checkpointed parts "
            "they are computed again, and neither codecs nor gates apply to them; gradients of closed units are still "
            "dropped. Turn gradient checkpointing off to let slimfit_fx do it",
            RuntimeWarning,
            stacklevel=2,
        )

    def _seen_before(self, frame: int | None) -> bool:
        """Whether this model compiled this function before; other models of the same class do not count."""
        known = frame in self._frames
        if frame is not None:
            self._frames.add(frame)
        return known

    def _forget(self, captured: CapturedGraph) -> None:
        """Undo the entry of a capture that dynamo gave up."""
        self.graphs.remove(captured)
        frame = _frame_id()
        if frame is not None and not captured.is_recompile:
            self._frames.discard(frame)

    def _lower(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        partitioner: GatedPartitioner,
        codes: list[GeneratedCode],
        *,
        dry: bool = False,
    ) -> Callable[..., Any]:
        layout = partitioner.layout
        extended = add_gate_inputs(gm, len(layout.params))
        inputs = [*example_inputs, *(torch.tensor(True) for _ in layout.params)]
        if self.executor != "inductor":
            compiled = lower_with_interpreter(extended, inputs, partitioner)
        else:
            compiled = lower_with_inductor(extended, inputs, partitioner, codes, dry=dry or self.plan_only)
            if self.plan_only:
                raise PlanReady
        return bind_gates(compiled, layout, self._gates())

    def _fit(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        layout: GateLayout,
        captured: CapturedGraph,
        budget: Budget,
    ) -> Config:
        """The first candidate whose physical peak fits; nothing is compiled or allocated to find out.

        Raises:
            MemoryBudgetError: none does.
        """
        earlier = [graph for graph in self.graphs if graph is not captured and graph.unit_names != captured.unit_names]
        judged: list[Judged] = []
        traces: list[StepTrace] = []
        for config in candidates(self.config):
            attempt = dataclasses.replace(captured, codes=[], key="", _trace=None)
            self._lower(gm, example_inputs, GatedPartitioner(config, layout), attempt.codes, dry=True)
            traced = step_trace([*earlier, attempt])
            if isinstance(traced, str):
                raise MemoryBudgetError(f"memory_budget cannot be promised: {traced}")
            traces.append(traced[0])
            judged.append(judge(config, traces[-1], budget.fixed(), budget.open_count))
            log.info("budget: preset %s takes %d bytes", config.preset, judged[-1].total_bytes)
            if judged[-1].total_bytes <= budget.limit:
                captured.chosen = config
                return config
        batch = next((int(v.shape[0]) for v in example_inputs if _is_data(v)), None)
        smallest = min(zip(judged, traces, strict=True), key=lambda pair: pair[0].total_bytes)
        raise MemoryBudgetError(explain(budget, *smallest, batch))

    def _lower_plain(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.executor != "inductor" or self.plan_only:
            return gm.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, list(example_inputs))  # type: ignore[return-value]


def gate_layout(example_inputs: Sequence[Any], gates: GateTable) -> tuple[GateLayout, tuple[str, ...]]:
    """Which inputs are the parameters of which gate, and the units' names; by identity of the parameters."""
    by_unit: dict[str, list[int]] = {}
    for index, value in enumerate(example_inputs):
        unit = gates.unit_of(value)
        if unit is not None and value.requires_grad:
            by_unit.setdefault(unit, []).append(index)
    return GateLayout(len(example_inputs), tuple(tuple(v) for v in by_unit.values())), tuple(by_unit)


def bind_gates(compiled: Callable[..., Any], layout: GateLayout, gates: GateTable) -> Callable[..., Any]:
    """The function that dynamo calls: looks the gates up by parameter and drops the gradients of closed units."""
    params = [index for group in layout.params for index in group]
    leads = [group[0] for group in layout.params]
    table = weakref.ref(gates)

    def run(*args: Any) -> Any:
        gates = table()
        assert gates is not None, "the session of this model is gone"
        if not torch.is_grad_enabled():
            return compiled(*args, *(gates.always_open for _ in leads))
        values = [gates.gate_of(args[index]) for index in leads]
        is_open = [bool(gates.gate_of(args[index])) for index in params]
        if _ghosts_would_be_read():
            values = [gates.always_open for _ in leads]
        inputs = list(args)
        for index, tensor in zip(params, gate_gradients(gates, [inputs[i] for i in params], is_open), strict=True):
            inputs[index] = tensor
        return compiled(*inputs, *values)

    return run


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() > 0


def _ghosts_would_be_read() -> bool:
    """Saved-tensor hooks (offloading, checkpointing) and anomaly mode read every saved tensor: keep real ones."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or torch.is_anomaly_enabled()


def _frame_id() -> int | None:
    """Dynamo's number of the function being compiled; equal numbers mean that the same function is compiled again."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def _trains_anything(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    if any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs):
        return True
    return any(isinstance(p, nn.Parameter) and p.requires_grad for p in gm.parameters())
