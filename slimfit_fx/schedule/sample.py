"""Which elements of a tensor its distance is measured on: a fixed sample, evenly spaced.

::

    weight (768, 768), 65,536 wanted  ->  elements 0, 11, 22, ... of the flattened tensor: 53,620 of 589,824

The stride has no divisor in common with any dimension, so that the sample meets all rows and all columns equally often.
It depends on nothing but the number of elements: every step, every rank and every resumed run samples alike.
"""

from __future__ import annotations

import math

from torch import Tensor


def sample_stride(numel: int, most: int | None) -> int:
    """Return the spacing of a sample of at most ``most`` out of ``numel`` elements; 1 is all of them (``most`` None).

    The smallest one that is coprime to ``numel``.
    """
    if most is None or numel <= most:
        return 1
    stride = -(-numel // most)
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def sample_numel(numel: int, most: int | None) -> int:
    """Return how many of ``numel`` elements are in the sample."""
    return -(-numel // sample_stride(numel, most))


def take_sample(tensor: Tensor, stride: int, *, offset: int = 0) -> Tensor:
    """Return elements 0, ``stride``, 2 * ``stride``, ... of the flattened tensor, 1-dim; for 1 the tensor as it is.

    A tensor without gaps (contiguous, transposed, channels_last) is read in the order of its memory, as a view; any
    other is flattened first. ``offset``: ``tensor`` is a piece of a larger one, from that element on, and the
    elements are those of the larger one's sample.
    """
    if stride == 1:
        return tensor
    return _flat(tensor)[-offset % stride :: stride]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)) if _is_dense(tensor) else tensor.reshape(-1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each place once."""
    filled = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != filled:
            return False
        filled *= size
    return True
