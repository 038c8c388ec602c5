"""Plans on disk, beside Inductor's cache: a graph that comes from the cache was not partitioned in this process.

For display only. Nothing at run time reads a plan, and a missing or broken file means "no plan is known".
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from slimfit_fx.planning.peak import StepTrace
from slimfit_fx.planning.rows import GraphPlan

log = logging.getLogger("slimfit_fx.planning")


def plan_key(graph: fx.Graph, inputs: Sequence[Any], partitioner_id: str) -> str:
    """Name one captured graph, its input sizes and the partitioner that handles it."""
    sizes = [
        (tuple(map(str, v.shape)), str(v.dtype), v.requires_grad) if isinstance(v, Tensor) else str(v) for v in inputs
    ]
    return hashlib.sha256(f"{graph}\n{sizes}\n{partitioner_id}".encode()).hexdigest()


def save_plan(key: str, plan: GraphPlan) -> None:
    """Keep ``plan`` under ``key``; a folder that cannot be written is no error."""
    save_json(kept_path(key), plan.to_dict())


def load_plan(key: str) -> GraphPlan | None:
    """Return the plan kept under ``key``, or None."""
    try:
        return GraphPlan.from_dict(json.loads(kept_path(key).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_trace(key: str, trace: StepTrace) -> None:
    """Keep the memory events of a compiled graph under ``key``; a folder that cannot be written is no error."""
    save_json(kept_path(f"{key}-trace"), trace.to_dict())


def load_trace(key: str) -> StepTrace | None:
    """Return the memory events kept under ``key``, or None."""
    try:
        return StepTrace.from_dict(json.loads(kept_path(f"{key}-trace").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_json(path: pathlib.Path, data: Any) -> None:
    """Keep ``data`` as JSON; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(data, file)
        os.replace(file.name, path)
    except OSError:
        log.debug("%s was not kept", path.name, exc_info=True)


def kept_path(name: str) -> pathlib.Path:
    """Where something of this name is kept."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return pathlib.Path(cache_dir()) / "slimfit_fx" / f"{name}.json"
