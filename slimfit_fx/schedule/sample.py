"""Which elements of a tensor its distance is measured on: a fixed sample, evenly spaced, in short runs.

::

    weight (768, 768), 65,536 wanted  ->  elements 0 to 15, 176 to 191, 352 to 367, ... of the flattened tensor:
                                          3,352 runs of 16, 53,632 of 589,824 elements

A run of 16 is read about as fast as one element, since memory comes in lines of 64 bytes. The spacing is a multiple
of the run by a number that has no divisor in common with any dimension, so that the sample meets all rows and all
columns equally often. It depends on nothing but the number of elements: every step, every rank and every resumed run
samples alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RUN = 16
_LEAST_RUNS = 64
"""A sample of fewer is made of single elements: neighbours tell less than elements from all over the tensor."""


@dataclass(frozen=True)
class Sample:
    """Elements k * ``spacing`` to k * ``spacing`` + ``run`` - 1 of a flattened tensor of ``whole`` elements, for all k.

    ``run`` equal to ``spacing`` is all of them. Only whole runs count: what the end of the tensor cuts off is left out.
    """

    whole: int
    run: int
    spacing: int

    @classmethod
    def of(cls, whole: int, most: int | None) -> Sample:
        """Return the sample of at most ``most`` out of ``whole`` elements; ``most`` None: of all."""
        if most is None or whole <= most:
            return cls(whole, 1, 1)
        run = _RUN if most >= _RUN * _LEAST_RUNS else 1
        factor = -(-whole // (most // run * run))
        while math.gcd(factor, whole) > 1:
            factor += 1
        return cls(whole, run, run * factor)

    @property
    def everything(self) -> bool:
        """Whether no element is left out."""
        return self.run == self.spacing

    @property
    def numel(self) -> int:
        """How many elements are in the sample."""
        return self.whole if self.everything else self.run * self._runs_before(self.whole)

    def take(self, tensor: Tensor, *, offset: int = 0) -> Tensor:
        """Return the elements of ``tensor`` that are in the sample; all of them: the tensor as it is.

        A tensor without gaps (contiguous, transposed, channels_last) is read in the order of its memory, as a view;
        any other is flattened first. ``offset``: ``tensor`` is a piece of the whole, from that element on. A run that
        an end of the piece cuts is a copy, with the rest of the sample behind or before it.

        Returns:
            Shape (runs, ``run``), or 1-dim where runs are single elements or cut.
        """
        if self.everything:
            return tensor
        flat, end = _flat(tensor), offset + tensor.numel()
        first, last = -(-offset // self.spacing), self._runs_before(end)
        whole_runs = _runs(flat, first * self.spacing - offset, last - first, self.run, self.spacing)
        cut = (self._cut(flat, first - 1, offset), self._cut(flat, last, offset))
        if not cut[0].numel() and not cut[1].numel():
            return whole_runs if self.run > 1 else whole_runs.reshape(-1)
        if last < first:  # both ends of the piece lie in one run
            return cut[1]
        return torch.cat([cut[0], whole_runs.reshape(-1), cut[1]])

    def _runs_before(self, end: int) -> int:
        """How many runs end at element ``end`` or before."""
        return max(0, (end - self.run) // self.spacing + 1)

    def _cut(self, flat: Tensor, run: int, offset: int) -> Tensor:
        """The elements of run number ``run`` in the piece that begins at ``offset``; none if there is no such run."""
        if not 0 <= run < self._runs_before(self.whole):
            return flat[:0]
        begin = run * self.spacing - offset
        return flat[max(begin, 0) : max(begin + self.run, 0)]


def _runs(flat: Tensor, begin: int, count: int, run: int, spacing: int) -> Tensor:
    if count <= 0:
        return flat[:0].view(0, run)
    step = flat.stride(0)  # 2 if every other element was taken of a larger tensor
    return flat.as_strided((count, run), (spacing * step, step), flat.storage_offset() + begin * step)


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
