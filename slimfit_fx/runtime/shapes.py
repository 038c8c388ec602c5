"""Two compiles for batches of any size and length.

Dynamo compiles for the first shape, and once more, with a symbolic size, for each dimension that turns out to change. A
run whose texts have many lengths meets a smaller batch only at the end of the first epoch: a third compile. So as soon
as anything changes, the first dimension of every input is said to change as well; dynamo is free not to believe it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class ShapeWatch:
    """Looks at the inputs of training forwards."""

    def __init__(self) -> None:
        self._last: tuple[torch.Size, ...] | None = None

    def look(self, args: Any, kwargs: Any) -> None:
        """Mark the first dimension of the inputs if their shapes are not those of the last call."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        shapes = tuple(tensor.shape for tensor in tensors)
        if self._last is not None and shapes != self._last:
            for tensor in tensors:
                if not hasattr(tensor, "_dynamo_dynamic_indices"):  # else the user marked it, and it is guarded so
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        self._last = shapes
