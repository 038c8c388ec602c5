"""Which parameters get a gate.

By default, as in the SlimFit paper: every parameter with more than one dimension and every LayerNorm or RMSNorm weight
is a unit. What always trains, and why:

- biases and other one-dimensional parameters: their gradient needs no activation, so freezing them saves nothing;
- the task head: it starts untrained. In a Hugging Face model that is every parameter outside ``model.base_model``
  (classifier, score, qa_outputs, an untied lm_head); a head tied into the base is not one. In any other model it is the
  last ``nn.Linear`` in module order that is called head, heads, classifier, fc, output, score, lm_head or proj_out (a
  part of its dotted name is exactly that, outside numbered blocks: ``classifier.3`` is a head,
  ``layers.11.output.dense`` is not) and shares no weight with another module;
- embeddings with ``sparse=True``: a sparse gradient has no place in a compiled graph.

A predicate or name patterns replace that rule altogether: what they choose is freezable, the rest always trains.
Parameters with ``requires_grad=False`` never train and appear nowhere. Tied parameters are one unit, named by the first
of their names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from slimfit_fx._suggest import nearest
from slimfit_fx.schedule import UnitInfo

UnitChoice = Callable[[str, nn.Parameter], bool] | str | Sequence[str]
"""What ``units=`` takes: a predicate, an fnmatch pattern or a sequence of those."""

_HEAD_NAMES = frozenset({"head", "heads", "classifier", "fc", "output", "score", "lm_head", "proj_out"})
_NORM_CLASS = re.compile(r"Norm(?![a-z])")
_NORM_WEIGHTS = frozenset({"weight", "scale", "gamma"})


@dataclass(frozen=True)
class GateUnit:
    """One freezable parameter."""

    name: str
    """Its first name in ``model.named_parameters()``."""
    params: tuple[str, ...]
    """All its names; more than one if it is tied."""
    numel: int
    """Elements."""
    bytes: int
    """Bytes of the parameter, and of its gradient while the unit is open."""

    @property
    def info(self) -> UnitInfo:
        """The unit as a scheduler sees it."""
        return UnitInfo(self.name, self.numel, self.bytes)


class FoundUnits(NamedTuple):
    """The two parts that the trainable parameters of a model fall into."""

    units: tuple[GateUnit, ...]
    """The freezable ones, in model order."""
    always: tuple[tuple[str, str], ...]
    """(name, reason) of those that train in every step, in model order."""


@dataclass(frozen=True)
class _Owned:
    """A trainable parameter, all its names and the modules that hold it under them."""

    param: nn.Parameter
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]


def find_units(model: nn.Module, units: UnitChoice | None = None) -> FoundUnits:
    """Sort the trainable parameters of ``model`` into freezable ones and those that always train.

    Reads the model only. Works on the meta device and under fake tensors.

    Args:
        model: any module.
        units: None for the default rule (see the module's text), a predicate ``(name, parameter) -> bool``, or fnmatch
            patterns for names (``"*.attention.*"``).

    Returns:
        ``(units, always)``.

    Raises:
        TypeError: ``units`` is none of these, or the predicate returned something else than a bool.
        ValueError: everything else that is wrong, in one message: no parameters, none trainable, lazy parameters that
            have no shape yet, patterns that match nothing, nothing freezable.
    """
    patterns = _as_patterns(units)
    owned = _trainable(model)
    reasons = _reasons_by_choice(owned, units, patterns) if units is not None else _reasons_by_rule(model, owned)
    found = tuple(_unit(o) for o in owned if o.names[0] not in reasons)
    if not found:
        raise ValueError(_nothing_freezable(owned, units, reasons))
    return FoundUnits(found, tuple(reasons.items()))


def _as_patterns(units: UnitChoice | None) -> tuple[str, ...]:
    """Return the patterns of ``units``; none for None and for a predicate."""
    if isinstance(units, str):
        return (units,)
    if units is None or callable(units):
        return ()
    if not isinstance(units, Sequence) or not all(isinstance(pattern, str) for pattern in units):
        raise TypeError(f"units must be None, a predicate (name, parameter) -> bool or name patterns, got {units!r}")
    if not units:
        raise ValueError(f"units must name at least one parameter, got {units!r}: use None for the default rule")
    return tuple(units)


def _trainable(model: nn.Module) -> list[_Owned]:
    """Return the parameters that require a gradient, each once, in model order."""
    names: dict[nn.Parameter, list[str]] = {}
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False):
            names.setdefault(param, []).append(f"{prefix}.{name}" if prefix else name)
            owners.setdefault(param, []).append(module)
    if not names:
        raise ValueError(f"model must have parameters, {type(model).__name__} has none")
    lazy = [names[param][0] for param in names if isinstance(param, UninitializedParameter)]
    if lazy:
        raise ValueError(f"parameters have no shape yet: {lazy}: run one forward before optimizing the model")
    owned = [_Owned(p, tuple(names[p]), tuple(owners[p])) for p in names if p.requires_grad]
    if not owned:
        raise ValueError(f"model must have trainable parameters: all {len(names)} have requires_grad=False")
    return owned


def _unit(owned: _Owned) -> GateUnit:
    param = owned.param
    return GateUnit(owned.names[0], owned.names, param.numel(), param.numel() * param.element_size())


def _reasons_by_rule(model: nn.Module, owned: Iterable[_Owned]) -> dict[str, str]:
    """Return, by name, why a parameter always trains under the default rule."""
    head = _head_parameters(model)
    reasons = {}
    for one in owned:
        if one.param in head:
            reasons[one.names[0]] = "task head"
        elif one.param.dim() < 2 and not _is_norm_weight(one):
            reasons[one.names[0]] = "one-dimensional: its gradient needs no activation"
        elif any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.sparse for owner in one.owners):
            reasons[one.names[0]] = "its embedding has sparse gradients"
    return reasons


def _is_norm_weight(owned: _Owned) -> bool:
    """Whether this is the weight of a LayerNorm, RMSNorm or other ``*Norm`` that keeps no running statistics."""
    norms = (
        name.rpartition(".")[2] in _NORM_WEIGHTS
        and (isinstance(module, nn.LayerNorm | nn.RMSNorm) or _NORM_CLASS.search(type(module).__name__) is not None)
        and getattr(module, "running_mean", None) is None
        for name, module in zip(owned.names, owned.owners, strict=True)
    )
    return owned.param.dim() == 1 and any(norms)


def _head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the task head: empty if there is none."""
    unwrap = getattr(model, "get_base_model", None)  # peft: the model that the adapters were put into
    if callable(unwrap):
        model = unwrap()
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module):
        inner = set(base.parameters())
        return set() if base is model else {param for param in model.parameters() if param not in inner}
    return _plain_head(model)


