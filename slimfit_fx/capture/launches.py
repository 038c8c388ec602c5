"""The code that Inductor wrote for us runs without detours.

A step of short kernels takes as long as the Python that starts them. Three detours are left out:

- Inductor's starter of kernels in C++ (``_StaticCudaLauncher``) needs the file of the compiled kernel and looks for it
  under the kernel's whole name, but Triton cuts names of files after 150 characters. A kernel that fuses many operators
  has a longer name, is not found, and is started by Triton's Python, several times as slowly. Such names are cut while
  code is written.
- ``CachingAutotuner.run`` asks at every start what cannot change once a kernel is tuned, and passes through several
  functions. torch 2.13 remembers the way; for older versions it is remembered here, in place of the kernels in the
  modules that are loaded for us. Where a profiler or a debug mode watches, kernels start in Inductor's own way: that is
  asked once for each call of a graph.
- The function of a graph has thousands of local variables, so it nearly fills a chunk of Python's stack, and calls from
  there map and unmap another (call_stack.py). It gets room.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.autograd import profiler

from slimfit_fx.capture.call_stack import with_room

LONGEST_NAME = 100
"""Characters for the operators in a kernel's name; its kind and its number come on top."""
_PREPARED = "slimfit_fx_prepared"
"""Marks a module that was loaded before."""


@contextlib.contextmanager
def kernels_started_directly() -> Iterator[None]:
    """Hold this while Inductor writes code for a GPU, and while it loads any."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.codegen import triton

    whole_name, load = triton.get_fused_kernel_name, PyCodeCache.load_by_key_path

    def name(*args: Any, **kwargs: Any) -> str:
        return whole_name(*args, **kwargs)[:LONGEST_NAME].rstrip("_")

    def loaded(*args: Any, **kwargs: Any) -> types.ModuleType:
        module: types.ModuleType = load(*args, **kwargs)
        prepare(module)
        return module

    with (
        mock.patch.object(triton, "get_fused_kernel_name", name),
        mock.patch.object(PyCodeCache, "load_by_key_path", loaded),
    ):
        yield


def prepare(module: types.ModuleType) -> None:
    """Give the function ``call`` of a graph's generated module room, and its Triton kernels short starts."""
    if not hasattr(module, "call") or hasattr(module, _PREPARED):
        return
    kernels = _direct_kernels(module)
    call = _asking_who_watches(module.call, list(kernels.values())) if kernels else module.call
    vars(module).update({**kernels, "call": with_room(call), _PREPARED: True})


def _direct_kernels(module: types.ModuleType) -> dict[str, DirectKernel]:
    """By name; none that remembers its launcher itself, as those of torch 2.13 do."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    kernels = {name: value for name, value in vars(module).items() if type(value) is CachingAutotuner}
    return {name: DirectKernel(value) for name, value in kernels.items() if not hasattr(value, "_cached_launcher")}


class DirectKernel:
    """A kernel that its only launcher starts once it is tuned; ``kernel.run`` does as long as it is watched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._launcher: Callable[..., Any] | None = None
        self.run: Callable[..., Any] = self._first_run

    def watch(self, is_watched: bool) -> None:
        """From now on a profiler or a debug mode wants to see each start, or none does."""
        if self._launcher is not None:
            self.run = self._kernel.run if is_watched else self._launcher

    def _first_run(self, *args: Any, stream: int, **kwargs: Any) -> Any:
        result = self._kernel.run(*args, stream=stream, **kwargs)
        if _is_tuned(self._kernel):
            self._launcher = _short_launcher(self._kernel.launchers[0])
            self.watch(_is_watched())
        return result


def _asking_who_watches(call: Callable[..., Any], kernels: Sequence[DirectKernel]) -> Callable[..., Any]:
    was_watched = False

    def ask_and_call(args: list[Any]) -> Any:
        nonlocal was_watched
        if _is_watched() != was_watched:
            was_watched = not was_watched
            for kernel in kernels:
                kernel.watch(was_watched)
        return call(args)

    return ask_and_call


def _is_watched() -> bool:
    from torch.utils._debug_mode import get_active_debug_mode

    return profiler._is_profiler_enabled or get_active_debug_mode() is not None


def _is_tuned(kernel: Any) -> bool:
    """Whether ``kernel`` will be started by the same launcher from now on, and needs nothing else of a start."""
    if len(kernel.launchers) != 1:
        return False
    (launcher,) = kernel.launchers
    is_dumped = kernel.dump_launch_params or kernel.dump_launch_tensors or launcher.store_cubin
    is_settled = getattr(launcher.config, "found_by_coordesc", False) or not kernel.inductor_meta.get(
        "coordinate_descent_tuning", False
    )
    return bool(getattr(launcher, "_is_static", False) and is_settled and not is_dumped)


def _short_launcher(launcher: types.FunctionType) -> Callable[..., Any]:
    """``launcher``, which finds out the grid and calls ``StaticallyLaunchedCudaKernel.run``, without the latter."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    kernel = getattr(launcher.__globals__.get("runner"), "__self__", None)
    if type(kernel) is not StaticallyLaunchedCudaKernel or torch.version.hip is not None:
        return launcher
    launch, function, warps, shared = kernel.C_impl._launch_kernel, kernel.function, kernel.num_warps, kernel.shared
    scratch = (None,) * (bool(kernel.has_global_scratch) + bool(kernel.has_profile_scratch))
    kinds = kernel.arg_tys + "O" * len(scratch)

    def runner(grid_x: int, grid_y: int, grid_z: int, stream: int, *args: Any) -> None:
        launch(function, grid_x, grid_y, grid_z, warps, shared, kinds, args + scratch, stream)

    return types.FunctionType(launcher.__code__, {**launcher.__globals__, "runner": runner})
