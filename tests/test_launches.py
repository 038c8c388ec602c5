"""How generated code is run: kernels of a GPU start without detours, and Inductor's own way wherever one is needed.

There is no GPU here: the kernels are stand-ins for Inductor's, as far as their starts go.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen import triton
from torch._inductor.runtime import static_triton_launcher, triton_heuristics

from slimfit_fx.capture.launches import DirectKernel, kernels_started_directly, prepare

GRID = """
def launcher(in_ptr0, out_ptr0, xnumel, stream):
    grid_0 = -(xnumel // -1024)
    grid_1 = 1
    grid_2 = 1
    runner(grid_0, grid_1, grid_2, stream, in_ptr0, out_ptr0, xnumel)
"""
WATCHED, DIRECT = "watched", "direct"


class Compiled:
    """As ``StaticallyLaunchedCudaKernel``."""

    num_warps, shared, function, arg_tys = 4, 96, 1234, "OOi"
    has_global_scratch = has_profile_scratch = True

    def __init__(self, log):
        self.C_impl = types.SimpleNamespace(_launch_kernel=lambda *args: log.append((DIRECT, args)))
        self.log = log

    def run(self, *args):
        self.log.append((WATCHED, args))


class Kernel:
    """As ``CachingAutotuner`` before torch 2.13: tuned in its first run."""

    dump_launch_params = dump_launch_tensors = False

    def __init__(self, log, *, launchers=1, static=True, settled=True, stored=False):
        scope = {"runner": Compiled(log).run}
        exec(GRID, scope)
        launcher = scope["launcher"]
        launcher.config, launcher._is_static, launcher.store_cubin = types.SimpleNamespace(), static, stored
        self.inductor_meta = {"coordinate_descent_tuning": not settled}
        self.launchers = [launcher] * launchers

    def run(self, *args, stream):
        return self.launchers[0](*args, stream=stream)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(triton_heuristics, "CachingAutotuner", Kernel)
    monkeypatch.setattr(static_triton_launcher, "StaticallyLaunchedCudaKernel", Compiled)


def module_of(**kernels):
    """As Inductor writes one: ``call`` starts every kernel by its name."""
    module = types.ModuleType("generated")
    vars(module).update(kernels)

    def call(args):
        for name in kernels:
            getattr(module, name).run("x", "y", 5000, stream=7)
        return tuple(args)

    module.call = call
    prepare(module)
    return module


def starts(module, log):
    """How kernels start in one call."""
    log.clear()
    assert module.call([1, 2]) == (1, 2)
    return [how for how, _ in log]


def test_a_tuned_kernel_starts_directly_with_the_same_arguments():
    log = []
    module = module_of(one=Kernel(log), two=Kernel(log))
    assert starts(module, log) == [WATCHED] * 2
    first = log[0][1]
    assert first == (5, 1, 1, 7, "x", "y", 5000)
    assert starts(module, log) == [DIRECT] * 2
    assert log[0][1] == (1234, 5, 1, 1, 4, 96, "OOiOO", ("x", "y", 5000, None, None), 7)


@pytest.mark.parametrize(
    "needs", [{"launchers": 2}, {"static": False}, {"settled": False}, {"stored": True}], ids=lambda n: next(iter(n))
)
def test_a_kernel_that_needs_more_than_its_launcher_starts_in_inductors_way(needs):
    log = []
    module = module_of(one=Kernel(log, **needs))
    assert [starts(module, log) for _ in range(3)] == [[WATCHED]] * 3


def test_a_launcher_of_another_kind_is_called_as_it_is():
    log = []
    kernel = Kernel(log)
    kernel.launchers[0].__globals__["runner"] = lambda *args: log.append(("other", args))
    module = module_of(one=kernel)
    assert [starts(module, log) for _ in range(2)] == [["other"]] * 2
    assert isinstance(module.one, DirectKernel) and module.one.run is kernel.launchers[0]


def test_a_profiler_sees_every_start():
    log = []
    module = module_of(one=Kernel(log))
    starts(module, log)
    assert starts(module, log) == [DIRECT]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert starts(module, log) == [WATCHED]
        late = module_of(two=Kernel(log))
        assert starts(late, log) == starts(late, log) == [WATCHED]
    assert starts(module, log) == starts(late, log) == [DIRECT]


def test_what_torch_shortens_itself_is_left_alone():
    log = []
    kernel = Kernel(log)
    kernel._cached_launcher = None
    assert module_of(one=kernel).one is kernel


def test_a_module_that_is_loaded_twice_is_prepared_once():
    log = []
    module = module_of(one=Kernel(log))
    call, kernel = module.call, module.one
    prepare(module)
    assert module.call is call and module.one is kernel


def test_a_module_of_one_kernel_keeps_it(monkeypatch):
    """Inductor loads each kernel from a module of its own, and tunes it there."""
    module, log = types.ModuleType("kernel"), []
    module.one = kernel = Kernel(log)
    monkeypatch.setattr(PyCodeCache, "load_by_key_path", lambda *_: module)
    with kernels_started_directly():
        assert PyCodeCache.load_by_key_path("key", "path").one is kernel


def test_no_file_of_a_kernel_has_a_name_that_triton_cuts(monkeypatch):
    monkeypatch.setattr(triton, "get_fused_kernel_name", lambda *_: "fused" + "_native_layer_norm_backward" * 8)
    with kernels_started_directly():
        name = triton.get_fused_kernel_name([], "original_aten")
    assert len(f"triton_per_{name}_12345") < 150 and name.startswith("fused_native_layer_norm_backward_native")
    assert len(triton.get_fused_kernel_name([], "original_aten")) > 150


@pytest.mark.inductor
def test_graphs_of_ours_have_room():
    """Also on a CPU: their functions have more variables than a chunk of Python's stack has entries."""
    from reference import optimized, step
    from small_models import Tiny, tokens

    loaded = []
    load = PyCodeCache.load_by_key_path

    def remembered(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patched, torch._functorch.config.patch(enable_autograd_cache=False):
        patched.setattr(PyCodeCache, "load_by_key_path", remembered)
        model, _ = optimized(Tiny(depth=1), preset="balanced", executor="inductor", freeze_rate=0.5)
        step(model, model, tokens())
    calls = [module.call for module in loaded if hasattr(module, "call")]
    assert len(calls) == 2 and all(call.__code__.co_stacksize > 10_000 for call in calls)