def _plain_head(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the last Linear that is named like a head."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = next((module for name, module in reversed(linears) if _named_like_a_head(name)), None)
    if head is None:
        return set()
    elsewhere = {p for m in model.modules() if m is not head for p in m.parameters(recurse=False)}
    return {param for param in head.parameters() if param not in elsewhere}


def _named_like_a_head(name: str) -> bool:
    """Whether a part of the dotted name, before any block number, is one of the head names."""
    for part in name.split("."):
        if part.isdigit():
            return False
        if part.lower() in _HEAD_NAMES:
            return True
    return False


def _reasons_by_choice(owned: list[_Owned], units: UnitChoice | None, patterns: tuple[str, ...]) -> dict[str, str]:
    """Return, by name, why a parameter always trains: the user's predicate or patterns leave it out."""
    if patterns:
        _check_patterns(owned, patterns)
        chosen = {o.names[0] for o in owned if any(fnmatch.fnmatchcase(n, p) for n in o.names for p in patterns)}
        return {o.names[0]: "matches no pattern in units" for o in owned if o.names[0] not in chosen}
    assert callable(units)
    return {o.names[0]: "left out by the units predicate" for o in owned if not _ask(units, o)}


def _ask(predicate: Callable[[str, nn.Parameter], bool], owned: _Owned) -> bool:
    answer = predicate(owned.names[0], owned.param)
    if not isinstance(answer, bool):
        raise TypeError(f"units must return True or False, got {answer!r} for {owned.names[0]!r}")
    return answer


def _check_patterns(owned: list[_Owned], patterns: tuple[str, ...]) -> None:
    """Raise one error for all patterns that match no trainable parameter."""
    names = [name for one in owned for name in one.names]
    problems = []
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = nearest(pattern, names) or tuple(names[:3])
            problems.append(f"units pattern {pattern!r} matches no trainable parameter; near it: {list(near)}")
    if problems:
        raise ValueError("\n".join(problems))


def _nothing_freezable(owned: list[_Owned], units: UnitChoice | None, reasons: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    detail = "; ".join(f"{len(names)} ({names[0]}...): {reason}" for reason, names in by_reason.items())
    fix = "make units return True for some" if units is not None else "choose some with units="
    return f"nothing is freezable among {len(owned)} trainable parameters: {detail}. {fix}"
