"""Bad input: every case is refused before anything is traced, with what is wrong, what is legal and the fix."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn

import slimfit_fx
from slimfit_fx import Config
from slimfit_fx.passes.pipeline import pass_names


@pytest.fixture(autouse=True)
def nothing_is_traced(monkeypatch):
    """A bad setting must be found before the compiler is asked for anything."""

    def refuse(*args, **kwargs):
        raise AssertionError("torch.compile was called although the input is bad")

    monkeypatch.setattr("slimfit_fx.capture.backend.SlimFitBackend.__call__", refuse)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


def refused(match: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=match)


# ---- the model


@pytest.mark.parametrize("model", [None, 3, mlp().state_dict(), mlp().parameters(), nn.Linear])
def test_what_is_no_module(model):
    with refused("model must be a torch.nn.Module, got", TypeError):
        slimfit_fx.optimize(model)
    with refused("model must be a torch.nn.Module, got", TypeError):
        slimfit_fx.plan(model)


def test_already_optimized():
    model = slimfit_fx.optimize(mlp())
    with refused(r"this Sequential is already optimized: call slimfit_fx.restore\(model\) first"):
        slimfit_fx.optimize(model)


def test_a_part_or_the_whole_is_already_optimized():
    outer = nn.Sequential(mlp(), nn.Linear(2, 2))
    slimfit_fx.optimize(outer[0])
    with refused(
        r"a part of this Sequential, a Sequential, is already optimized: call slimfit_fx.restore on that part"
    ):
        slimfit_fx.optimize(outer)
    slimfit_fx.restore(outer[0])
    slimfit_fx.optimize(outer)
    with refused(r"this Sequential is a part of a Sequential that is already optimized"):
        slimfit_fx.optimize(outer[0])


def test_a_copy_of_an_optimized_model_is_not_optimized():
    model = slimfit_fx.optimize(mlp())
    twin = copy.deepcopy(model)
    with refused("was not optimized"):
        slimfit_fx.session(twin)
    assert slimfit_fx.optimize(twin) is twin


def test_the_result_of_torch_compile():
    with refused(r"model is the result of torch.compile\(\): pass the module itself"):
        slimfit_fx.optimize(torch.compile(mlp()))
    with refused(r"model is the result of torch.compile\(\)"):
        slimfit_fx.plan(torch.compile(mlp()), torch.zeros(2, 4))


def test_a_model_compiled_in_place():
    model = mlp()
    model.compile()
    with refused(r"model.compile\(\) was called on this model: optimize\(\) compiles it itself"):
        slimfit_fx.optimize(model)


def test_data_parallel():
    with refused("model is wrapped in DataParallel: optimize the inner module first, then wrap it"):
        slimfit_fx.optimize(nn.DataParallel(mlp()))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        with refused("model is wrapped in DistributedDataParallel: optimize the inner module first, then wrap it"):
            slimfit_fx.optimize(wrapped)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript():
    with refused("model is a TorchScript module, which cannot be captured: pass the eager module"):
        slimfit_fx.optimize(torch.jit.trace(mlp(), torch.zeros(2, 4)))


def test_no_parameters():
    with refused("model must have parameters, GELU has none"):
        slimfit_fx.optimize(nn.GELU())


def test_no_trainable_parameters():
    with refused("model must have trainable parameters: all 4 have requires_grad=False"):
        slimfit_fx.optimize(mlp().requires_grad_(False))


def test_nothing_freezable():
    with refused("nothing is freezable among 2 trainable parameters.*choose some with units="):
        slimfit_fx.optimize(nn.BatchNorm1d(4))


def test_parameters_without_a_shape():
    with refused("parameters have no shape yet"):
        slimfit_fx.optimize(nn.LazyLinear(3))


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.14.0a0+git1", "3.0.0", "1.13.1+cu117"])
def test_torch_outside_the_supported_range(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with refused(r"torch must be >= 2.11 and < 2.14, got " + version.replace("+", r"\+")):
        slimfit_fx.optimize(mlp())


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu"])
def test_torch_inside_the_supported_range(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    slimfit_fx.optimize(mlp())


# ---- settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"preset": "ballanced"}, r"preset must be one of \['balanced'.*got 'ballanced' \(did you mean 'balanced'\?\)"),
        ({"scheduler": "isl"}, r"scheduler must be one of \[.*got 'isl' \(did you mean 'ils'\?\)"),
        ({"codecs": {"float": "int88"}}, r"codecs\['float'\] must be one of \[.*got 'int88' \(did you mean 'int8'\?\)"),
        ({"codecs": {"gelu": "int8"}}, r"codecs: the kind must be one of .*got 'gelu' \(did you mean 'gelu_input'\?\)"),
        ({"units": "0.wieght"}, r"units pattern '0.wieght' matches no trainable parameter; near it: \['0.weight'"),
        ({"units": []}, "units must name at least one parameter"),
        ({"freeze_rate": 1.0}, r"freeze_rate must be in \[0, 1\), got 1.0"),
        ({"freeze_rate": -0.1}, r"freeze_rate must be in \[0, 1\), got -0.1"),
        ({"freeze_rate": 90}, r"got 90 \(a share, not a percentage: did you mean 0.9\?\)"),
        ({"executor": "inducter"}, r"executor must be one of .*did you mean 'inductor'"),
        ({"distance": "relative"}, "distance must be one of .*got 'relative'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"preset": "exact", "codecs": {"float": "int8"}}, "must be lossless under preset 'exact', got 'int8'"),
        (
            {"disabled_passes": ("insert_codec",)},
            r"disabled_passes: a name must be one of .*got 'insert_codec' \(did you mean 'insert_codecs'\?\)",
        ),
        ({"disabled_passes": ("tag_liveness",)}, "disabled_passes: a name must be one of .*got 'tag_liveness'"),
    ],
)
def test_illegal_values(settings, match):
    with refused(match):
        slimfit_fx.optimize(mlp(), **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"freeze_rate": "0.9"}, r"freeze_rate must be a number in \[0, 1\), got '0.9'"),
        ({"preset": None}, "preset must be a string, one of .*got None"),
        ({"scheduler": 3}, "scheduler must be a name, a Scheduler or a subclass of it, got 3"),
        ({"units": 3}, r"units must be None, a predicate \(name, parameter\) -> bool or name patterns, got 3"),
        ({"units": lambda name, param: None}, "units must return True or False, got None for '0.weight'"),
        ({"dynamic": "yes"}, "dynamic must be None, True or False, got 'yes'"),
        ({"disabled_passes": "insert_codecs"}, "disabled_passes must be a tuple of pass names, got 'insert_codecs'"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_wrong_types(settings, match):
    with refused(match, TypeError):
        slimfit_fx.optimize(mlp(), **settings)


def test_every_pass_that_may_be_switched_off_is_accepted():
    slimfit_fx.optimize(mlp(), disabled_passes=pass_names())


def test_config_and_keywords():
    with refused(r"give settings in config or as keywords, not both: got config and \['preset'\]"):
        slimfit_fx.optimize(mlp(), Config(), preset="max")
    with refused(r"give settings in config or as keywords, not both: got config and \['freeze_rate', 'preset'\]"):
        slimfit_fx.plan(mlp(), torch.zeros(2, 4), config=Config(), preset="max", freeze_rate=0.5)


def test_a_config_of_another_type():
    with refused("config must be a slimfit_fx.Config, got dict: pass settings as keywords", TypeError):
        slimfit_fx.optimize(mlp(), {"preset": "max"})


def test_plan_checks_its_settings_too():
    with refused("did you mean 'max'"):
        slimfit_fx.plan(mlp(), torch.zeros(2, 4), preset="maxx")
    with refused("units pattern 'x' matches no trainable parameter"):
        slimfit_fx.plan(mlp(), torch.zeros(2, 4), units="x")


class Named(nn.Linear):
    """A forward that takes a ``seed``, and swallows the rest."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x, seed=None, **debug):
        return super().forward(x).mean()


