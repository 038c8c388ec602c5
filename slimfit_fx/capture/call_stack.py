"""Room on Python's stack for the many calls of a compiler, and of a step.

CPython (3.11 and later) keeps the frames of Python calls in chunks of 16 KiB that it maps when a call finds no room and
unmaps when that call returns. A loop that happens to run right at the end of a chunk maps and unmaps one in every call,
with the page faults that belong to it: planning BERT-base had 300,000 of them, which took more than its own work on a
virtual machine where a fault is dear. How deep the caller's stack is decides where that happens, so it is luck. For the
generated function of a large graph it is not even that: its own frame is larger than most chunks.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ROOM = 1 << 16
"""Entries of 8 bytes that one frame asks for. A chunk is the smallest power of two that holds its first frame and a few
thousand entries more: 1 MiB here, so that half of it is left for the calls behind. What is not used is never touched.
"""


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, the calls behind which share one chunk of stack, however deep its caller is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    roomy = types.FunctionType(
        run.__code__.replace(co_stacksize=ROOM), run.__globals__, run.__name__, None, run.__closure__
    )
    return functools.wraps(function)(roomy)
