"""DDP's all-reduce without the gradients of closed units.

DDP writes zeros into its buckets for parameters that got no gradient, and sends them. The communication hook here sends
the gradients of open units (and of parameters that always train) only, packed into one tensor per bucket::

    bucket   [ w0 | b0 | w1 | b1 ]      w0, w1 units; w1 is closed
    sent     [ w0 | b0 | b1 ]

All ranks have the same gates, so they pack alike.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from slimfit_fx.runtime.gates import GateTable

log = logging.getLogger("slimfit_fx.runtime")


class GatedReduce:
    """State and code of the communication hook of one ``DistributedDataParallel``."""

    def __init__(self, gates: GateTable, group: dist.ProcessGroup) -> None:
        self._gates = gates
        self._group = group
        self.bytes_sent = 0
        """Bytes handed to all-reduce since the start."""
        self.bytes_full = 0
        """Bytes that DDP would have handed to it."""

    def __call__(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Average the gradients of what trains over all ranks, in place; those of closed units become zero."""
        whole = bucket.buffer()
        opened, closed = self._split(bucket)
        self.bytes_full += _nbytes([whole])
        self.bytes_sent += _nbytes(opened)
        if closed:  # zeros already, unless a unit was closed in the middle of accumulation
            torch._foreach_zero_(closed)
        if not opened:
            done: Future[Tensor] = Future()
            done.set_result(whole)
            return done
        packed = whole if not closed else torch.cat([g.reshape(-1) for g in opened])
        packed.div_(dist.get_world_size(self._group))
        work: Any = dist.all_reduce(packed, group=self._group, async_op=True)

        def unpack(future: Future[Any]) -> Tensor:
            (reduced,) = future.value()
            if closed:
                torch._foreach_copy_(
                    opened, [p.view_as(g) for p, g in zip(_parts(reduced, opened), opened, strict=True)]
                )
            return whole

        return work.get_future().then(unpack)

    def _split(self, bucket: dist.GradBucket) -> tuple[list[Tensor], list[Tensor]]:
        if bucket.buffer().is_sparse:  # an embedding with sparse gradients: never a unit
            return [bucket.buffer()], []
        opened: list[Tensor] = []
        closed: list[Tensor] = []
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._gates.unit_of(param)
            (opened if name is None or self._gates.is_open(name) else closed).append(grad)
        return opened, closed


def install(wrapper: DistributedDataParallel, gates: GateTable) -> GatedReduce | str:
    """Make ``wrapper`` send what trains only; the reason, if it cannot be done."""
    if wrapper._comm_hooks:
        return "it has a communication hook of its own"
    reduce = GatedReduce(gates, wrapper.process_group)
    wrapper.register_comm_hook(None, lambda _, bucket: reduce(bucket))
    return reduce


def _parts(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    return list(flat.split([g.numel() for g in like]))


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
