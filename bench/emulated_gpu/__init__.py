"""A GPU whose kernels do nothing: how much memory a CUDA step takes, on a machine without a GPU.

``python -m bench.emulated_gpu COMMAND...`` runs ``python COMMAND...`` with a CUDA runtime, a driver and a cuBLAS of its
own in front of the real ones. It needs a CUDA build of torch, and a C++ compiler. What is real: PyTorch's caching
allocator and every decision that PyTorch, Inductor and Triton take for an H200 (which attention kernel, which fusions,
which workspaces); kernels are compiled, too. What is not: nothing is computed, device memory is address space that
nobody touches, the device's clock reads one millisecond. So what such a run says of memory holds for a GPU, as far as
it does not depend on values or on measured times; times, losses and gradients mean nothing.

cuDNN is not emulated: convolutions, and attention in half precision, take other kernels, whose temporaries may differ.
What is read back from the device is zeros, and "true" where it is one byte: masks hide nothing, numbers are finite.
Figures that were found out this way are called *emulated* and stand in tables of their own. Those of eager training
equal the measured ones of an H200, nearly all to the byte (docs/results.md tells how many).
"""

from __future__ import annotations

import functools
import os

from slimfit_fx.planning import roofline
from slimfit_fx.planning.roofline import Roofline

VARIABLE = "SLIMFIT_FX_EMULATED_GPU"

_RATES = Roofline({"float32": 4e14, "bfloat16": 8e14}, 4e12)
"""An H200's: about four fifths of what its data sheet says of TF32, of bf16 and of memory. Plans go by them."""


def is_active() -> bool:
    """Whether this process runs on the emulated GPU."""
    return os.environ.get(VARIABLE) == "1"


def how_on_gpu() -> str:
    """Return how figures of a GPU are found out here: measured or emulated."""
    return "emulated" if is_active() else "measured"


def kind_of(device: str) -> str:
    """Return the name that files of results have for this device: cpu, cuda or emulated."""
    kind = device.partition(":")[0]
    return "emulated" if kind == "cuda" and is_active() else kind


@functools.cache
def prepare() -> None:
    """Switch off what is not emulated, and tell the rates that no clock here can. To be called before anything runs."""
    import torch

    timed = roofline.measure
    roofline.measure = lambda device: _RATES if device.type == "cuda" else timed(device)
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
