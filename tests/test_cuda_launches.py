"""How kernels start on a GPU. Nothing here reads what they compute, so an emulated GPU will do as well::

python -m bench.emulated_gpu -m pytest tests/test_cuda_launches.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from reference import optimized
from small_models import Tiny, tokens
from torch import Tensor

from slimfit_fx.capture import launches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, or an emulated one")

ALIGNMENT = 16
"""Bytes: Triton reads several elements at once where a pointer is known to be a multiple."""


class Starts:
    """Stands in for the C++ that starts kernels, and notes what it is handed; kernels of all tests keep it."""

    noted: ClassVar[list[tuple[Any, ...]]] = []
    in_inductors_way: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def _load_kernel(*given: Any) -> Any:
        return _c_impl()._load_kernel(*given)

    @staticmethod
    def _launch_kernel(*given: Any) -> None:
        *others, arguments, stream = given
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        Starts.noted.append((*others, addresses, stream))
        _c_impl()._launch_kernel(*given)


def _c_impl() -> Any:
    from torch._C import _StaticCudaLauncher

    return _StaticCudaLauncher


@pytest.fixture
def watched(monkeypatch) -> Callable[[bool], None]:
    """Says whether kernels start in Inductor's own way, as under a profiler."""
    now = [False]
    monkeypatch.setattr(launches, "_is_watched", lambda: now[0])
    return lambda is_watched: now.__setitem__(0, is_watched)


def trained(**settings: Any) -> Callable[[], None]:
    """A step of training, the same each time; kernels are tuned."""
    model, _ = optimized(Tiny(depth=3).cuda(), executor="inductor", scheduler="none", **settings)
    data = [x.cuda() for x in tokens(batch=8)]

    def step() -> None:
        torch.manual_seed(0)
        model(*data).backward()
        model.zero_grad()

    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_step_starts_the_kernels_that_inductor_would_start(preset, watched, monkeypatch):
    """The same functions in the same order, with the same grids and arguments, by a shorter way."""
    launcher = pytest.importorskip("torch._inductor.runtime.static_triton_launcher").StaticallyLaunchedCudaKernel
    usual = launcher.run

    def run(self, *args: Any) -> None:
        Starts.in_inductors_way[self.name] += 1
        usual(self, *args)

    monkeypatch.setattr(launcher, "C_impl", Starts)
    monkeypatch.setattr(launcher, "run", run)
    step = trained(preset=preset)

    def noted(is_watched: bool) -> tuple[list[tuple[Any, ...]], int]:
        watched(is_watched)
        step()
        Starts.noted.clear()
        Starts.in_inductors_way.clear()
        step()
        return list(Starts.noted), Starts.in_inductors_way.total()

    directly, few = noted(False)
    inductors, all_of_them = noted(True)
    again, _ = noted(False)
    assert len(directly) > 20
    assert directly == inductors == again
    assert (few, all_of_them) == (0, len(inductors))


@pytest.mark.parametrize(
    "settings", [{"preset": "exact"}, {"preset": "max"}, {"preset": "balanced", "recompute": "blocks"}]
)
def test_pointers_are_as_aligned_as_kernels_are_compiled_for(settings, watched, monkeypatch):
    """What goes to blocks and branches as a view (seeds of dropout, parts of what is held) starts anywhere."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    usual, seen, wrong = CachingAutotuner.run, Counter[str](), []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        (attributes,) = self.triton_meta["configs"]
        for (position,) in attributes:
            if position < len(args) and isinstance(args[position], Tensor):
                seen[self.fn.__name__] += 1
                if args[position].data_ptr() % ALIGNMENT:
                    wrong.append((self.fn.__name__, position, args[position].shape))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(CachingAutotuner, "run", run)
    watched(True)
    trained(**settings)()
    assert len(seen) > 10
    assert wrong == []
