"""What time is worth: milliseconds of an operator by the roofline, and the bytes that a millisecond must save.

Both sides of the planner's minimum cut are bytes: those that a saved value holds, and what running an operator again or
storing a value in fewer bytes takes of the device's time. The rate between the two is that of moving memory: computing
a value again pays if it saves more than a 250th of what the device moves in that time.

The roofline is measured (roofline.py), so it is noisy; plans are not: its rates are rounded to powers of two first.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass

import torch
from torch import fx

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import hint, nbytes
from slimfit_fx.planning.roofline import Roofline, Work, roofline_of

log = logging.getLogger("slimfit_fx.planning")

BYTES_PER_BYTE_MOVED = 0.004
"""How many bytes must be saved for the time in which the device moves one."""

_PASSES = {"pointwise": 1.0, "transcendental": 2.0, "reduction": 1.0, "rearrange": 5.0}
"""How many times an operator of this sort moves its bytes. Pointwise work is fused with its reader and moves them once;
a copy in another order stands alone, and reads and writes out of step."""
_TRANSCENDENTAL = {"erf", "exp", "tanh", "sigmoid", "log", "gelu", "silu", "pow", "sin", "cos"}

REFERENCE = Roofline({"float32": 2.0**36, "bfloat16": 2.0**36}, 2.0**34)
"""Of a device that nobody measured: four operations for each byte it moves, as one core of a server comes to."""


def prices_of(device: torch.device) -> Prices:
    """The prices of ``device``; those of the reference if its rates cannot be measured."""
    planned_for = torch.device("cpu") if device.type == "meta" else device
    return _measured(planned_for, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _measured(device: torch.device, threads: int, precision: str) -> Prices:
    try:
        return Prices(rounded(roofline_of(device)))
    except (RuntimeError, ZeroDivisionError):
        log.warning("the rates of %s could not be measured; a reference's are taken", device, exc_info=True)
        return Prices()


def rounded(roofline: Roofline) -> Roofline:
    """``roofline`` with its bandwidth, and operations per byte moved, at powers of two: the same from run to run."""
    bandwidth = _power_of_two(roofline.bytes_per_s)
    balance = {dtype: _power_of_two(rate / roofline.bytes_per_s) for dtype, rate in roofline.flops_per_s.items()}
    return Roofline({dtype: per_byte * bandwidth for dtype, per_byte in balance.items()}, bandwidth)


def _power_of_two(number: float) -> float:
    return 2.0 ** round(math.log2(number))


@dataclass(frozen=True)
class Prices:
    """Prices of one device, by its (rounded) roofline."""

    roofline: Roofline = REFERENCE

    def bytes_for(self, milliseconds: float) -> float:
        """The bytes that must be saved for so much time."""
        return BYTES_PER_BYTE_MOVED * self.roofline.bytes_per_s * milliseconds / 1e3

    def traffic_ms(self, size: float) -> float:
        """Milliseconds in which the device moves ``size`` bytes."""
        return 1e3 * size / self.roofline.bytes_per_s

    def operator_ms(self, node: fx.Node) -> float:
        """Milliseconds that ``node`` takes if it runs once more, fused with what reads it if it can be."""
        if ops.is_matrix_product(node):
            flops = 2.0 * hint(node.meta["val"].numel()) * inner_size(node)
            return 1e3 * self.roofline.seconds(Work(flops, 0, str(node.meta["val"].dtype).removeprefix("torch.")))
        size = nbytes(node)
        if ops.is_reduction(node):
            size = max([size, *(nbytes(i) for i in node.all_input_nodes)])
        return self.traffic_ms(_PASSES[_sort_of(node)] * size)


def inner_size(product: fx.Node) -> int:
    """Over how many elements each sum of a matrix product runs."""
    last = [i for i in product.all_input_nodes if ops.is_tensor(i)][-1].meta["val"]
    return hint(last.shape[0 if last.dim() == 2 else -2])


def _sort_of(node: fx.Node) -> str:
    if ops.is_reduction(node):
        return "reduction"
    if ops.op_name(node) in _TRANSCENDENTAL:
        return "transcendental"
    return "pointwise" if ops.is_pointwise(node) else "rearrange"
