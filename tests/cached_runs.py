"""Run by test_cache.py in processes of its own: one step per settings, and what the compile caches said to it.

``python cached_runs.py SETTINGS.json RESULTS.pt``; the folder of the caches comes in TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch
from reference import optimized, step
from small_models import Tiny, tokens
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir
from tower import Tower, rows


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """One step with a unit closed, of a ``Tower`` or, if ``depth`` is given, of a ``Tiny`` with so many blocks.

    ``forget`` is no setting either: it removes what we keep on disk under such names.
    """
    torch._dynamo.reset()
    counters.clear()
    forgotten = settings.pop("forget", None)
    for path in pathlib.Path(cache_dir(), "slimfit_fx").glob(forgotten) if forgotten else ():
        path.unlink()
    depth = settings.pop("depth", 0)
    made, inputs, closed = (
        (Tiny(depth=depth), tokens(), "blocks.2.up.weight") if depth else (Tower(), rows(), "up.weight")
    )
    model, session = optimized(made, **{"executor": "inductor", "scheduler": "none", **settings})
    session.freeze("blocks.2.up.weight" if depth else "up.weight")
    loss, grads = step(model, model, inputs)
    return {
        "graphs": {key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")},
        "autograd": {key: counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("hit", "miss", "bypass")},
        "loss": loss,
        "grads": {name: grad for name, grad in grads.items() if grad is not None},
        "closed": sorted(session.gates.closed),
        "executor": session.executor,
        "plan": session.plan.to_dict(),
        "timeline": timeline_of(session),
    }


def timeline_of(session: Any) -> tuple[int, ...] | str:
    """Bytes after every event of a step, or why they are not known."""
    try:
        return session.predict_peak().timeline
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    every = json.loads(pathlib.Path(sys.argv[1]).read_text())
    torch.save([run(settings) for settings in every], sys.argv[2])
