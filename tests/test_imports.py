"""Importing the package is cheap and pulls in none of the libraries that it works with."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = ("transformers", "accelerate", "datasets", "peft", "lightning", "sklearn", "matplotlib")


def in_a_process(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_import_takes_little_time_and_no_other_library():
    """The time is the best of three, which are not all taken if the first is short enough."""
    times: list[float] = []
    while len(times) < 3 and min(times, default=1.0) >= 0.3:
        found = in_a_process(
            "import time, sys, torch; begin = time.perf_counter(); import slimfit_fx\n"
            "print(time.perf_counter() - begin)\n"
            "import slimfit_fx.integrations, slimfit_fx.session\n"
            f"print([m for m in {OPTIONAL} if m in sys.modules], callable(slimfit_fx.session))"
        )
        took, rest = found.split("\n", 1)
        assert rest == "[] True\n", rest
        times.append(float(took))
    assert min(times) < 0.3, times


def test_every_public_name_is_there():
    import slimfit_fx
    import slimfit_fx.integrations as integrations

    for module in (slimfit_fx, integrations):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in module.__all__)
        with pytest.raises(AttributeError, match="no attribute 'optimise'"):
            _ = module.optimise


def test_a_missing_library_is_named_with_its_extra():
    found = in_a_process(
        "import sys; sys.modules['lightning'] = None; sys.modules['transformers'] = None\n"
        "import slimfit_fx.integrations as integrations\n"
        "for name in ('SlimFitLightning', 'SlimFitCallback'):\n"
        "    try: getattr(integrations, name)\n"
        "    except ImportError as error: print(error)"
    )
    assert "pip install 'slimfit-fx[lightning]'" in found and "pip install 'slimfit-fx[hf]'" in found


def test_the_interpreter_needs_nothing_that_others_loaded():
    """Some of Inductor's decompositions name a module that they do not import."""
    found = in_a_process(
        "import torch, slimfit_fx; from torch import nn\n"
        "parts = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(196, 2)\n"
        "model = slimfit_fx.optimize(nn.Sequential(*parts), executor='interpreter', strict=True)\n"
        "model(torch.randn(2, 3, 16, 16)).sum().backward()\n"
        "print(slimfit_fx.session(model).compiles)"
    )
    assert found.split() == ["1"]
