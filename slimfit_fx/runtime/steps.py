"""Gates and scheduler through time: what happens around each optimizer step.

One optimizer step: the pre-hook drops what gradients closed units may have and remembers weights of the open ones (of
large tensors a sample); the post-hook measures how far they moved. The next training forward asks the scheduler and
flips the gates: never between two forwards of one accumulated step.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimfit_fx._suggest import did_you_mean
from slimfit_fx.config import Config
from slimfit_fx.runtime.bindings import Bindings, is_sharded
from slimfit_fx.runtime.distances import DistanceQueue
from slimfit_fx.runtime.gates import GateTable
from slimfit_fx.runtime.moments import Part, pace_of, paced_groups
from slimfit_fx.runtime.peers import CHECK_EVERY, Peers, sum_over_shards
from slimfit_fx.runtime.sampled import sampled_part
from slimfit_fx.schedule import Scheduler, UnitInfo, combine_parts, distance_parts_of_all, make_scheduler
from slimfit_fx.units import GateUnit

_STATE_VERSION = 2
"""Of what ``state_dict`` returns. In 1 the distances of ILS were not per learning rate."""


class StepTracker:
    """Gates and scheduler through time; knows nothing of compiling."""

    def __init__(self, model: nn.Module, config: Config, units: Sequence[GateUnit]) -> None:
        by_name = dict(model.named_parameters(remove_duplicate=False))
        self.config = config
        self.gates = GateTable({u.name: [by_name[u.name]] for u in units})
        self.scheduler: Scheduler = make_scheduler(config.scheduler)
        self.scheduler.start(
            [UnitInfo(u.name, u.numel, u.bytes) for u in units], freeze_rate=config.freeze_rate, seed=config.seed
        )
        self.steps = 0
        self._pinned: frozenset[str] = frozenset()
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._queue = DistanceQueue()
        self._stepped = False
        self._manual = False
        self._dirty = True
        self._unchecked = True
        self._warned = False
        self.anew_is_known = False
        """Whether the user was told already that the schedule of a resumed run starts again."""
        self.forwarded = False
        """Whether there was a training forward since the start, or since a state was loaded."""
        self.peers: Peers | None = None
        """The other ranks, once they are known."""
        self._bindings = Bindings(model, units, self.gates)

    # -- called by the engine ------------------------------------------------------------------------------------------
    def before_forward(self) -> None:
        """Flip the gates if an optimizer step was done (or a pin was set) since the last forward."""
        self.forwarded = True
        distances: dict[str, float] = {}
        if self._stepped:
            distances = self._queue.take()
            self.scheduler.observe(distances)
            self._stepped, self._dirty = False, True
        if self._dirty:
            self.gates.set_open(self.scheduler.select() - self._pinned, self.steps)
            self._dirty = False
            self._compare(distances)
            if self._manual:
                self._before = {}
                self._remember(self.gates.open)

    def _compare(self, distances: dict[str, float]) -> None:
        """Hold this decision against that of the other ranks, now and then."""
        if self.peers is not None and (self._unchecked or self.steps % CHECK_EVERY == 0):
            self._unchecked = False
            self.peers.check(self.steps, self.gates.names, self.gates.open, distances)

    def refresh(self) -> bool:
        """Take up parameters that were replaced since the last forward; True if there are any."""
        if not self._bindings.refresh():
            return False
        self._before = {}
        return True

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._bindings.close()

    @property
    def freezes(self) -> bool:
        """Whether some units are ever closed."""
        return self.config.freeze_rate > 0 or bool(self._pinned)

    def step_without_forward(self) -> None:
        """Say that the model is trained past us; nothing is frozen then."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            "slimfit_fx: an optimizer moves parameters, but the model itself was never called in training: it trains "
            "uncompressed, with nothing frozen. A function around it was compiled, or parts of it are called "
            "directly: compile nothing around the model, and optimize the part that is called",
            RuntimeWarning,
            stacklevel=2,
        )

    def meet(self, *, has_state: bool) -> None:
        """Warn if the optimizer goes on with an earlier run and the schedule does not."""
        if has_state and self.steps == 0 and self.freezes and not self.anew_is_known:
            warnings.warn(
                "slimfit_fx: the optimizer goes on with the state of an earlier run, but the schedule starts again: to "
                "resume a run, save slimfit_fx.session(model).state_dict() with each checkpoint and load it "
                "(slimfit_fx.integrations has callbacks that do it)",
                RuntimeWarning,
                stacklevel=2,
            )

    def begin_step(self) -> None:
        """When an optimizer's step begins: forget the weights of one that was not finished."""
        if not self._manual:
            self._before = {}

    def parts_of(self, optimizer: Optimizer) -> list[Part] | None:
        """The parts of its groups that ``optimizer`` steps with; None: the groups themselves."""
        units = {id(p) for name in self.gates.names for p in self.gates.params_of(name)}
        return paced_groups(optimizer, units, pace_of(self.scheduler, self.config))

    def before_step(self, params: frozenset[int]) -> None:
        """Before an optimizer reads gradients: closed units have none, whatever happened to them on the way."""
        for name in self.gates.closed:
            for param in self.gates.params_of(name):
                param.grad = None
        if self.scheduler.needs_distances and not self._manual:
            self._remember(n for n in self.gates.open if any(id(p) in params for p in self.gates.params_of(n)))

    def after_step(self, learning_rate: float = 1.0) -> None:
        """After an optimizer step: measure how far the open units moved, per learning rate if the scheduler asks so.

        Several optimizers may step; it counts as one step.
        """
        if not self._stepped:
            self.steps += 1
        self._stepped = True
        if self._before:
            names, distances = self._distances()
            if self.scheduler.per_learning_rate and learning_rate > 0:
                distances = distances / learning_rate
            self._queue.put(names, distances, None if self.peers is None else self.peers.agree)
        self._before = {}

    def _remember(self, names: Iterable[str]) -> None:
        wanted = set(names) - self._before.keys()
        for name in self.gates.names:  # in model order: ranks exchange distances by position
            if name in wanted:
                self._before[name] = tuple(self._sampled(p).clone() for p in self.gates.params_of(name))

    def _sampled(self, param: nn.Parameter) -> Tensor:
        return sampled_part(param, self.config.distance_sample)

    def _distances(self) -> tuple[tuple[str, ...], Tensor]:
        """The units that were remembered, and how far each has moved since: its parameters' mean; float32."""
        metric: Any = self.config.distance
        known = [
            pair
            for name, before in self._before.items()
            for pair in zip(before, self.gates.params_of(name), strict=True)
        ]
        befores, afters = [b for b, _ in known], [self._sampled(p) for _, p in known]
        parts = [
            sum_over_shards(part, p) if is_sharded(p) else part
            for part, (_, p) in zip(distance_parts_of_all(befores, afters, metric=metric), known, strict=True)
        ]
        device = parts[0].device
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        distances = combine_parts(torch.stack([part.to(device, dtype) for part in parts]), metric=metric)
        if len(known) == len(self._before):
            return tuple(self._before), distances
        sizes = [len(bs) for bs in self._before.values()]
        return tuple(self._before), torch.stack([piece.mean() for piece in distances.split(sizes)])

    # -- called by the user --------------------------------------------------------------------------------------------
    def step(self) -> None:
        """Say that an optimizer step was done; for optimizers that do not subclass ``torch.optim.Optimizer``.

        Call it right after the update. From the first call on, weights of open units are remembered when the gates
        flip. Gradients of closed units are dropped here too late for that update: they are None already, unless
        something filled them in.
        """
        self._manual = True
        self.after_step()

    def freeze(self, names: str | Iterable[str]) -> None:
        """Pin units closed until ``unfreeze``, from the next forward on. Takes unit names and fnmatch patterns.

        Raises:
            ValueError: a name or pattern that matches no unit.
        """
        self._pin(self._pinned | self._matching(names))

    def unfreeze(self, names: str | Iterable[str] = "*") -> None:
        """Release units from ``freeze``; the scheduler decides on them again. Names and patterns as for ``freeze``."""
        self._pin(self._pinned - self._matching(names))

    def _pin(self, pinned: frozenset[str]) -> None:
        self._pinned, self._dirty = pinned, True
        self.scheduler.pin(pinned)

    def _matching(self, names: str | Iterable[str]) -> frozenset[str]:
        patterns = [names] if isinstance(names, str) else list(names)
        found: set[str] = set()
        unknown: list[str] = []
        for pattern in patterns:
            hits = [n for n in self.gates.names if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            found.update(hits)
            if not hits:
                unknown.append(f"{pattern!r} matches no unit{did_you_mean(pattern, self.gates.names)}")
        if unknown:
            raise ValueError("; ".join(unknown))
        return frozenset(found)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to take the same decisions: plain Python values that survive JSON."""
        return {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "stepped": self._stepped,
            "dirty": self._dirty,
            "open": sorted(self.gates.open),
            "pinned": sorted(self._pinned),
            "pending": self._queue.state(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()`` of a session of the same model and settings.

        Raises:
            ValueError: the state is of another version, scheduler or set of units.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"state must have version {_STATE_VERSION}, got {state.get('version')!r}: "
                "save it again with this version of slimfit_fx"
            )
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps, self._stepped, self._dirty = int(state["steps"]), bool(state["stepped"]), bool(state["dirty"])
        self._pinned = frozenset(state["pinned"])
        self.scheduler.pin(self._pinned)
        self._queue.load(state["pending"])
        self._before = {}
        self.forwarded = False
        self.gates.set_open(state["open"], self.steps)
