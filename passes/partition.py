"""Split the joint graph into forward and backward, with the saved set that the planner chose.

The choice is written as ``meta["recompute"]`` tags and torch's own min-cut partitioner acts on them
(torch/_functorch/partitioners.py): random state, symbolic sizes, collectives and effects stay in its care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils.checkpoint import CheckpointPolicy

from slimfit_fx.graph import ops
from slimfit_fx.planning.planner import Planning

DECISION = "slimfit_decision"


def simplify_joint(module: fx.GraphModule) -> int:
    """Drop dead code and merge common subexpressions, so that the planner sees what the partitioner will see.

    Backward recomputes what forward has (the normalised input of a LayerNorm): merged, it is one value that can be
    saved.
    """
    before = len(module.graph.nodes)
    module.graph.eliminate_dead_code()
    module.graph = fx_graph_cse(module.graph)
    module.recompile()
    return before - len(module.graph.nodes)


def tag_cut(module: fx.GraphModule, planning: Planning) -> int:
    """Write the planner's cut and decisions into ``meta``. Returns the number of tags."""
    if planning.cut is None:
        return 0
    count = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or ops.is_symbol(node):
            continue
        if node in planning.cut.saved:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            node.meta[DECISION] = planning.decisions[node]
            count += 1
        elif node in planning.cut.recomputed and not ops.is_random(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            count += 1
    return count


def split_joint(
    module: fx.GraphModule, joint_inputs: Sequence[Any], **partitioner_args: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graph modules; the recompute tags are gone from both."""
    with functorch_config.patch(cse=False):  # what is merged is simplify_joint's to say, and the planner has seen it
        forward, backward = min_cut_rematerialization_partition(module, joint_inputs, **partitioner_args)
    if isinstance(forward, _LazyGraphModule):  # torch forgets it for backward, whose code each pass would write again
        backward = _LazyGraphModule.from_graphmodule(backward)
    for graph_module in (forward, backward):
        for node in graph_module.graph.nodes:
            node.meta.pop("recompute", None)
    return forward, backward
