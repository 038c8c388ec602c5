"""Memory that an operator takes for itself while it runs: measured where that is cheap, bounded where not.

Three ways, in this order:

- the call itself is measured (call_memory.py), if its tensors are affordable: 32 MiB on a CPU, where that takes time;
  on a GPU a small share of its memory;
- a smaller call is measured, for operators whose temporaries do not grow with all their sizes (``_SMALLER``): oneDNN's
  matrix products keep a block per thread, attention kernels one tile per thread and something per example,
  convolutions something per image; a GPU's attention kernels have temporaries for every head of every example;
- a formula (``_FORMULAS``; for a CPU), if nothing can be measured because the user's own profiler is active.

A GPU's plain products take nothing: cuBLAS keeps one workspace for all of them (``library_bytes``).

All of it is an upper bound: the two latter ways have a margin, where sizes do not follow from each other exactly.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from slimfit_fx.planning.blocks import TensorSpec
from slimfit_fx.planning.call_memory import CallMemory, can_measure, device_of, measure_call

log = logging.getLogger("slimfit_fx.planning")

_AFFORDABLE = 32 * 2**20
_GPU_SHARE = 64
"""On a GPU, calls of up to this part of its memory are measured."""
_HEADS = 256
"""Heads of attention that are enough to keep every multiprocessor of a GPU busy."""
_ROWS = 2048
"""oneDNN's blocks stop growing before a dimension has this size."""
_MARGIN = 1.05
_NAMESPACES = ("aten", "prims", "mkldnn", "quantized", "slimfit_fx")
"""Operators of others may have effects: they are never run to be measured."""
_PLAIN = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_HALF = (torch.bfloat16, torch.float16)
_cache: dict[Any, CallMemory | None] = {}


