"""A model on the meta device, as it would be on the CPU or a GPU: on fake tensors, which have a device but no memory.

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

CPU = torch.device("cpu")


@contextlib.contextmanager
def off_meta(
    model: nn.Module, args: Any, kwargs: Any, *, always: bool = False, device: torch.device = CPU
) -> Iterator[tuple[nn.Module, Any, Any]]:
    """Yield (model, args, kwargs) fit for capture: as they are, or as fake tensors where any of them is on meta.

    ``always``: as fake tensors in any case. Those on meta become ones of ``device``, others keep theirs.

    The model itself is not touched: the copy shares nothing but its code. Tied parameters stay tied. The context must
    stay open while the copy is captured.
    """
    state = list(itertools.chain(model.parameters(), model.buffers()))
    if not always and not any(isinstance(t, Tensor) and t.is_meta for t in (*state, *tree_leaves((args, kwargs)))):
        yield model, args, kwargs
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = copy.deepcopy(model, {id(t): _fake(mode, t, device) for t in state})
    args, kwargs = tree_map_only(Tensor, lambda t: _fake(mode, t, device), (args, kwargs))
    with mode:
        yield copied, args, kwargs


def _fake(mode: FakeTensorMode, tensor: Tensor, device: torch.device) -> Tensor:
    place = device if tensor.device.type == "meta" else tensor.device
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)
