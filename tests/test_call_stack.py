"""What runs with room on Python's stack never sits at the end of a chunk, however deep its caller is."""

from __future__ import annotations

import inspect
import resource
from collections.abc import Callable

import pytest

from slimfit_fx.capture.backend import SlimFitBackend
from slimfit_fx.capture.call_stack import with_room

CALLS, DEPTHS = 500, range(300)


def add(*numbers: int, scale: int = 1) -> int:
    """Sum, scaled."""
    return scale * sum(numbers)


def faults_of_calls() -> int:
    """Page faults of a loop of calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        add(1, 2, 3)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def at_depth(depth: int, run: Callable[[], int]) -> int:
    """``run()``, ``depth`` calls further down."""
    return at_depth(depth - 1, run) if depth else run()


def test_a_loop_of_calls_maps_no_memory_at_any_depth() -> None:
    """As it does at the end of a chunk without room: once per call."""
    if max(at_depth(depth, faults_of_calls) for depth in DEPTHS) < CALLS:
        pytest.skip("this Python keeps a chunk that is empty")
    roomy = with_room(faults_of_calls)
    assert max(at_depth(depth, roomy) for depth in DEPTHS) < CALLS / 10


def test_arguments_results_and_errors_pass() -> None:
    """And name, signature and text of the function are those of the original."""
    roomy = with_room(add)
    assert roomy(1, 2, scale=3) == 9
    assert roomy.__name__ == "add"
    assert inspect.signature(roomy) == inspect.signature(add)
    with pytest.raises(TypeError, match="unsupported operand"):
        roomy("a")  # type: ignore[arg-type]


def test_the_backend_compiles_with_room() -> None:
    """Everything behind dynamo: AOTAutograd, the passes, Inductor."""
    assert SlimFitBackend.__call__.__code__.co_stacksize > 2 * 16 * 1024 / 8
