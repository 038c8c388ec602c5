"""The torch.compile backend: one captured graph in, one gated and compressed function out."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimfit_fx.capture.call_stack import with_room
from slimfit_fx.capture.captured import CapturedGraph
from slimfit_fx.capture.loss_only import find_loss_only
from slimfit_fx.capture.lower import add_gate_inputs, lower_plain, lower_with_inductor, lower_with_interpreter
from slimfit_fx.capture.partitioner import PLAN_SINK, GatedPartitioner, GivesUp, PlanReady
from slimfit_fx.capture.under_budget import UnderBudget, ends_at_a_break
from slimfit_fx.config import Config
from slimfit_fx.graph.joint import GateLayout
from slimfit_fx.passes.simplify_masks import describe_masks, read_masks, simplify_masks
from slimfit_fx.planning.budget import Budget, MemoryBudgetError
from slimfit_fx.planning.dry_run import StepCode
from slimfit_fx.planning.rows import GraphPlan
from slimfit_fx.planning.store import load_plan, plan_key, save_plan
from slimfit_fx.presets import LOSSLESS_PRESETS
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.grad_gate import gate_gradients

Check = Callable[[Sequence[Any]], None]
log = logging.getLogger("slimfit_fx.capture")


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
    budget: InitVar[Budget | None] = None
    """What the steps of the model may take."""
    gives_up: GivesUp | None = None
    """Ends a rehearsal with ``PlanTooLarge`` when the plan of a graph tells enough."""
    _frames: set[int] = field(default_factory=set)
    _said: bool = False

    def __post_init__(self, gates: GateTable, budget: Budget | None) -> None:
        """Hold the table weakly: dynamo keeps every backend for ever, and the table keeps the model's parameters."""
        self._table = weakref.ref(gates)
        self.under = None if budget is None else UnderBudget(self.config, budget, self.graphs)

    def __repr__(self) -> str:
        return f"SlimFitBackend({self.executor}, preset={self.config.preset!r})"

    @with_room
    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph; dynamo calls this once per graph and once more per recompile."""
        layout, units = gate_layout(example_inputs, self._gates())
        captured = CapturedGraph(units, self._seen_before(_frame_id()), layout=layout)
        captured.passed_on = frozenset(i for i, v in enumerate(example_inputs) if _is_computed(v))
        self.graphs.append(captured)
        self._say_if_checkpointed(gm)
        sink: list[GraphPlan] = []
        token = PLAN_SINK.set(sink)
        try:
            if not torch.is_grad_enabled() or not _trains_anything(gm, example_inputs):
                captured.layout = None
                sink.append(GraphPlan((), (("the graph", "nothing in it needs a gradient"),), (), 0))
                return gm.forward if self.plan_only else lower_plain(gm, example_inputs, self.executor)
            captured.masks = read_masks(gm.graph)
            self._look_at_outputs(gm, captured)
            config, check = self.config, _no_check
            if self.under is not None:
                config = self._under_budget(self.under, gm, example_inputs, layout, captured)
                check = functools.partial(self.under.check, captured)
            partitioner = GatedPartitioner(config, layout, self.plan_only and not self.with_peak, self.gives_up)
            captured.key = plan_key(gm.graph, example_inputs, self._key_of(partitioner, captured))
            compiled = self._lower(gm, example_inputs, partitioner, captured, captured.codes, key=captured.key)
            return captured.loss_only.filled(bind_gates(compiled, layout, self._gates(), check))
        except MemoryBudgetError:
            self._forget(captured)
            raise
        except torch._dynamo.exc.RestartAnalysis:  # dynamo captures this function again, having learned something
            self._forget(captured)
            raise
        except Exception as error:
            if self.config.strict or self.plan_only:
                raise
            reason = f"{type(error).__name__}: {error}"
            if self.under is not None:
                raise MemoryBudgetError(f"memory_budget cannot be promised: {reason}") from error
            sink.append(GraphPlan((), (("the graph", reason),), (), None, reason))
            log.warning("a graph could not be compiled", exc_info=True)
            warnings.warn(
                f"slimfit_fx: one graph of {len(gm.graph.nodes)} operators runs uncompiled and uncompressed: "
                f"{reason[:500]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return bind_gates(lambda *args: gm.forward(*args[: layout.num_inputs]), layout, self._gates(), _no_check)
        finally:
            PLAN_SINK.reset(token)
            captured.plan = self._with_note(captured, captured.plan or (sink[-1] if sink else load_plan(captured.key)))
            if sink and captured.key and not sink[-1].fallback:
                save_plan(captured.key, sink[-1])

    def _gates(self) -> GateTable:
        table = self._table()
        assert table is not None, "the session of this model is gone"
        return table

    def _look_at_outputs(self, gm: fx.GraphModule, captured: CapturedGraph) -> None:
        """Leave out what is not asked for, or say what that would spare."""
        found = find_loss_only(gm, breaks=ends_at_a_break())
        if self.config.outputs == "loss":
            captured.loss_only = found
        else:
            captured.advice = found.advise()

    def _key_of(self, partitioner: GatedPartitioner, captured: CapturedGraph) -> str:
        """All that a plan depends on besides the graph."""
        return f"{partitioner.uuid()}:{self._simplifies_masks()}:{len(captured.loss_only.left_out)}"

    def _simplifies_masks(self) -> bool:
        """Not under a preset that has the bits of torch.compile."""
        config = self.config
        return config.preset not in LOSSLESS_PRESETS and "simplify_masks" not in config.disabled_passes

    def _with_note(self, captured: CapturedGraph, plan: GraphPlan | None) -> GraphPlan | None:
        masks = describe_masks(captured.masks, dropped=self._simplifies_masks())
        told = [part for part in (masks, captured.loss_only.describe(), captured.advice) if part]
        if plan is None or not told:
            return plan
        return replace(plan, note="; ".join(filter(None, (plan.note, *told))))

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
        captured: CapturedGraph,
        codes: list[StepCode],
        *,
        dry: bool = False,
        key: str = "",
    ) -> Callable[..., Any]:
        layout = partitioner.layout
        extended = add_gate_inputs(gm, len(layout.params))
        if self._simplifies_masks():
            simplify_masks(extended, captured.masks)
        captured.loss_only.drop(extended)
        inputs = [*example_inputs, *(torch.tensor(True) for _ in layout.params)]
        if self.executor != "inductor":
            compiled = lower_with_interpreter(extended, inputs, partitioner, codes)
        else:
            compiled = lower_with_inductor(extended, inputs, partitioner, codes, dry=dry or self.plan_only, key=key)
            if self.plan_only and not dry:
                raise PlanReady
        return compiled

    def _under_budget(
        self,
        under: UnderBudget,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        layout: GateLayout,
        captured: CapturedGraph,
    ) -> Config:
        """The settings that fit. With ``plan_only`` that is all there is to do.

        Raises:
            MemoryBudgetError: nothing fits.
        """

        def write_code(partitioner: GatedPartitioner, codes: list[StepCode]) -> object:
            return self._lower(gm, example_inputs, partitioner, captured, codes, dry=True)

        config = under.choose(captured, layout, example_inputs, write_code)
        if self.plan_only:
            raise PlanReady
        return config


def gate_layout(example_inputs: Sequence[Any], gates: GateTable) -> tuple[GateLayout, tuple[str, ...]]:
    """Which inputs are the parameters of which gate, and the units' names; by identity of the parameters."""
    by_unit: dict[str, list[int]] = {}
    for index, value in enumerate(example_inputs):
        unit = gates.unit_of(value)
        if unit is not None and value.requires_grad:
            by_unit.setdefault(unit, []).append(index)
    return GateLayout(len(example_inputs), tuple(tuple(v) for v in by_unit.values())), tuple(by_unit)


def bind_gates(
    compiled: Callable[..., Any],
    layout: GateLayout,
    gates: GateTable,
    check: Check,
) -> Callable[..., Any]:
    """The function that dynamo calls: looks the gates up by parameter and drops the gradients of closed units.

    ``check`` is given the arguments before anything runs.
    """
    params = [index for group in layout.params for index in group]
    leads = list(itertools.accumulate((len(group) for group in layout.params), initial=0))[:-1]
    """Where in ``params`` each gate's first is."""
    table = weakref.ref(gates)

    def run(*args: Any) -> Any:
        gates = table()
        assert gates is not None, "the session of this model is gone"
        if not torch.is_grad_enabled():
            return compiled(*args, *(gates.always_open for _ in leads))
        check(args)
        inputs = list(args)
        gated = [inputs[index] for index in params]
        states, is_open = gates.states_of(gated)
        values = [states[place] for place in leads]
        if _ghosts_would_be_read():
            values = [gates.always_open for _ in leads]
        for index, tensor in zip(params, gate_gradients(gates, gated, is_open), strict=True):
            inputs[index] = tensor
        return compiled(*inputs, *values)

    return run


def _no_check(_: Sequence[Any]) -> None:
    """Without a budget any size will do."""


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


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
