"""Our operators are what they are from the first graph of a process on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimfit_fx.capture.fallbacks import register_fallbacks

TWICE = """
import slimfit_fx
from slimfit_fx.config import Config
from test_peak import Encoder, encoder_batch
config = Config(preset="balanced", freeze_rate=0.6, recompute="blocks")
print(*(slimfit_fx.plan(Encoder(), *encoder_batch(), config=config, peak=True).peak.worst_bytes for _ in range(2)))
"""


def test_every_operator_is_registered_with_its_layout():
    import torch
    from torch._inductor.lowering import constrain_to_fake_tensors, lowerings, maybe_layout_constraints

    register_fallbacks()
    namespace = "slimfit_fx::"
    defined = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(namespace)}
    assert defined
    for name in defined:
        op = getattr(torch.ops.slimfit_fx, name.removeprefix(namespace)).default
        assert op in lowerings and maybe_layout_constraints(op) is constrain_to_fake_tensors, name


@pytest.mark.thorough
@pytest.mark.inductor
def test_the_first_plan_of_a_process_equals_the_second():
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    ran = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    first, second = map(int, ran.stdout.split())
    assert first == second > 0


@pytest.mark.inductor
def test_what_computes_nothing_is_no_call_in_the_code():
    import torch
    from reference import optimized, step
    from small_models import Tiny, tokens

    with torch._functorch.config.patch(enable_autograd_cache=False):
        model, session = optimized(Tiny(depth=1), preset="balanced", executor="inductor", freeze_rate=0.5)
        step(model, model, tokens())
    sources = [code.source for graph in session.backend.graphs for code in graph.codes]
    called = set(re.findall(r"= torch\.ops\.slimfit_fx\.(\w+)", "".join(sources)))
    assert sources and called <= {"stash"}
    assert "reinterpret_tensor(empty_strided_cpu((0, ), " in "".join(sources), "closed units have ghosts for gradients"
