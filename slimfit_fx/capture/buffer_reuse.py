"""Inductor's buffer reuse, told what gradients behind a closed gate weigh: nothing.

Inductor keeps a dead buffer for a later one of the same size unless that would raise its own estimate of the peak
(torch/_inductor/codegen/wrapper.py, ``AllocateLine.should_reuse_buffer``). The estimate counts every weight gradient in
full, also those whose branch returns a ghost in most steps: it then believes that the peak is at the end of backward
and lets dead buffers pile up where the real peak is. It also counts in-place kernels twice. Within
``gradients_weigh_nothing`` the estimate leaves out what branches return; nothing else changes.

If a torch version has no such estimate, reuse is switched off instead: the same peak, more calls to the allocator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch._inductor.codegen.wrapper as wrapper_module
from torch import fx

from slimfit_fx.graph.joint import nbytes

_ESTIMATE = "EfficientPeakEstimate"


def can_correct_estimate() -> bool:
    """Whether this torch has the estimate that ``gradients_weigh_nothing`` corrects."""
    return hasattr(wrapper_module, _ESTIMATE)


@contextlib.contextmanager
def gradients_weigh_nothing() -> Iterator[None]:
    """Compile so that buffers are reused only where that does not raise the peak of a step with closed gates."""
    if not can_correct_estimate():
        yield
        return
    original = getattr(wrapper_module, _ESTIMATE)
    setattr(wrapper_module, _ESTIMATE, _corrected(original))
    try:
        yield
    finally:
        setattr(wrapper_module, _ESTIMATE, original)


def _corrected(original: Any) -> type:
    class PeakWithoutBranchResults(original):
        """The estimate, less the bytes that branches may return."""

        def __init__(self) -> None:
            super().__init__()
            from torch._inductor.virtualized import V

            returned = 0
            for index, node in enumerate(V.graph.scheduler.nodes):
                returned += _branch_result_bytes(node)
                if returned:
                    self.segmented_tree.update_range(index, index, -returned)
            last = len(V.graph.scheduler.nodes) - 1
            self.overall_peak_memory = self.segmented_tree.summarize_range(0, last) if last >= 0 else 0

        def peak_between(self, line_a: Any, line_b: Any) -> int:
            """Judge a pause by its own ends: an idle buffer may not make the pause heavier than what surrounds it."""
            pause = super().peak_between(line_a, line_b)
            ends = max(self._at(line_a.scheduler_node_index), self._at(line_b.scheduler_node_index))
            return int(pause + self.overall_peak_memory - ends)

        def _at(self, index: int) -> int:
            return int(self.segmented_tree.summarize_range(index, index))

    return PeakWithoutBranchResults


def _branch_result_bytes(node: Any) -> int:
    """Bytes that a scheduler node allocates for the results of a ``cond``, its own or those of a block it calls."""
    from torch._inductor import ir
    from torch._inductor.memory import compute_size_for_scheduler_buffer

    total = 0
    for buffer in node.get_outputs():
        if isinstance(buffer.node, ir.Conditional):
            total += compute_size_for_scheduler_buffer({buffer.get_name(): buffer})[buffer.get_name()][0]
        elif isinstance(buffer.node, ir.InvokeSubgraph):
            total += _block_result_bytes(buffer.node)
    return total


def _block_result_bytes(block: Any) -> int:
    """Bytes of what a block returns straight out of its branches."""
    results = block.subgraph.graph_module.graph.output_node().args[0]
    return sum(
        nbytes(node)
        for node in results
        if isinstance(node, fx.Node) and str(node.target) == "slimfit_fx.release.default"
    )
