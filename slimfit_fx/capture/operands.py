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

So it is with their results, and with operators of ours that hand on what they are given (fallbacks.py). What a graph is
given from outside, and what other operators give that are not compiled, is asked at each call as before. So is all of a
block or branch whose sizes are not plain numbers.

Nor does a block or branch choose its device once more, if its caller has chosen it::

    with torch.cuda._DeviceGuard(0):                          |  if True:  # device 0 is chosen
        torch.cuda.set_device(0)                              |      buf0 = ...
        buf0 = ...                                            |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

from slimfit_fx.capture.fallbacks import HAND_ON, WRITES_GHOST


@contextlib.contextmanager
def checked_when_written() -> Iterator[None]:
    """Hold this while Inductor writes code.

    Raises (the compile within):
        RuntimeError: a block or branch is called with another layout than it was compiled for, or gives another than
            its caller takes it to; or it is called from another device.
    """
    from torch._inductor import ir
    from torch._inductor.codegen import wrapper as codegen
    from torch._inductor.virtualized import V

    write_block = codegen.PythonWrapperCodegen.codegen_invoke_subgraph
    write_branches = codegen.PythonWrapperCodegen.codegen_conditional
    ask_operands = codegen.SubgraphPythonWrapperCodegen.codegen_input_size_asserts
    ask_size, ask_alignment = ir.MultiOutput.codegen_size_asserts, ir.MultiOutput.codegen_alignment_asserts
    enter_device = codegen.EnterDeviceContextManagerLine.codegen
    chosen = _ChosenDevices()

    def block(wrapper: Any, call: Any) -> None:
        with chosen.by(call, [call.subgraph]):
            write_block(wrapper, call)
        _check(call, [call.subgraph], call.inputs)

    def branches(wrapper: Any, call: Any) -> None:
        subgraphs = [call.true_subgraph, call.false_subgraph]
        with chosen.by(call, subgraphs):
            write_branches(wrapper, call)
        _check(call, subgraphs, call.operands)

    def operands(wrapper: Any) -> None:
        if not _is_static(V.graph.graph_inputs.values()):
            ask_operands(wrapper)

    def size(result: Any, wrapper: Any) -> None:
        if not _is_known_when_written(result):
            ask_size(result, wrapper)

    def alignment(result: Any, wrapper: Any) -> None:
        if not _is_known_when_written(result):
            ask_alignment(result, wrapper)

    def enter(line: Any, code: Any) -> None:
        is_inner = isinstance(V.graph.wrapper_code, codegen.SubgraphPythonWrapperCodegen)
        if is_inner and chosen.index == line.device_idx:
            code.writeline(f"if True:  # device {line.device_idx} is chosen")
            code.do_indent()
        else:
            enter_device(line, code)

    with (
        mock.patch.object(codegen.PythonWrapperCodegen, "codegen_invoke_subgraph", block),
        mock.patch.object(codegen.PythonWrapperCodegen, "codegen_conditional", branches),
        mock.patch.object(codegen.SubgraphPythonWrapperCodegen, "codegen_input_size_asserts", operands),
        mock.patch.object(codegen.EnterDeviceContextManagerLine, "codegen", enter),
        mock.patch.object(ir.MultiOutput, "codegen_size_asserts", size),
        mock.patch.object(ir.MultiOutput, "codegen_alignment_asserts", alignment),
    ):
        yield


class _ChosenDevices:
    """On which GPU blocks and branches are called. Inductor chooses the device of a call before it writes the call.

    One that is called from several devices is refused: it would start kernels on the first one's.
    """

    def __init__(self) -> None:
        self.index: int | None = None
        """Of the GPU that who calls what is being written has chosen; None for a CPU."""
        self._of: dict[str, int | None] = {}

    @contextlib.contextmanager
    def by(self, call: Any, subgraphs: Sequence[Any]) -> Iterator[None]:
        """Hold this while ``call`` is written; each subgraph is written with its first call.

        Raises:
            RuntimeError: a subgraph was written for another device.
        """
        device = call.get_device()
        index = device.index if device is not None and device.type == "cuda" else None
        for subgraph in subgraphs:
            first = self._of.setdefault(subgraph.graph.name, index)
            if first != index:
                raise RuntimeError(f"slimfit_fx: {subgraph.name} is called on GPU {index} and was written for {first}")
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


def _is_known_when_written(result: Any) -> bool:
    """Whether an operator of ours without code (fallbacks.py) gives ``result``, in the layout that it should have."""
    (call,) = result.inputs
    name = getattr(call, "python_kernel_name", None)
    hands_on = name in HAND_ON and _is_static([result]) and _layout(result) == _layout(call.inputs[0])
    return hands_on or name == WRITES_GHOST


def _check(call: Any, subgraphs: Sequence[Any], given: Sequence[Any]) -> None:
    """Hold what a caller gives and takes against what the functions of ``subgraphs`` were compiled for and give.

    Results that are as expected from each of them are not asked again.
    """
    known = {id(result) for result in call.outputs}
    for subgraph in subgraphs:
        expected = list(subgraph.graph.graph_inputs.values())
        if not _is_static(expected):
            return
        for place, (mine, its) in enumerate(zip(given, expected, strict=True)):
            _compare(f"operand {place}", subgraph, mine, its)
        for place, (mine, its) in enumerate(zip(call.outputs, subgraph.graph.graph_outputs, strict=True)):
            if _is_static([mine, its]):  # branches of the user's own may give results of different sizes
                _compare(f"result {place}", subgraph, mine, its)
            if not _is_static([mine, its]) or None in (_layout(mine), _layout(its)):
                known.discard(id(mine))
    for result in call.outputs:
        if id(result) in known and hasattr(result, "skip_size_stride_alignment_checks"):
            result.skip_size_stride_alignment_checks = True


def _compare(what: str, subgraph: Any, mine: Any, its: Any) -> None:
    if _layout(mine) != _layout(its) and None not in (_layout(mine), _layout(its)):
        raise RuntimeError(
            f"slimfit_fx: {what} of {subgraph.name} is {_layout(its)} (sizes, strides) there and {_layout(mine)} "
            "where it is called"
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