LEGAL = "preset, freeze_rate, units, codecs, memory_budget, max_gradient_error"


@pytest.mark.parametrize("model", [mlp(), Named()])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config) if f.name not in LEGAL.split(", ")])
def test_plan_swallows_no_setting(monkeypatch, model, name):
    """Whether the forward would refuse it or take it as one of its ``**kwargs``."""
    asked = []
    monkeypatch.setattr("slimfit_fx.api.Rehearsal.plan", lambda *args, **_: asked.append(args))
    value = getattr(Config(), name)
    if name == "seed" and isinstance(model, Named):
        slimfit_fx.plan(model, torch.zeros(2, 4), seed=0)
        assert asked[0][3] == {"seed": 0}, "the forward's own"
        return
    what, kind = re.escape(f"{name}={value!r}"), type(model).__name__
    fix = rf"give all settings in config=Config\(preset='max', {what}\)"
    with refused(f"plan takes {LEGAL} as keywords, got {what}, which {kind}.forward does not name .*{fix}", TypeError):
        slimfit_fx.plan(model, torch.zeros(2, 4), preset="max", **{name: value})
    assert not asked


def test_all_settings_that_plan_does_not_take_are_said_at_once():
    both = "scheduler='isl', recompute='blocks'"
    said = rf"got {both}, which .*give all settings in config=Config\(units='x', {both}\)"
    with refused(rf"(?s){said}.scheduler must be one of .*did you mean 'ils'.*units pattern 'x' matches no"):
        slimfit_fx.plan(mlp(), torch.zeros(2, 4), units="x", recompute="blocks", scheduler="isl")
    with refused("got seed=1, which Sequential.forward does not name either: give them in your config$", TypeError):
        slimfit_fx.plan(mlp(), torch.zeros(2, 4), config=Config(), seed=1)
    with refused(r"(?s)got seed=1, which NoneType.*model must be a torch.nn.Module, got NoneType", TypeError):
        slimfit_fx.plan(None, seed=1)


