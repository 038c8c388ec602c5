"""What a block of memory is called in a trace: a text, so that traces stay plain data.

::

    mul @ encoder.layer.0.norm    a saved value and the module that made it
    gradient                      what backward returns
    32x128 float32                a temporary
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GRADIENT = "gradient"
"""The label of a block that backward returns."""
LABEL = "slimfit_label"
"""Where a graph input keeps its label, in ``node.meta``."""
_AT = " @ "


@dataclass(frozen=True)
class Label:
    """``kind``: ``saved``, ``gradient`` or ``temporary``. ``module`` is empty where it is not known."""

    kind: str
    what: str
    module: str


def saved_label(name: str, module: str, *, encoded: bool) -> str:
    """The label of a saved value of this name; its numbers go, so that equal values of several layers can be folded."""
    what = re.sub(r"_\d+", "", name)
    return f"{what}{' encoded' if encoded else ''}{_AT}{module or '(model)'}"


def read_label(label: str) -> Label:
    """The parts of a label."""
    what, at, module = label.partition(_AT)
    if at:
        return Label("saved", what, module)
    return Label("gradient" if label == GRADIENT else "temporary", what, "")
