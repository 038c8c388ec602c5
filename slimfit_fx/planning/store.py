"""Plans on disk, beside Inductor's cache: a graph that comes from the cache was not partitioned in this process.

So is the code that Inductor wrote for it, from which its memory is read when somebody asks. For display only: nothing
at run time reads them, and a missing or broken file means that nothing is known.
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

from slimfit_fx.planning.dry_run import GeneratedCode, StepCode
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


def save_codes(key: str, codes: Sequence[StepCode]) -> None:
    """Keep what Inductor wrote under ``key``, with example sizes for symbols; a graph of ours is written by nobody."""
    written = [code for code in codes if isinstance(code, GeneratedCode)]
    if len(written) == len(codes):
        save_json(kept_path(f"{key}-codes"), [code.to_dict() for code in written])


def load_codes(key: str) -> list[GeneratedCode]:
    """Return the codes kept under ``key``, forward and backward; none if they are not there."""
    try:
        return [GeneratedCode.from_dict(code) for code in json.loads(kept_path(f"{key}-codes").read_text())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


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
