"""What every test starts from: one thread, no compiled graphs of other tests, the same examples in every run."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test workers share few cores

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from effort import THOROUGH  # noqa: E402

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("search", parent=hypothesis.settings.get_profile("ci"), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@functools.cache
def _missing_compiler() -> str | None:
    from slimfit_fx.capture.lower import has_compiler

    return has_compiler(torch.device("cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is not asked for or has no C++ compiler, and say so; begin with the files that take longest.

    A worker takes file after file: a long one that comes last leaves the other workers idle.
    """
    if not THOROUGH:
        for item in items:
            if item.get_closest_marker("thorough") is not None:
                item.add_marker(pytest.mark.skip(reason="make test-all runs it"))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])
    compiled = [item for item in items if item.get_closest_marker("inductor") is not None]
    if compiled and (missing := _missing_compiler()) is not None:
        for item in compiled:
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_collection_finish() -> None:
    """Look for garbage in what tests make alone, and less often: imports left a million objects.

    What measures memory collects by itself. A tenth of the time went into looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget every compiled function after the test, so that recompile counts and limits are its own."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def reference_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on how fast this machine happens to be."""
    from slimfit_fx.planning import prices

    monkeypatch.setattr(prices, "_measured", lambda *_: prices.Prices())


@pytest.fixture
def cheap_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets try presets, but not to run products or blocks again: a third of the plans."""
    monkeypatch.setattr("slimfit_fx.planning.candidates.RECOMPUTE_SHARES", {"cheap": (1.0,)})
