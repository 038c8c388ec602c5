"""A model on the meta device, as it would be on the CPU: on fake tensors, which have a device but no memory.

Inductor's graph passes replace every result on the meta device by an empty tensor
(torch/_inductor/fx_passes/joint_graph.py, ``remove_no_ops``), so nothing can be planned there; operators also choose
their kernels by device.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only


@contextlib.contextmanager
def off_meta(model: nn.Module, args: Any, kwargs: Any, *, always: bool = False) -> Iterator[tuple[nn.Module, Any, Any]]:
    """Yield (model, args, kwargs) fit for capture: as they are, or as fake CPU tensors where any of them is on meta.

    ``always``: as fake tensors in any case; those that are not on meta keep their device.

    The model itself is not touched: the copy shares nothing but its code. Tied parameters stay tied. The context must
    stay open while the copy is captured.
    """
    state = list(itertools.chain(model.parameters(), model.buffers()))
    if not always and not any(isinstance(t, Tensor) and t.is_meta for t in (*state, *tree_leaves((args, kwargs)))):
        yield model, args, kwargs
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = copy.deepcopy(model, {id(t): _fake(mode, t) for t in state})
    args, kwargs = tree_map_only(Tensor, lambda t: _fake(mode, t), (args, kwargs))
    with mode:
        yield copied, args, kwargs


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)
