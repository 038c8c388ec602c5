"""Notice optimizer steps: global hooks on torch.optim, filtered to optimizers that hold the model's parameters.

Covers every subclass of ``torch.optim.Optimizer``, present and future, several at a time, and GradScaler: a step that
it skips calls no hook, or is one in which a fused kernel found infinite gradients and moved nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimfit_fx.runtime.moments import Part, Regrouped


class StepListener(Protocol):
    """Who is told of optimizer steps."""

    @property
    def freezes(self) -> bool:
        """Whether some units are ever closed."""

    @property
    def forwarded(self) -> bool:
        """Whether there was a training forward since the start, or since a state was loaded."""

    def step_without_forward(self) -> None:
        """Called instead of everything else when an optimizer moves parameters and there was no training forward."""

    def meet(self, *, has_state: bool) -> None:
        """Called before the first step of an optimizer; ``has_state``: it has made steps before, or was loaded."""

    def begin_step(self) -> None:
        """Called when an optimizer's step begins."""

    def parts_of(self, optimizer: Optimizer) -> list[Part] | None:
        """The parts of its groups that ``optimizer`` shall step with; None: the groups themselves."""

    def before_step(self, params: frozenset[int]) -> None:
        """Called before an optimizer reads the gradients of the parameters with these ids.

        More than once in a step whose closure is called more than once.
        """

    def after_step(self, learning_rate: float) -> None:
        """Called after its step, with the largest learning rate of all optimizers that were seen, as far as known.

        Of all, so that what one of them moves can be compared with what another does.
        """


class OptimizerHooks:
    """Calls ``listener`` around each step of an optimizer that holds one of the parameters with ids ``param_ids``.

    The hooks of a listener that is gone do nothing until the next listener comes and removes them: torch may be walking
    through its list of hooks at the very moment when the garbage collector runs.
    """

    _registered: ClassVar[list[OptimizerHooks]] = []
    _regrouped: ClassVar[Regrouped] = Regrouped()

    def __init__(self, listener: StepListener, param_ids: frozenset[int]) -> None:
        for hooks in [h for h in self._registered if h._listener() is None]:
            hooks.remove()
        self._registered.append(self)
        self._listener: weakref.ref[StepListener] = weakref.ref(listener)
        self._param_ids = param_ids
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def _held(self, optimizer: Optimizer) -> frozenset[int]:
        return frozenset(map(id, _params(optimizer))) & self._param_ids

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._regrouped.mend(self, optimizer)
        listener, held = self._listener(), self._held(optimizer)
        if listener is None or not held:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure) and not listener.forwarded:
            if _moves(optimizer):  # else it only makes its state: torch.distributed.checkpoint does that
                listener.step_without_forward()
            return None
        self._begin(optimizer, listener)
        if not callable(closure):
            listener.before_step(held)
            return None
        told = self._told(closure, held)  # forward and backward are in it: gradients are there when it returns
        return ((args[0], told, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": told})

    def _begin(self, optimizer: Optimizer, listener: StepListener) -> None:
        if isinstance(optimizer, LBFGS) and listener.freezes:
            raise ValueError(
                "LBFGS moves every parameter along directions of earlier steps, also one without a gradient, so that "
                "closed units would move: use another optimizer, or freeze_rate=0 for the codecs alone"
            )
        if optimizer not in self.optimizers:
            self.optimizers.add(optimizer)
            listener.meet(has_state=any(optimizer.state.get(param) for param in _params(optimizer)))
            self._handles.append(optimizer.register_state_dict_pre_hook(self._regrouped.leave))  # a step that raised
        listener.begin_step()
        parts = listener.parts_of(optimizer)
        if parts is not None:
            self._regrouped.enter(self, optimizer, parts)

    def _told(self, closure: Callable[[], Any], held: frozenset[int]) -> Callable[[], Any]:
        def call() -> Any:
            result = closure()
            listener = self._listener()
            if listener is not None:
                listener.before_step(held)
            return result

        return call

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._regrouped.leave(optimizer)
        listener = self._listener()
        if listener is not None and listener.forwarded and self._held(optimizer) and not _moved_nothing(optimizer):
            listener.after_step(max(map(_learning_rate, {optimizer, *self.optimizers})))

    def watch(self, param_ids: frozenset[int]) -> None:
        """Listen to optimizers of these parameters from now on: the model's were replaced."""
        self._param_ids = param_ids

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self in self._registered:
            self._registered.remove(self)

    def seen(self) -> list[Optimizer]:
        """The optimizers that were seen with parameters of the model."""
        return list(self.optimizers)

    def state_bytes(self) -> int | None:
        """Bytes of optimizer state that the seen optimizers hold; None before the first step."""
        if not self.optimizers:
            return None
        tensors = [
            v
            for o in self.optimizers
            for state in o.state.values()
            for v in state.values()
            if hasattr(v, "untyped_storage")
        ]
        return sum(map(_held_bytes, tensors))


def _held_bytes(tensor: Any) -> int:
    """Bytes of its memory; a quantized state is a tensor of several parts, smaller than it seems.

    A shard counts as the whole that it is of, as parameters do.
    """
    if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "to_local"):
        return sum(_held_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.element_size()
    return size


def _params(optimizer: Optimizer) -> Iterator[Any]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _moved_nothing(optimizer: Optimizer) -> bool:
    """Whether a GradScaler let a fused optimizer step although gradients are infinite.

    Waits for the device, as GradScaler itself does for every optimizer that is not fused.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _learning_rate(optimizer: Optimizer) -> float:
    """The largest of its groups; 1 if one has none, or has it on a device that would be waited for."""
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    if any(rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") for rate in rates):
        return 1.0
    return max(map(float, rates))


def _moves(optimizer: Optimizer) -> bool:
    """Whether a step of it would change anything."""
    rated = any(group.get("lr", 1.0) != 0 for group in optimizer.param_groups)
    return rated and any(param.grad is not None for param in _params(optimizer))
