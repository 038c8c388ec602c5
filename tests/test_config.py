"""Config: presets say what they say, and every bad setting is named with its fix, all in one error."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import pydoc
import subprocess
import sys
from fractions import Fraction

import pytest

import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.presets import FALLBACK, PRESETS, resolve
from slimfit_fx.schedule import OpenScheduler, RandomScheduler, UnitInfo

codecs = pytest.importorskip("slimfit_fx.codecs")


def codec_name(config: Config, kind: str) -> str | None:
    codec = config.codec_for(kind)
    return None if codec is None else codec.name


# ---- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_names_known_kinds_and_codecs(preset):
    assert set(PRESETS[preset]) <= set(FALLBACK)
    assert set(PRESETS[preset].values()) <= {*codecs.codec_names(), None}
    for kind in FALLBACK:
        Config(preset=preset).codec_for(kind)


def test_exact_is_lossless():
    chosen = [Config(preset="exact").codec_for(kind) for kind in FALLBACK]
    assert all(codec is None or codec.lossless for codec in chosen)
    assert codec_name(Config(preset="exact"), "mask") == "bits"


def test_paper_has_the_authors_formats():
    config = Config(preset="paper")
    assert {kind: codec_name(config, kind) for kind in FALLBACK} == {
        "float": None,
        "mask": "bits",
        "gelu_input": "fixed_gelu4",
        "attention_qkv": "fixed_int8",
        "attention_probs": "fixed_uint8",
        "normalised": None,
        "normalised_static": "topk",
        "normalised_units": None,
        "gelu_input_static": "fixed_gelu4",
        "gelu_input_units": "fixed_gelu4",
        "linear_input": "fixed_int8",
        "block_input": "int8",
    }


@pytest.mark.parametrize(("preset", "floats"), [("balanced", "int8"), ("max", "int4")])
def test_specific_kinds_fall_back_to_float_but_masks_do_not(preset, floats):
    config = Config(preset=preset)
    for kind in ("float", "gelu_input", "normalised", "normalised_static", "linear_input"):
        assert codec_name(config, kind) == floats
    assert codec_name(config, "attention_qkv") == floats
    assert codec_name(config, "attention_probs") == "int8"
    assert codec_name(config, "mask") == "bits"
    assert codec_name(Config(codecs={"mask": None}), "mask") is None


def test_exact_kind_is_never_encoded():
    assert all(Config(preset=preset).codec_for("exact") is None for preset in PRESETS)


def test_codecs_lie_over_the_preset():
    config = Config(codecs={"gelu_input": "int4", "normalised": None})
    assert codec_name(config, "gelu_input") == "int4"
    assert codec_name(config, "normalised") is codec_name(config, "normalised_static") is None
    assert codec_name(config, "linear_input") == "int8"


def test_labels_name_what_differs_from_the_preset():
    assert Config(preset="max").label == "preset max"
    assert Config(preset="max", codecs={"normalised": "int8"}).label == "preset max, normalised int8"
    assert Config(preset="max", codecs={"float": "int8"}, recompute="blocks").label == (
        "preset max, float int8, recompute blocks"
    )
    part = Config(recompute="products", recompute_share=0.25)
    assert part.label == "preset balanced, recompute products in the first 25%"
    assert Config(codecs={"normalised": None, "mask": None}).label == "preset balanced, mask kept, normalised kept"
    mixed = Config(preset="max").with_codecs({**resolve(PRESETS["max"]), "float": "int8", "normalised": "int8"})
    assert mixed.label == "preset max, float int8, normalised int8"
    assert codec_name(mixed, "gelu_input") == "int4" and codec_name(mixed, "attention_probs") == "int8"


# ---- the object


def test_the_signature_of_optimize_names_every_setting():
    own, settings = inspect.signature(slimfit_fx.optimize).parameters, inspect.signature(Config).parameters
    assert list(own) == ["model", "config", "optimizer", *settings]
    chosen = Config()
    for field in dataclasses.fields(Config):
        parameter = own[field.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation == field.type
        expected = field.default if field.default is not dataclasses.MISSING else getattr(chosen, field.name)
        assert parameter.default == expected
    assert Config(**{field.name: own[field.name].default for field in dataclasses.fields(Config)}) == chosen
    assert "recompute_share: 'float' = 1.0" in pydoc.render_doc(slimfit_fx.optimize)


def test_frozen_hashable_replaceable_and_pickleable():
    config = Config(codecs={"float": "int4"}, units=["a.*"], disabled_passes=["sink_backward"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert config.units == ("a.*",) and config.disabled_passes == ("sink_backward",)
    assert hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config) == config == pickle.loads(pickle.dumps(config))


def test_distances_are_sampled_unless_the_preset_is_the_papers():
    assert Config().distance_sample == Config(preset="max").distance_sample == 65536
    assert Config(preset="paper").distance_sample is None
    assert Config(preset="paper", distance_sample=7).distance_sample == Config(distance_sample=7).distance_sample == 7
    assert Config(distance_sample=None).distance_sample is None
    assert dataclasses.replace(Config(preset="paper"), preset="exact").distance_sample is None, "a budget's candidate"


def test_codecs_are_copied():
    mine = {"float": "int4"}
    config = Config(codecs=mine)
    mine["float"] = "nonsense"
    assert codec_name(config, "float") == "int4"


@pytest.mark.parametrize("scheduler", ["none", OpenScheduler(), RandomScheduler])
def test_schedulers(scheduler):
    assert Config(scheduler=scheduler).scheduler is scheduler


def test_numbers_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    config = Config(freeze_rate=numpy.float32(0.5))
    assert type(config.freeze_rate) is float and config.freeze_rate == 0.5
    assert type(Config(freeze_rate=0).freeze_rate) is float


def test_units_catch_up_unless_the_preset_is_the_papers():
    assert Config().catch_up == Config(preset="exact").catch_up == Config(preset="paper", catch_up=0.5).catch_up == 0.5
    assert Config(preset="paper").catch_up == Config(catch_up=0).catch_up == 0.0
    assert dataclasses.replace(Config(preset="paper"), preset="exact").catch_up == 0.0, "a budget's candidate"


def test_averages_go_by_steps_unless_the_preset_is_the_papers():
    assert (
        Config().moments == Config(preset="exact").moments == Config(preset="paper", moments="steps").moments == "steps"
    )
    assert Config(preset="paper").moments == Config(moments="updates").moments == "updates"
    assert dataclasses.replace(Config(preset="paper"), preset="exact").moments == "updates", "a budget's candidate"


# ---- fingerprint


def test_fingerprint_follows_what_changes_a_graph():
    base = Config()
    same = [{"seed": 3}, {"scheduler": "random"}, {"executor": "interpreter"}, {"codecs": {"float": "int8"}}]
    same += [{"freeze_rate": 0.9 + 1e-9}, {"strict": True}, {"distance": "relative_norm"}, {"units": "a"}]
    same += [{"distance_sample": 7}, {"moments": "updates"}, {"catch_up": 1}]
    same += [{"max_gradient_error": 5.0}]
    other = [{"preset": "max"}, {"codecs": {"float": "int4"}}, {"min_bytes": 1}, {"debug": True}]
    other += [{"disabled_passes": ("a",)}, {"freeze_rate": 0.8}, {"max_gradient_error": 0.001}]
    other += [{"recompute": "blocks"}, {"recompute": "blocks", "recompute_share": 0.5}]
    assert {dataclasses.replace(base, **change).fingerprint() for change in same} == {base.fingerprint()}
    prints = {dataclasses.replace(base, **change).fingerprint() for change in other}
    assert len(prints) == len(other) and base.fingerprint() not in prints


def test_numbers_of_any_type_are_floats():
    half = Fraction(1, 2)
    config = Config(freeze_rate=half, recompute_price=half, recompute="blocks", recompute_share=half)
    assert config.fingerprint() == Config(freeze_rate=0.5, recompute_price=0.5, recompute="blocks",
                                          recompute_share=0.5).fingerprint()  # fmt: skip


def test_fingerprint_is_the_same_in_another_process():
    code = "from slimfit_fx.config import Config; print(Config(codecs={'float': 'int4'}).fingerprint())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == Config(codecs={"float": "int4"}).fingerprint()


# ---- errors


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        (
            {"preset": "balance"},
            ValueError,
            r"preset must be one of \['balanced', .*, got 'balance' \(did you mean 'bal",
        ),
        ({"preset": None}, TypeError, r"preset must be a string, one of \['balanced', .*got None"),
        ({"freeze_rate": 1.0}, ValueError, r"freeze_rate must be in \[0, 1\), got 1.0$"),
        ({"freeze_rate": -0.1}, ValueError, r"freeze_rate must be in \[0, 1\), got -0.1$"),
        ({"freeze_rate": 90}, ValueError, r"got 90 \(a share, not a percentage: did you mean 0.9\?\)"),
        ({"freeze_rate": float("nan")}, ValueError, "got nan"),
        ({"freeze_rate": "0.9"}, TypeError, "freeze_rate must be a number .*, got '0.9'"),
        ({"freeze_rate": True}, TypeError, "freeze_rate must be a number .*, got True"),
        ({"scheduler": "isl"}, ValueError, r"scheduler must be one of .*got 'isl' \(did you mean 'ils'\?\)"),
        ({"scheduler": UnitInfo}, TypeError, "scheduler must be a name, a Scheduler or a subclass of it, got <class"),
        ({"codecs": "int8"}, TypeError, "codecs must be None or a mapping from kind to codec name, got 'int8'"),
        (
            {"codecs": {"gelu": "int8"}},
            ValueError,
            r"codecs: the kind must be one of .*got 'gelu' \(did you mean 'gelu_i",
        ),
        ({"codecs": {"float": "int9"}}, ValueError, r"codecs\['float'\] must be one of .*got 'int9' .*or None to keep"),
        ({"codecs": {"float": 8}}, TypeError, r"codecs\['float'\] must be None or a codec name, got 8"),
        (
            {"preset": "exact", "codecs": {"float": "int8"}},
            ValueError,
            "must be lossless under preset 'exact', got 'int8'",
        ),
        ({"units": 3}, TypeError, "units must be None, a predicate .*, got 3"),
        ({"units": []}, ValueError, r"units must name at least one parameter, got \(\)"),
        ({"executor": "eager"}, ValueError, r"executor must be one of \['inductor', 'interpreter'\], got 'eager'"),
        ({"executor": None}, TypeError, "executor must be a string, .*got None"),
        ({"distance": "norm"}, ValueError, "distance must be one of .*got 'norm'"),
        ({"catch_up": -0.5}, ValueError, r"catch_up must be in \[0, 1\] .*got -0.5"),
        ({"catch_up": float("nan")}, ValueError, r"catch_up must be in \[0, 1\] .*got nan"),
        ({"catch_up": "sqrt"}, TypeError, r"catch_up must be a number in \[0, 1\], got 'sqrt'"),
        ({"moments": "step"}, ValueError, "moments must be one of .*got 'step'"),
        ({"moments": None}, TypeError, "moments must be a string, .*got None"),
        ({"seed": 0.5}, TypeError, "seed must be an integer >= 0, got 0.5"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"min_bytes": True}, TypeError, "min_bytes must be an integer >= 0, got True"),
        ({"distance_sample": 0}, ValueError, "distance_sample must be >= 1, got 0: use None to measure dist"),
        ({"distance_sample": 0.1}, TypeError, "distance_sample must be None or an integer >= 1, got 0.1"),
        ({"distance_sample": True}, TypeError, "distance_sample must be None or an integer >= 1, got True"),
        ({"dynamic": "auto"}, TypeError, "dynamic must be None, True or False, got 'auto'"),
        ({"compile_eval": 1}, TypeError, "compile_eval must be True or False, got 1"),
        ({"debug": None}, TypeError, "debug must be True or False, got None"),
        ({"strict": "yes"}, TypeError, "strict must be True or False, got 'yes'"),
        ({"max_gradient_error": "low"}, TypeError, "max_gradient_error must be None or a number >= 0, got 'low'"),
        ({"max_gradient_error": True}, TypeError, "max_gradient_error must be None or a number >= 0, got True"),
        ({"max_gradient_error": -0.1}, ValueError, "max_gradient_error must be a finite number >= 0 .*got -0.1"),
        ({"max_gradient_error": float("nan")}, ValueError, "max_gradient_error must be a finite number >= 0 .*got nan"),
        ({"disabled_passes": "sink"}, TypeError, "disabled_passes must be a tuple of pass names, got 'sink'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings(setting, error, match):
    with pytest.raises(error, match=match):
        Config(**setting)


def test_all_problems_in_one_error():
    with pytest.raises(ValueError) as info:
        Config(
            *("ballanced", 2, "x", {"a": "b"}), executor="y", seed="z", max_gradient_error=-1
        )  # preset, freeze_rate, scheduler, codecs
    lines = str(info.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("preset", "freeze_rate", "scheduler"),
        *("codecs:", "codecs['a']", "executor", "seed", "max_gradient_error"),
    ]
    with pytest.raises(TypeError, match=r"(?s)strict must .*seed must"):
        Config(seed="z", strict=0)  # type: ignore[arg-type]


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'gelu_inputs' \(did you mean 'gelu_input'\?\)"):
        Config().codec_for("gelu_inputs")
