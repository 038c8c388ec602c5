"""The part of a parameter that its distance is measured on, on this rank.

::

    weight (768, 768), whole      ->  elements 0 to 15, 176 to 191, 352 to 367, ...
    rows 384 to 767 of it (FSDP)  ->  those of the same elements that lie in these rows
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimfit_fx.runtime.bindings import is_sharded
from slimfit_fx.schedule import Sample


def sampled_part(param: Any, most: int | None) -> Tensor:
    """Return the elements of ``param`` that are compared, at most ``most`` of the whole: a view, where one can be.

    A shard that is no run of the flattened parameter (cut along another dimension than the first, or along several
    meshes) is compared whole, on all ranks alike.
    """
    tensor: Tensor = param.detach()
    if not is_sharded(param):
        return Sample.of(tensor.numel(), most).take(tensor)
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    offset = _offset_of(param)
    return local if offset is None else Sample.of(param.numel(), most).take(local, offset=offset)


def sampled_bytes(param: Any, most: int | None) -> int:
    """Return the bytes of ``sampled_part`` on all ranks together."""
    whole = is_sharded(param) and _offset_of(param) is None
    return (param.numel() if whole else Sample.of(param.numel(), most).numel) * param.element_size()


def _offset_of(param: Any) -> int | None:
    """Where this rank's shard begins in the flattened parameter; None if it is no run of it, on all ranks alike.

    ``Shard(0)`` cuts rows as ``torch.chunk`` does: ranks at the end may have fewer, or none.
    """
    from torch.distributed.tensor import Shard

    cuts = [(dim, placement) for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    if not param.is_contiguous() or len(cuts) > 1 or any(type(p) is not Shard or p.dim != 0 for _, p in cuts):
        return None
    if not cuts:
        return 0
    mesh, dim, rows = param.device_mesh, cuts[0][0], param.shape[0]
    first = mesh.get_local_rank(dim) * -(-rows // mesh.size(dim))
    return min(first, rows) * param.shape[1:].numel()
