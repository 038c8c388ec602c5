"""Memory of an optimizer's step: the optimizer itself steps, on parameters of the meta device.

::

    AdamW(foreach=True), 3 parameters of 4 MB with gradients  ->  state 24 MB, temporaries 12 MB

Nothing is computed: a dispatch mode adds up the tensors that the optimizer's own code makes and lets go of. So whatever
``torch.optim`` does counts (one parameter at a time, ``foreach``, ``fused``), and optimizers of others that are made of
torch's operators. Matrix products (Muon has some) need room for themselves besides, as in a step (workspaces.py), and
so does a CPU's pointwise work on floating-point tensors of two dtypes: it brings them to one first.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from slimfit_fx.planning.blocks import TensorSpec
from slimfit_fx.planning.workspaces import call_memory, workspace_bytes
from slimfit_fx.runtime.moments import Part
from slimfit_fx.schedule import Sample, distance_parts_of_all

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_SCALARS = 64
"""Bytes: numbers that torch wraps into tensors for the length of a call."""
log = logging.getLogger("slimfit_fx.planning")


@dataclass(frozen=True)
class UpdateMemory:
    """What an optimizer's step takes beside parameters and gradients."""

    state_bytes: int
    """Held from the first step on, for all parameters that it may train."""
    temporary_bytes: int
    """The most that it holds for itself while it steps, in a step in which the wanted parameters have gradients."""


def update_memory(
    optimizer: Optimizer, wanted: Collection[int], parts: list[Part] | None = None
) -> UpdateMemory | None:
    """The memory of a step of ``optimizer`` in which the parameters with these ids have gradients.

    ``parts``: what it steps with instead of its groups. None if that cannot be told: its ``step`` wants a closure, or
    does what no tensor without values can. The optimizer, its parameters and its state are left as they are.
    """
    groups = optimizer.param_groups if parts is None else [part.shown for part in parts]
    for begun in (False, True):
        try:
            with _disable_current_modes(), torch.random.fork_rng(devices=[]):
                return _simulated(optimizer, wanted, groups, begun)
        except Exception:  # an optimizer may hold any code
            log.debug("the memory of %s could not be followed", type(optimizer).__name__, exc_info=True)
    return None


def step_memory(
    optimizers: Sequence[Optimizer],
    wanted: Sequence[Tensor],
    compared: Sequence[Tensor] = (),
    metric: Any = "relative_mean",
    most: int | None = None,
    parts_of: Callable[[Optimizer], list[Part] | None] = lambda _: None,
) -> UpdateMemory | None:
    """The memory of a step of several optimizers, one after the other, and of measuring how far ``compared`` moved.

    ``wanted`` have gradients. ``compared`` are copied before (their copies are not counted here) and measured by
    ``metric`` behind the step, on at most ``most`` elements each. ``parts_of``: what an optimizer steps with, not
    its own. None if an optimizer's memory cannot be told.
    """
    ids = frozenset(map(id, wanted))
    found = [update_memory(optimizer, ids, parts_of(optimizer)) for optimizer in optimizers]
    known = [memory for memory in found if memory is not None]
    if len(known) < len(found):
        return None
    measuring = [_measuring_bytes(compared, metric, most)] if compared else []
    temporary = max([*(m.temporary_bytes for m in known), *measuring], default=0)
    return UpdateMemory(sum(m.state_bytes for m in known), temporary)


def _measuring_bytes(params: Sequence[Tensor], metric: Any, most: int | None) -> int:
    """The most bytes that measuring how far ``params`` moved takes, beside the copies of what was there before."""
    empty = [_without_values(p).detach() for p in params]
    afters = [Sample.of(e.numel(), most).take(e) for e in empty]
    befores, device = [x.clone() for x in afters], params[0].device
    return count_bytes(lambda: distance_parts_of_all(befores, afters, metric=metric, device=device))


