"""The schedule in checkpoints of ``torch.distributed.checkpoint``, which also read on another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from slimfit_fx.api import session


class ScheduleState:
    """What ``dcp.save`` and ``dcp.load`` take for the schedule of an optimized model.

    For example::

        dcp.save({"model": ..., "optimizer": ..., "slimfit_fx": ScheduleState(model)}, checkpoint_id=folder)

    They store a state entry by entry and want the same entries when they load; the schedule has other ones after every
    step, so it is handed over as one string.

    Raises:
        ValueError: the model was not optimized.
    """

    def __init__(self, model: nn.Module) -> None:
        self._session = session(model)

    def state_dict(self) -> dict[str, Any]:
        """The session's state."""
        return {"json": json.dumps(self._session.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from it."""
        self._session.load_state_dict(json.loads(state["json"]))
