"""What is learned: the four tasks that need no network, and in ``hub.py`` those of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.accuracy.tasks.base import SCALES, Task
from bench.accuracy.tasks.code import code_task
from bench.accuracy.tasks.digits import digits_task
from bench.accuracy.tasks.docstrings import docstrings_task, pairs_task

TASKS: dict[str, Callable[[str, Path], Task]] = {
    "digits": digits_task,
    "docstrings": docstrings_task,
    "pairs": pairs_task,
    "code": code_task,
}
"""Name -> builder of (scale, folder for pretrained weights)."""


def named_tasks(names: Sequence[str], scale: str, cache: Path) -> tuple[Task, ...]:
    """Build the tasks with these names; all of them for no names.

    Raises:
        ValueError: a name that no task bears, or an unknown scale.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task: got {', '.join(map(repr, unknown))}; legal: {', '.join(TASKS)}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale: got {scale!r}; legal: {', '.join(SCALES)}")
    return tuple(build(scale, cache) for name, build in TASKS.items() if not names or name in names)