def count_bytes(function: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most bytes in tensors that ``function`` makes, on meta tensors, at any moment. Its result is among them.

    ``device``: where it would run; what matrix products and casts take for themselves there is counted, too.
    """
    with _Counter(device) as counter:
        result = function()
    del result
    return counter.most


def _simulated(optimizer: Optimizer, wanted: Collection[int], groups: list[Any], begun: bool) -> UpdateMemory:
    replica, params = _replica(optimizer, groups, begun)
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)  # without the hooks of all optimizers
    for param in params.values():
        param.grad = torch.empty_like(param)
    with _NumbersAtHand():
        step(replica)
    state = sum(t.untyped_storage().nbytes() for t in _tensors(replica.state))
    in_place = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for key, param in params.items():
        if key not in wanted or key in in_place:
            param.grad = None
    return UpdateMemory(state, count_bytes(lambda: step(replica), device) + _SCALARS)


def _replica(optimizer: Optimizer, in_groups: list[Any], begun: bool) -> tuple[Optimizer, dict[int, Tensor]]:
    """The same optimizer, for parameters that have no values; and those, by the ids of the real ones.

    It has no state, as before the first step; ``begun``: the state of the real one, for those that have state as soon
    as they are made (Adagrad, before torch 2.12).
    """
    params: dict[int, Tensor] = {}
    groups = []
    for group in in_groups:
        mine = [p for p in group["params"] if p.requires_grad]
        params |= {id(p): _without_values(p) for p in mine}
        groups.append({**group, **_way(optimizer, group, mine), "params": [params[id(p)] for p in mine]})
    replica = object.__new__(type(optimizer))
    replica.__dict__.update(optimizer.__dict__)
    hooks: dict[str, Any] = {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    replica.__dict__.update(hooks)
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for param, held in optimizer.state.items() if begun else ():
        if id(param) in params:
            state[params[id(param)]] = tree_map(_copy_without_values, dict(held))
    replica.__dict__.update(param_groups=groups, state=state)
    return replica, params


def _copy_without_values(leaf: Any) -> Any:
    """Counters, which are numbers in tensors of the CPU, keep their values."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.dim() == 0 and leaf.device.type == "cpu" else _without_values(leaf).detach()


def _without_values(param: Tensor) -> Tensor:
    empty = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
    return torch.nn.Parameter(empty)


def _way(optimizer: Optimizer, group: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """``foreach`` as torch chooses it for the real parameters' device, if the user leaves it open.

    What is fused has no temporaries; its state is that of the plain loop, which takes any device.
    """
    if group.get("fused"):
        return {"fused": False, "foreach": False}
    if "foreach" not in group or group["foreach"] is not None:
        return {}
    on_gpu = bool(params) and all(p.device.type == "cuda" for p in params)
    return {"foreach": on_gpu and not group.get("differentiable", False)}


def _tensors(state: Mapping[Any, Any]) -> list[Tensor]:
    return [x for x in tree_flatten(list(state.values()))[0] if isinstance(x, Tensor)]


class _NumbersAtHand(TorchDispatchMode):
    """Gives a number where a tensor without values is asked for one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Counter(_NumbersAtHand):
    """Adds up the storages of tensors that are made while it is on, as long as somebody holds them."""

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        self.most = 0
        self._made = 0
        """Bytes in ``_alive``, where some may be gone by now."""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._device = torch.device("cpu") if device is not None and device.type == "meta" else device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for made in tree_flatten(result)[0]:
            if isinstance(made, Tensor) and (storage := made.untyped_storage())._cdata not in known:
                self._made += storage.nbytes() - self._alive.get(storage._cdata, (None, 0))[1]
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        inside = 0 if self._device is None else _inside_bytes(func, args, kwargs or {}, self._device)
        if self._made + inside > self.most:
            self._let_go()
            self.most = max(self.most, self._made + inside)
        return result

    def _let_go(self) -> None:
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:
            self._made -= self._alive.pop(key)[1]


def _inside_bytes(func: Any, args: Any, kwargs: Any, device: torch.device) -> int:
    """What a call on meta tensors would take for itself on ``device``."""
    if func._schema.name in _PRODUCTS:
        return _product_bytes(func, args, kwargs, device)
    return _cast_bytes(func, args) if device.type == "cpu" and torch.Tag.pointwise in func.tags else 0


def _cast_bytes(func: Any, args: Any) -> int:
    """Copies in the common dtype that pointwise work makes on a CPU; of what it writes to, one more to write."""
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor) and x.dim() and x.is_floating_point()]
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors)) if tensors else None
    written = [a for a, is_written in zip(args, _writes(func), strict=False) if is_written and isinstance(a, Tensor)]
    return sum(x.numel() * common.itemsize for x in [*tensors, *written] if common is not None and x.dtype != common)


def _writes(func: Any) -> list[bool]:
    return [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]


def _product_bytes(func: Any, args: Any, kwargs: Any, device: torch.device) -> int:
    """What a matrix product of meta tensors would take for itself on ``device``."""
    name = func._schema.name

    def spec(leaf: Any) -> Any:
        return dataclasses.replace(TensorSpec.of(leaf), device=device) if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(spec, (args, kwargs))
    with _disable_current_modes():
        found = call_memory(name, func, args, kwargs)
        return workspace_bytes(name, func, args, kwargs) if found is None else found.workspace_bytes