def test_what_max_batch_does_not_know():
    with refused("no_such_setting", TypeError):
        slimfit_fx.max_batch(mlp(), torch.zeros(2, 4), "1GiB", no_such_setting=1)
    with refused(r"give settings in config or as keywords, not both: got config and \['seed'\]"):
        slimfit_fx.max_batch(mlp(), torch.zeros(2, 4), "1GiB", config=Config(), seed=1)


def test_front_takes_no_setting_that_it_varies():
    said = "front tries presets and levels of recompute itself, without a budget, got preset='max', recompute='blocks':"
    with refused(f"{said} choose presets with presets=, .*and leave out codecs, memory_budget, recompute"):
        slimfit_fx.front(mlp(), torch.zeros(2, 4), recompute="blocks", preset="max")
    with refused("(?s)got codecs={}: .*freeze_rate must be in"):
        slimfit_fx.front(mlp(), torch.zeros(2, 4), codecs={}, freeze_rate=2)


def test_all_problems_at_once(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(ValueError, match="preset must be one of") as info:
        slimfit_fx.optimize(nn.DataParallel(nn.GELU()), preset="maxx", freeze_rate=2.0)
    said = str(info.value)
    for part in ("freeze_rate must be in", "torch must be", "wrapped in DataParallel", "must have parameters"):
        assert part in said
    assert len(said.splitlines()) == 5


def test_one_problem_is_said_once():
    with pytest.raises(TypeError) as info:
        slimfit_fx.optimize(mlp(), units=3)
    assert len(str(info.value).splitlines()) == 1


def test_a_refused_model_is_left_as_it_was():
    model = mlp()
    with refused("preset"):
        slimfit_fx.optimize(model, preset="maxx")
    assert model._compiled_call_impl is None
    with refused("was not optimized"):
        slimfit_fx.session(model)


def test_without_a_compiler_it_warns_and_uses_the_interpreter(monkeypatch):
    monkeypatch.setattr("slimfit_fx.api.has_compiler", lambda device: f"no C++ compiler for {device}")
    said = "slimfit_fx: no C\\+\\+ compiler for cpu; the interpreter is used: same memory plan, slower steps"
    with pytest.warns(RuntimeWarning, match=said) as told:
        model = slimfit_fx.optimize(mlp())
    assert [w.filename for w in told] == [__file__], "one warning, at the call of optimize"
    assert slimfit_fx.session(model).executor == "interpreter"
    assert slimfit_fx.session(model).config.executor == "inductor", "what was asked for"


@pytest.mark.parametrize(("executor", "missing"), [("inductor", None), ("interpreter", "no C++ compiler")])
def test_nothing_is_said_of_the_executor_that_was_asked_for(monkeypatch, recwarn, executor, missing):
    monkeypatch.setattr("slimfit_fx.api.has_compiler", lambda device: missing)
    model = slimfit_fx.optimize(mlp(), executor=executor)
    assert slimfit_fx.session(model).executor == executor and not recwarn.list


def test_a_budget_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("slimfit_fx.api.has_compiler", lambda device: "no C++ compiler")
    with refused("memory_budget needs executor 'inductor', whose code tells the peak, but here is no C"):
        slimfit_fx.optimize(mlp(), memory_budget="1GiB")


# ---- session and restore


@pytest.mark.parametrize("function", [slimfit_fx.session, slimfit_fx.restore])
@pytest.mark.parametrize("model", [mlp(), None, "model"])
def test_a_model_that_was_not_optimized(function, model):
    with refused(r"was not optimized: call slimfit_fx.optimize\(model\) first"):
        function(model)


def test_restore_twice():
    model = slimfit_fx.optimize(mlp())
    assert slimfit_fx.restore(model) is model
    with refused("this Sequential was not optimized"):
        slimfit_fx.restore(model)
    assert slimfit_fx.optimize(model) is model


def test_a_plan_before_the_first_step():
    current = slimfit_fx.session(slimfit_fx.optimize(mlp()))
    with refused(r"no graph was captured yet: run one training step first, or call slimfit_fx.plan", RuntimeError):
        _ = current.plan


@pytest.mark.parametrize("change", ["freeze", "unfreeze"])
def test_units_that_do_not_exist(change):
    current = slimfit_fx.session(slimfit_fx.optimize(mlp()))
    with refused(r"'0.wieght' matches no unit \(did you mean '0.weight'\?\); 'x.\*' matches no unit"):
        getattr(current, change)(["0.wieght", "0.*", "x.*"])
    assert current.gates.open == frozenset(current.gates.names)


def test_a_state_of_something_else():
    current = slimfit_fx.session(slimfit_fx.optimize(mlp()))
    state = current.state_dict()
    with refused("state must have version 2, got None"):
        current.load_state_dict({})
    with refused("state is of scheduler 'RandomScheduler', this one is"):
        current.load_state_dict({**state, "scheduler": {**state["scheduler"], "scheduler": "RandomScheduler"}})
    with refused(r"state is of other units .*unexpected \['x'\]"):
        current.load_state_dict({**state, "scheduler": {**state["scheduler"], "units": ["x"]}})
