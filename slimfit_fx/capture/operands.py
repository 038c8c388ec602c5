"""Blocks and branches get the operands that they were compiled for: checked when the code is written, not at each call.

Inductor writes one function for each block and branch, which begins by asking every operand for its sizes and strides.
A step calls hundreds of them, with up to thirty operands each, and that takes a tenth of the time in which a process
issues a backward to a GPU. But who calls them is the code around them, whose layouts are known while it is written::

    def block_0(args):                                        |  def block_0(args):
        x, w, ... = args                                      |      x, w, ... = args
        assert_size_stride(x, (32, 128, 768), (98304, 768, 1))|      buf0 = ...
        assert_size_stride(w, (768, 768), (768, 1))           |
        ...                                                   |
        buf0 = ...                                            |

What a graph is given from outside, and what operators give that are not compiled, is asked at each call as before. So
is every operand of a block or branch whose sizes are not plain numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock


@contextlib.contextmanager
def checked_when_written() -> Iterator[None]:
    """Hold this while Inductor writes code.

    Raises (the compile within):
        RuntimeError: a block or branch is called with another layout than it was compiled for, or gives another than
            its caller takes it to.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen, SubgraphPythonWrapperCodegen
    from torch._inductor.virtualized import V

    write_block, write_branches = PythonWrapperCodegen.codegen_invoke_subgraph, PythonWrapperCodegen.codegen_conditional
    ask_operands = SubgraphPythonWrapperCodegen.codegen_input_size_asserts

    def block(wrapper: Any, call: Any) -> None:
        write_block(wrapper, call)
        _check(call.subgraph, call.inputs, call.outputs)

    def branches(wrapper: Any, call: Any) -> None:
        write_branches(wrapper, call)
        for subgraph in (call.true_subgraph, call.false_subgraph):
            _check(subgraph, call.operands, call.outputs)

    def operands(wrapper: Any) -> None:
        if not _is_static(V.graph.graph_inputs.values()):
            ask_operands(wrapper)

    with (
        mock.patch.object(PythonWrapperCodegen, "codegen_invoke_subgraph", block),
        mock.patch.object(PythonWrapperCodegen, "codegen_conditional", branches),
        mock.patch.object(SubgraphPythonWrapperCodegen, "codegen_input_size_asserts", operands),
    ):
        yield


def _check(subgraph: Any, given: Sequence[Any], taken: Sequence[Any]) -> None:
    """Hold what a caller gives and takes against what the function of ``subgraph`` was compiled for and gives."""
    expected = list(subgraph.graph.graph_inputs.values())
    if not _is_static(expected):
        return
    for what, ours, theirs in (("operand", given, expected), ("result", taken, subgraph.graph.graph_outputs)):
        for place, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            if what == "result" and not _is_static([mine, its]):
                continue  # branches of the user's own may give results of different sizes
            if _layout(mine) != _layout(its) and None not in (_layout(mine), _layout(its)):
                raise RuntimeError(
                    f"slimfit_fx: {what} {place} of {subgraph.name} is {_layout(its)} (sizes, strides) there and "
                    f"{_layout(mine)} where it is called"
                )


def _is_static(operands: Iterable[Any]) -> bool:
    return all(isinstance(n, int) for layout in map(_layout, operands) for part in layout or () for n in part)


def _layout(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Sizes and strides, 0 where nobody can tell them; None for what is no tensor, and for an empty one."""
    if not hasattr(value, "maybe_get_stride"):  # a number
        return None
    sizes, strides = value.maybe_get_size(), value.maybe_get_stride()
    if sizes is None or strides is None:
        return None
    sizes, strides = ([int(n) if getattr(n, "is_Integer", False) else n for n in part] for part in (sizes, strides))
    if 0 in sizes:
        return None
    return tuple(sizes), tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
