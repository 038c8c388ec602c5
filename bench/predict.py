"""What a training step would take, without running it: for batches that do not fit this machine.

- slimfit_fx and everything under torch.compile: a dry run of the code that Inductor writes (slimfit_fx/rehearsal.py).
- Eager rivals: the step itself, on fake tensors, while a dispatch mode adds up the storages that are alive
  (``slimfit_fx.planning.update.count_bytes``). What an operator takes for itself is not seen there: ``python -m bench
  memory --validate`` holds predictions against the allocator.

Predictions are of the kernels of the case's device, which must be there, if only emulated (bench/emulated_gpu): a dry
run asks it for its properties. A prediction is never mixed with what was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from bench.models import Case, autocast, build_model, make_batch, parameter_bytes
from bench.rivals import Rival, Settings, adapted, config_of, rival_of
from slimfit_fx.planning.roofline import Work, operator_flops, roofline_of


@dataclass(frozen=True)
class Prediction:
    """Bytes of one training step; the step's and the update's are above what is there before the step."""

    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    step_bytes: int
    update_bytes: int
    expected_ms: float | None = None
    """Forward and backward by the roofline."""
    roofline: dict[str, Any] | None = None
    """The rates that it goes by."""
    chosen: str | None = None
    """The plan that a budget led to."""

    @property
    def total_bytes(self) -> int:
        """The most that is held on the device at any moment of the step."""
        fixed = self.parameter_bytes + self.buffer_bytes + self.optimizer_bytes + self.batch_bytes
        return fixed + max(self.step_bytes, self.update_bytes)


def predict(name: str, case: Case, settings: Settings) -> Prediction:
    """Predict a step of the rival called ``name``; nothing is allocated but a few parameters' worth of host memory.

    Raises:
        ValueError: the model cannot be captured, nothing fits the rival's budget, or the device is not there.
    """
    from slimfit_fx.capture.off_meta import off_meta

    rival = rival_of(name)
    case = rival.case(case)
    device = torch.device(case.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("a GPU's kernels are predicted where there is one, or with python -m bench.emulated_gpu")
    without_values = replace(case, device="meta")
    with torch.device("meta"):
        model = adapted(rival, build_model(without_values))
    with off_meta(model, (), make_batch(without_values), device=device) as (model, _, batch):
        pass  # fake tensors of the device
    if rival.preset is not None:
        return _ours(rival, model, batch, case, settings)
    if rival.compiled:
        return _compiled(rival, model, batch, case)
    return _eager(model, batch, case)


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the elements of all ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _eager(model: nn.Module, batch: dict[str, Tensor], case: Case) -> Prediction:
    from slimfit_fx.capture.off_meta import off_meta
    from slimfit_fx.planning.update import count_bytes

    noted = _WorkNotes()
    with off_meta(model, (), batch, always=True) as (fake, _, inputs):
        step_bytes = count_bytes(lambda: _train(fake, inputs, case))
        with noted:
            _train(fake, inputs, case)
    return _expected(_plain(model, batch, step_bytes), noted.work, case.device)


class _WorkNotes(TorchDispatchMode):
    """Writes down what each operator does that runs while it is on: an eager operator is a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        if returned and not _is_view(func):
            shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, args)
            flops = operator_flops(func._schema.name, func, shapes, tuple(returned[0].shape))
            read = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            dtype = str(returned[0].dtype).removeprefix("torch.")
            self.work.append(Work(flops, tensor_bytes([*read, *returned]), dtype))
        return result


def _is_view(func: Any) -> bool:
    """Whether the operator returns what it was given in another shape, and touches no element."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return func is torch.ops.aten._unsafe_view.default or any(info and not info.is_write for info in infos)


def _expected(found: Prediction, work: Sequence[Work], device: str, open_share: float = 0.0) -> Prediction:
    """``found`` with how long the roofline of the device expects forward and backward to take."""
    roofline = roofline_of(torch.device(device))
    return replace(found, expected_ms=roofline.expected_ms(work, open_share), roofline=asdict(roofline))


def _train(model: nn.Module, batch: dict[str, Tensor], case: Case) -> Any:
    """Forward and backward; all that the model returns stays alive."""
    with autocast(case):
        outputs = model(**batch)
    outputs.loss.backward()
    return outputs


def _compiled(rival: Rival, model: nn.Module, batch: dict[str, Tensor], case: Case) -> Prediction:
    from slimfit_fx.rehearsal import Rehearsal

    share = rival.activation_budget
    patched = {} if share is None else {"activation_memory_budget": share}
    with torch._functorch.config.patch(patched) if patched else contextlib.nullcontext(), autocast(case):
        trace = Rehearsal(model, (), faked=True).plain_trace((), batch)
    if trace is None:
        raise ValueError("no graph that trains was captured")
    return _expected(_plain(model, batch, trace.peak(()).peak_bytes), trace.work, case.device)


def _plain(model: nn.Module, batch: dict[str, Tensor], step_bytes: int) -> Prediction:
    """``step_bytes`` with what every rival holds that is not ours: AdamW's state and step, on all that trains."""
    from slimfit_fx.planning.update import step_memory

    trained = [p for p in model.parameters() if p.requires_grad]
    update = step_memory([AdamW(trained)], trained)
    assert update is not None, "AdamW steps without values"
    return Prediction(
        parameter_bytes(model), tensor_bytes(model.buffers()), update.state_bytes, tensor_bytes(batch.values()),
        step_bytes, tensor_bytes(trained) + update.temporary_bytes,
    )  # fmt: skip


def _ours(rival: Rival, model: nn.Module, batch: dict[str, Tensor], case: Case, settings: Settings) -> Prediction:
    from slimfit_fx.api import checked_settings
    from slimfit_fx.beside_steps import make_fixed_bytes, open_count
    from slimfit_fx.rehearsal import Rehearsal, known_step

    config = config_of(rival, settings)
    _, (units, _), _ = checked_settings(model, config, {}, plan_only=True)
    rehearsal = Rehearsal(model, units, faked=True)
    scheduler = rehearsal.scheduler(config)
    budget = None if rival.memory_budget is None else rehearsal.budget(config)
    with autocast(case):
        graphs = rehearsal.graphs(config, (), batch, peak=True, budget=budget)
    trace = known_step(graphs)
    opened = min(open_count(config, scheduler, units), trace.num_gates)
    fixed = make_fixed_bytes(model, config, units, scheduler, list)()
    found = Prediction(
        fixed.parameters, fixed.buffers, fixed.optimizer_state, tensor_bytes(batch.values()),
        trace.worst(opened, fixed.most_open_bytes)[0],
        fixed.update, chosen=next((graph.chosen.label for graph in graphs if graph.chosen is not None), None),
    )  # fmt: skip
    return _expected(found, trace.work, case.device, opened / max(1, len(units)))