def call_memory(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallMemory | None:
    """The measured memory of a call in full, or None: then its results are what they seem, beside a workspace.

    Tensors are given as ``TensorSpec``. ``name`` is that of the operator, as in ``aten::mm``.
    """
    leaves = tree_flatten((args, kwargs))[0]
    specs = [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]
    if not _runs_here(name, leaves) or sum(spec.nbytes for spec in specs) > _affordable(specs) or not can_measure():
        return None
    if _is_plain_product(name, specs) and ("out" in kwargs or specs[-1].device.type == "cuda"):
        return None
    return _measured(name, func, args, kwargs)


def workspace_bytes(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Upper bound of what a call too large to be measured holds beside its results. Tensors as ``TensorSpec``."""
    leaves = tree_flatten((args, kwargs))[0]
    if not _runs_here(name, leaves) or _is_plain_product(name, [x for x in leaves if isinstance(x, TensorSpec)]):
        return 0
    on_gpu = device_of(leaves).type == "cuda"
    smaller = (_SMALLER_ON_GPU if on_gpu else _SMALLER).get(name)
    if smaller is not None and can_measure():
        return int(_MARGIN * smaller(name, func, args, kwargs))
    formula = None if on_gpu else _FORMULAS.get(name)
    return formula(*args) if formula is not None else 0


def _runs_here(name: str, leaves: Sequence[Any]) -> bool:
    """Whether the call can be measured here: on a CPU, or on a GPU that is there.

    Single numbers may lie on the CPU beside a GPU's tensors, as seed and offset of attention's dropout do.
    """
    specs = [x for x in leaves if isinstance(x, TensorSpec)]
    kinds = {x.type for x in leaves if isinstance(x, torch.device)} | {x.device.type for x in specs}
    if "cuda" in kinds:
        kinds -= {"cpu"} if all(not x.shape for x in specs if x.device.type == "cpu") else set()
    there = kinds <= {"cpu"} or (kinds == {"cuda"} and torch.cuda.is_available())
    return name.split("::")[0] in _NAMESPACES and there


def _affordable(specs: Sequence[TensorSpec]) -> int:
    device = device_of(specs)
    if device.type == "cpu":
        return _AFFORDABLE
    return int(torch.cuda.get_device_properties(device).total_memory) // _GPU_SHARE


def _is_plain_product(name: str, specs: Sequence[TensorSpec]) -> bool:
    return name in _PLAIN and (specs[-1].dtype not in _HALF or specs[-1].device.type == "cuda")


def library_bytes(device: torch.device) -> int:
    """What libraries hold on a GPU beside the step's tensors; 0 on a CPU.

    From the first product on, cuBLAS keeps a workspace for forward's thread and one for backward's
    (aten/src/ATen/cuda/CublasHandlePool.cpp; ``CUBLAS_WORKSPACE_CONFIG``, pairs of KiB and count as in
    ``:4096:2:16:8``, changes it). And whenever a kernel runs for the first time, as a unit's kernels do when it opens
    first, Inductor times its variants beside a buffer as large as the GPU's cache
    (torch/_inductor/runtime/benchmarking.py).
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if not pairs:
        pairs = [(4096, 8)] if properties.major in (9, 10) else [(4096, 2), (16, 8)]
    return 2 * sum(1024 * int(size) * int(count) for size, count in pairs) + int(properties.L2_cache_size)


def _measured(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallMemory | None:
    key = repr((name, torch.get_num_threads(), args, sorted(kwargs.items())))
    if key not in _cache:
        try:
            _cache[key] = measure_call(func, args, kwargs)
        except (RuntimeError, IndexError, ValueError, NotImplementedError):  # zeros are no legal input of it
            log.debug("%s could not be measured", name, exc_info=True)
            _cache[key] = None
    return _cache[key]


# ---- smaller calls


def _of_blocks(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """A matrix product, no dimension longer than ``_ROWS``; the batch of a batched one no larger than the threads."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        batch = [min(size, torch.get_num_threads()) for size in leaf.shape[:-2]]
        return _resized(leaf, [*batch, *(min(size, _ROWS) for size in leaf.shape[-2:])])

    found = _measured(name, func, *tree_map(cut, (args, kwargs)))
    return 0 if found is None else found.workspace_bytes


def _of_examples(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """A GPU's attention (batch, heads, length, width): some examples, and as much again for each of the others.

    Enough of them that the kernels have work for the whole device: with less they may split the keys of a head, and
    keep a temporary for each part (torch's mem_eff_attention and flash_attn).
    """
    batch, heads = args[0].shape[:2]
    few = min(batch, -(-_HEADS // max(1, heads)))

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec) or len(leaf.shape) < 3 or leaf.shape[0] != batch:
            return leaf
        return _resized(leaf, [few, *leaf.shape[1:]])

    found = _measured(name, func, *tree_map(cut, (args, kwargs)))
    return 0 if found is None else -(-found.workspace_bytes * batch // max(1, few))


def _of_images(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """A convolution: as many images as threads, or twice as many, and a straight line through the two."""
    images = [0] if name == "aten::convolution" else [0, 1]
    return _on_a_line(name, func, args, kwargs, args[0].shape[0], torch.get_num_threads(), lambda i, _: i in images)


def _of_tiles(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """A CPU's attention (batch, heads, length, width): a tile per thread, and what may be packed for every head.

    Examples enough that every thread has a head, or twice as many, and a straight line through the two.
    """
    batch, heads = args[0].shape[:2]
    least = -(-torch.get_num_threads() // max(1, heads))
    return _on_a_line(name, func, args, kwargs, batch, least, lambda _, x: len(x.shape) > 2 and x.shape[0] == batch)


def _on_a_line(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
    least: int,
    is_batched: Callable[[int, TensorSpec], bool],
) -> int:
    """The temporaries for ``batch`` examples, from those for ``least`` and for twice as many."""
    sizes = [min(batch, least * times) for times in (1, 2)]
    found = []
    for size in sizes:
        cut = [
            _resized(x, [size, *x.shape[1:]]) if isinstance(x, TensorSpec) and is_batched(i, x) else x
            for i, x in enumerate(args)
        ]
        memory = _measured(name, func, tuple(cut), kwargs)
        found.append(0 if memory is None else memory.workspace_bytes)
    growth = (found[1] - found[0]) / max(1, sizes[1] - sizes[0])
    return int(found[1] + max(0.0, growth) * (batch - sizes[1]))


def _resized(spec: TensorSpec, shape: Sequence[int]) -> TensorSpec:
    """Fewer elements in the same order of dimensions: dense, where ``spec`` is; broadcast where it is."""
    order = sorted(range(len(shape)), key=lambda d: (spec.strides[d], -d))
    strides, step = [0] * len(shape), 1
    for dimension in order:
        if spec.strides[dimension]:
            strides[dimension] = step
            step *= max(1, shape[dimension])
    return dataclasses.replace(spec, shape=tuple(shape), strides=tuple(strides), room=0)


# ---- formulas


def _product_bytes(*args: Any) -> int:
    """Copies of blocks of both operands and a block of results in fp32, per thread."""
    left, right = [a for a in args if isinstance(a, TensorSpec)][-2:]
    rows, inner, columns = (min(_ROWS, s) for s in (left.shape[-2], left.shape[-1], right.shape[-1]))
    block = left.dtype.itemsize * (rows * inner + inner * columns) + 4 * rows * columns
    return min(block, 2**21) * torch.get_num_threads()


def _convolution_bytes(value: Any, weight: Any, *_: Any) -> int:
    """The weights in another order, or the result in another order; in half precision, an image per thread as well."""
    if weight.dtype not in _HALF:
        return 2 * math.prod(weight.shape) * weight.dtype.itemsize + value.nbytes
    return int(2 * _blocked_bytes(weight) + value.nbytes + 1.25 * _image_bytes(value) * torch.get_num_threads())


def _convolution_backward_bytes(gradient: Any, value: Any, weight: Any, *_: Any) -> int:
    """Weights in blocks of channels per thread, one image per thread, and the gradient in another order."""
    threads = torch.get_num_threads()
    copies = 1 + threads if weight.dtype in _HALF else (1 + threads) / 2
    weights = _blocked_bytes(weight) * copies + 2 * weight.nbytes
    return int(weights + _image_bytes(value) * threads + gradient.nbytes)


def _blocked_bytes(weight: TensorSpec) -> int:
    """Weights (out, in, ...) in fp32, channels rounded up as oneDNN does: to 16, or 32 for tiles of half precision."""
    made, read, *kernel = weight.shape
    block = 32 if weight.dtype in _HALF else 16
    made = -(-made // 16) * 16 if weight.dtype in _HALF else made
    return 4 * made * -(-max(1, read) // block) * block * math.prod(kernel)


def _image_bytes(value: TensorSpec) -> int:
    """One image (batch, channels, ...) in fp32; in half precision its channels rounded up to 32."""
    channels = -(-value.shape[1] // 32) * 32 if value.dtype in _HALF else value.shape[1]
    return 4 * channels * math.prod(value.shape[2:])


def _attention_bytes(query: Any, key: Any, *_: Any, backward: bool = False) -> int:
    """One tile of scores per thread (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp); one more in half precision.

    Where the processor multiplies tiles of half precision, keys and values of every head are packed first.
    """
    queries, head = query.shape[-2:]
    queries_at_once = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    keys_at_once = min(key.shape[-2], 512)
    scores = queries_at_once * keys_at_once
    elements = 2 * scores + queries_at_once if backward else scores + queries_at_once * (2 + head)
    half = query.dtype in _HALF
    packed = 2 * scores + 4 * keys_at_once * (head + 32) + 4 * queries_at_once * head if half else 0
    every_head = 2 * key.nbytes if half else 0
    return (4 * elements + packed) * torch.get_num_threads() + every_head + (3 * packed if half and backward else 0)


_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
_SMALLER: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_PLAIN, _of_blocks),
    "mkldnn::_linear_pointwise": _of_blocks,
    _ATTENTION: _of_tiles,
    f"{_ATTENTION}_backward": _of_tiles,
    "aten::convolution": _of_images,
    "aten::convolution_backward": _of_images,
}
_GPU_ATTENTION = tuple(
    f"aten::_scaled_dot_product_{kind}_attention{end}"
    for kind in ("efficient", "flash", "cudnn")
    for end in ("", "_backward")
)
_SMALLER_ON_GPU: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_GPU_ATTENTION, _of_examples),
    "aten::convolution": _of_images,
    "aten::convolution_backward": _of_images,
}
_FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_PLAIN, _product_bytes),
    "mkldnn::_linear_pointwise": _product_bytes,
    _ATTENTION: _attention_bytes,
    f"{_ATTENTION}_backward": lambda _, query, key, *rest: _attention_bytes(query, key, backward=True),
    "aten::convolution": _convolution_bytes,
    "aten::convolution_backward": _convolution_backward_bytes,
}
