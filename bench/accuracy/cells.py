"""What is trained: methods, cells, and which cells a run consists of. Data only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimfit_fx.presets import SCHEDULER, SCHEDULER_OF

PRESETS = ("exact", "paper", "balanced", "max")
RATES = (0.80, 0.90, 0.95)
SCHEDULERS = ("ils", "ils_paper", "random", "round_robin")

GRIDS: dict[str, tuple[float, ...]] = {
    "full": (1.0, 2.0, 4.0),
    "slimfit": (1.0, 2.0, 4.0),
    "unpaced": (2.0, 4.0, 8.0),
    "lora": (4.0, 8.0, 16.0),
    "head": (10.0, 40.0, 160.0),
}
"""Learning rates that are tried, as multiples of the task's own: as many for each kind of method. An adapter of few
weights, a head alone, and units that train in few steps and do not make up for it want larger ones than full
fine-tuning."""

TRIED_RATES = {"full": 3, "quick": 2}
"""By scale: how many of them are tried, the smallest first."""
TUNING_SEEDS = {"full": 3, "quick": 1}
"""By scale: with how many of the seeds every learning rate is tried; their mean validation score chooses. One seed's
scores lie apart by more than the rates do: a few hundred examples tell half a point at best."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. The four settings at the end are those of ``slimfit``."""

    kind: str
    """``full``, ``head`` (frozen backbone, trained head), ``lora`` or ``slimfit``."""
    preset: str = ""
    freeze_rate: float = 0.0
    scheduler: str = ""
    paced: bool = True
    """Whether units make up for the steps in which they were frozen (but ``paper``, which never does)."""

    @property
    def name(self) -> str:
        """Its name on the command line, in tables and in the result file."""
        if self.kind != "slimfit":
            return self.kind
        return f"{self.preset}-{self.freeze_rate:.2f}-{self.scheduler}{'' if self.paced else '-unpaced'}"

    @property
    def grid(self) -> tuple[float, ...]:
        """Its learning rates, as multiples of the task's own."""
        return GRIDS["unpaced" if self.preset == "paper" or not self.paced else self.kind]


FULL, HEAD, LORA = Method("full"), Method("head"), Method("lora")


def slimfit(preset: str, freeze_rate: float, scheduler: str | None = None) -> Method:
    """slimfit_fx under these settings; the scheduler is the preset's own unless told otherwise."""
    return Method("slimfit", preset, freeze_rate, scheduler or SCHEDULER_OF.get(preset, SCHEDULER))


METHODS: tuple[Method, ...] = (
    FULL,
    *(slimfit(preset, rate) for rate in (0.90, 0.95, 0.80) for preset in ("balanced", "max", "exact", "paper")),
    *(slimfit("balanced", rate, scheduler) for rate in (0.95, 0.90, 0.80) for scheduler in SCHEDULERS[1:]),
    Method("slimfit", "balanced", 0.90, "ils", paced=False),
    HEAD,
    LORA,
)
"""Everything that a full run compares. Those that decide come first, so that a run that was stopped says something."""

QUICK_METHODS: tuple[Method, ...] = (
    FULL,
    slimfit("balanced", 0.90),
    slimfit("max", 0.90),
    slimfit("balanced", 0.95),
    slimfit("balanced", 0.95, "random"),
    LORA,
    HEAD,
)
"""Those that decide, and the two rivals: what two cores train in an hour and a half."""


@dataclass(frozen=True)
class Cell:
    """One training: a point of the grid."""

    task: str
    scale: str
    """``full`` or ``quick``: how much the task trains on."""
    method: str
    seed: int
    learning_rate: float

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain Python."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One finished cell. Scores are the task's metric; a share (accuracy) lies in [0, 1]."""

    cell: Cell
    validation: float
    """What the learning rate is chosen by."""
    test: float
    """What is reported; nothing is chosen by it."""
    loss: float
    """Mean training loss of the last tenth of the steps."""
    steps: int
    seconds: float
    frozen_share: float
    """Mean share of the units frozen in a step; 0 but for slimfit_fx."""
    recompiles: int
    fingerprint: str
    """Of the task's recipe and data: a row with another one is of another experiment."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain Python."""
        return asdict(self)

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Row:
        """The row that ``to_dict`` made this of."""
        return Row(**{**found, "cell": Cell(**found["cell"])})


def learning_rates(method: Method, task_rate: float, scale: str = "full") -> tuple[float, ...]:
    """The learning rates that ``method`` tries on a task whose own is ``task_rate``."""
    return tuple(float(f"{factor * task_rate:.6g}") for factor in method.grid[: TRIED_RATES[scale]])


def cells_of(task: str, scale: str, method: Method, rates: Iterable[float], seed: int) -> tuple[Cell, ...]:
    """One cell for each learning rate."""
    return tuple(Cell(task, scale, method.name, seed, rate) for rate in rates)


def named_methods(names: Sequence[str], known: Sequence[Method]) -> tuple[Method, ...]:
    """The methods of ``known`` with these names, in the order of ``known``; all of them for no names.

    Raises:
        ValueError: a name that no method bears; it lists the legal ones.
    """
    legal = {method.name: method for method in known}
    unknown = [name for name in names if name not in legal]
    if unknown:
        raise ValueError(f"unknown method: got {', '.join(map(repr, unknown))}; legal: {', '.join(legal)}")
    return tuple(method for name, method in legal.items() if not names or name in names)
