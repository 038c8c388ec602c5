"""How long a step takes, from what its generated code does: the roofline of the device.

A dry run (dry_run.py) writes down, for every kernel and operator, the floating-point operations and the bytes that it
reads and writes. Each takes the longer of ``flops / peak`` and ``bytes / bandwidth``; a step is their sum. That is an
expectation to rank plans by, not a promise: caches, launch costs and kernels that reach a part of the peak only are
left out. The two rates are measured once for each device and kept beside Inductor's cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from slimfit_fx.graph import ops
from slimfit_fx.graph.joint import hint

_ROUNDS = 5
_SIZES = {"cpu": (1024, 1 << 26), "cuda": (4096, 1 << 27)}
"""Rows of the matrices, and bytes that are copied: on a GPU so many that starting a kernel takes little beside it."""


@dataclass(frozen=True)
class Work:
    """What one kernel does. ``gate``: that inside whose branch it runs, if it does."""

    flops: float
    nbytes: int
    dtype: str
    gates: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Roofline:
    """Rates of one device: operations per second by dtype, bytes per second."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: float

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes at least."""
        peak = self.flops_per_s.get(work.dtype) or max(self.flops_per_s.values())
        return max(work.flops / peak, work.nbytes / self.bytes_per_s)

    def step_ms(self, work: Sequence[Work], open_gates: Collection[int]) -> float:
        """Milliseconds of a step with these gates open."""
        chosen = frozenset(open_gates)
        return 1e3 * sum(self.seconds(w) for w in work if not w.gates or w.gates & chosen)

    def expected_ms(self, work: Sequence[Work], open_share: float) -> float:
        """Milliseconds of a step in which each gate is open with this probability."""
        chances = (1.0 - (1.0 - open_share) ** len(w.gates) if w.gates else 1.0 for w in work)
        return 1e3 * sum(self.seconds(w) * chance for w, chance in zip(work, chances, strict=True))


def operator_flops(name: str, func: Any, args: Sequence[Any], result_shape: Sequence[int] | None) -> float:
    """Operations of a call, by torch's own formulas; 0 for what has none. Tensors among ``args`` come as shapes."""
    packet = getattr(func, "overloadpacket", None) or getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    try:
        if packet in flop_registry:
            result = None if result_shape is None else torch.Size(result_shape)
            return float(flop_registry[packet](*args, out_val=result))
        if "scaled_dot_product" in name:
            if "backward" in name:
                return float(sdpa_backward_flop_count(args[0], args[1], args[2], args[3]))
            return float(sdpa_flop_count(args[0], args[1], args[2]))
    except (AssertionError, TypeError, ValueError, IndexError):  # an operator called in a way its formula does not know
        return 0.0
    return 0.0


def node_flops(node: fx.Node) -> float:
    """Operations of a product, a convolution or attention in a graph; 0 for anything else."""
    val = node.meta.get("val")
    if node.op != "call_function" or val is None:
        return 0.0
    args = [_shape(arg) for arg in node.args]
    return operator_flops(str(node.target), node.target, args, _shape(node) if ops.is_tensor(node) else None)


def _shape(arg: Any) -> Any:
    if isinstance(arg, fx.Node) and ops.is_tensor(arg):
        return tuple(hint(size) for size in arg.meta["val"].shape)
    return arg


def roofline_of(device: torch.device) -> Roofline:
    """The rates of ``device``: measured the first time, then read from beside Inductor's cache."""
    from slimfit_fx.planning.store import kept_path, save_json

    path = kept_path(_name(device))
    try:
        kept = json.loads(path.read_text())
        return Roofline(dict(kept["flops_per_s"]), float(kept["bytes_per_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        found = measure(device)
    save_json(path, {"flops_per_s": dict(found.flops_per_s), "bytes_per_s": found.bytes_per_s})
    return found


def measure(device: torch.device) -> Roofline:
    """Time a matrix product in fp32 and bf16, and a copy; the best of a few rounds each.

    Also in the middle of a trace: no mode and no autograd is at work.
    """
    flops, (rows, stream_bytes) = {}, _sizes_of(device)
    with _disable_current_modes(), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(rows, rows, device=device, dtype=dtype)
            out = torch.empty_like(a)
            seconds = _best(lambda a=a, out=out: torch.mm(a, a, out=out), device)  # type: ignore[misc]
            flops[str(dtype).removeprefix("torch.")] = 2.0 * rows**3 / seconds
        source = torch.zeros(stream_bytes // 4, device=device)
        target = torch.empty_like(source)
        return Roofline(flops, 2.0 * stream_bytes / _best(lambda: target.copy_(source), device))


def _sizes_of(device: torch.device) -> tuple[int, int]:
    return _SIZES["cpu" if device.type == "cpu" else "cuda"]


def _best(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_ROUNDS + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    """Names all that rates depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{torch.get_num_threads()}-threads"
    name += f"-{torch.get_float32_matmul_precision()}-{torch.__version__}-{_sizes_of(device)[0]}"
    return "roofline-" + "".join(c if c.isalnum() else "-" for c in name)
