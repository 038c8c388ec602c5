"""Graphs for tests of passes: written by hand or taken out of a real compile, and how to run them."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest
import torch
from reference import equal_bits, loss_of, optimized
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from slimfit_fx.capture.partitioner import settings_of
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.passes import pipeline
from slimfit_fx.passes.pipeline import Pass, Work
from slimfit_fx.passes.saved import Seam
from slimfit_fx.passes.templates import run_fake

ATEN = torch.ops.aten


class Sketch:
    """A graph written by hand; every node gets its example value at once, as AOTAutograd gives it."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, symbolic: bool = False) -> fx.Node:
        """A placeholder; ``symbolic`` makes its first size a symbol."""
        node = self.graph.placeholder(name)
        kinds = [DimDynamic.DYNAMIC if symbolic and not d else DimDynamic.STATIC for d in range(len(shape))]
        node.meta["val"] = self.mode.from_tensor(
            torch.empty(shape, dtype=dtype), symbolic_context=StatelessSymbolicContext(kinds)
        )
        return node

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = run_fake(self.mode, node)
        return node

    def returns(self, *results: fx.Node | None) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule({}, self.graph)


def names(nodes: Collection[fx.Node]) -> set[str]:
    return {node.name for node in nodes}


def order(module: fx.GraphModule) -> list[str]:
    """Names of what is called, as it runs."""
    return [n.name for n in module.graph.nodes if n.op == "call_function"]


def calls(graph: fx.Graph, op: Callable[..., Any]) -> list[fx.Node]:
    """The calls of one operator, in order."""
    return graph.find_nodes(op="call_function", target=op)


def values(graph: fx.Graph, *, seed: int = 0, closed: Collection[str] = ()) -> list[Tensor]:
    """Real values for the placeholders of ``graph``. Bools are gates, open but for those whose names are ``closed``."""
    return [
        torch.tensor(n.name not in closed) if n.meta["val"].dtype is torch.bool else value_of(n, seed)
        for n in graph.find_nodes(op="placeholder")
    ]


def value_of(node: fx.Node, seed: int = 0) -> Tensor:
    """A random value for a placeholder: equal for equal names."""
    val, generator = node.meta["val"], torch.Generator().manual_seed(zlib.crc32(node.name.encode()) + seed)
    if not val.dtype.is_floating_point:
        return torch.randint(2, tuple(val.shape), generator=generator, dtype=val.dtype)
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).normal_(generator=generator)


def run_joint(joint: JointGraph, *, seed: int = 0) -> list[Tensor | None]:
    """User outputs, then gradients, of one step on random inputs and tangents: the same as ``run_pair`` takes."""
    torch.manual_seed(seed)
    inputs = values(joint.graph, seed=seed)
    return list(fx.Interpreter(joint.module).run(*inputs, enable_io_processing=False))


def unequal(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> list[int]:
    """Which entries differ by one bit or more."""
    pairs = enumerate(zip(expected, found, strict=True))
    return [i for i, (a, b) in pairs if (a is None) != (b is None) or (a is not None and not equal_bits(a, b))]


def run_pair(seam: Seam, *, seed: int = 0, closed: Collection[str] = ()) -> tuple[list[Tensor], list[Tensor | None]]:
    """(user outputs, gradients) of one step on random inputs and tangents. Static sizes only."""
    torch.manual_seed(seed)
    results = list(seam.forward(*values(seam.forward.graph, seed=seed, closed=closed)))
    user, saved = results[: seam.num_fwd_outputs], results[seam.num_fwd_outputs :]
    inputs = seam.backward.graph.find_nodes(op="placeholder")
    tangents = [value_of(node, seed) for node in inputs if "tangents" in node.name]
    return user, list(seam.backward(*saved, *tangents))


@contextlib.contextmanager
def watching(watch: Callable[[Pass, Work], None]) -> Iterator[None]:
    """Call ``watch(step, work)`` after each pass of every compile, before the runner verifies."""
    original = pipeline.build_pipeline

    def watched(step: Pass) -> Pass:
        def run(work: Work) -> int:
            count = step.run(work)
            watch(step, work)
            return count

        return dataclasses.replace(step, run=run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "build_pipeline", lambda settings: tuple(map(watched, original(settings))))
        yield


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a compile whose graphs have been seen."""


@dataclasses.dataclass
class Bench:
    """One model's graphs as they stand after a pass, and all passes to go on with."""

    work: Work
    passes: dict[str, Pass]

    def run(self, *steps: str) -> int:
        """Run these passes; returns what the last of them counted."""
        return [self.passes[name].run(self.work) for name in steps][-1]


def stopped_after(name: str, model: nn.Module, batch: Sequence[Tensor], **settings: Any) -> Bench:
    """Compile ``model`` up to the end of pass ``name``; what it leaves is there to be run, broken or compared."""
    model, session = optimized(model, **{"scheduler": "none", "preset": "exact", "min_bytes": 0, **settings})
    found: list[Work] = []

    def watch(step: Pass, work: Work) -> None:
        if step.name == name:
            found.append(work)
            raise Stop

    with watching(watch), pytest.raises(Exception, match="Stop"):
        loss_of(model(*batch)).backward()
    return Bench(found[0], {step.name: step for step in pipeline.build_pipeline(settings_of(session.config))})


def texts(work: Work) -> list[str]:
    """The graphs as text, branches included: equal if nothing changed."""
    if work.seam is None:
        return [str(work.joint.graph)]
    return [text for module in (work.seam.forward, work.seam.backward) for text in module_texts(module)]


def module_texts(module: fx.GraphModule) -> list[str]:
    return [str(module.graph), *(str(part.graph) for _, part in module.named_children())]


def copy_joint(joint: JointGraph) -> JointGraph:
    """The same joint graph in nodes of its own, to be broken."""
    env: dict[fx.Node, fx.Node] = {}
    module = _copy_module(joint.module, env)
    gates = {gate: env[node] for gate, node in joint.gates.items()}
    params = frozenset(env[node] for node in joint.param_inputs)
    return JointGraph(module, joint.num_fwd_outputs, joint.layout, gates, list(joint.grads), params)


def copy_seam(seam: Seam) -> Seam:
    """The same pair, branches included, in nodes of its own, to be broken."""
    env: dict[fx.Node, fx.Node] = {}
    forward, backward = _copy_module(seam.forward, env), _copy_module(seam.backward, env)
    return Seam(forward, backward, seam.num_fwd_outputs, {env[n]: t for n, t in seam.names.items() if n in env})


def _copy_module(module: fx.GraphModule, env: dict[fx.Node, fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, env))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    copied = _LazyGraphModule(module, graph)  # most copies never run
    for name, part in module.named_children():
        if isinstance(part, fx.GraphModule):
            setattr(copied, name, _copy_module(part, {}))
    return copied


class Chain(nn.Module):
    """Three linear layers, a GELU before the last: what enters the second serves the gradient of its weight only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(nn.functional.gelu(self.two(self.one(x))))


class Fork(nn.Module):
    """Two layers read one scaled value: ``first`` and ``scale`` share the products that bring their gradients back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale = nn.Linear(8, 16, bias=False), nn.Parameter(torch.randn(16))
        self.left, self.right, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * self.scale
        return self.last(nn.functional.gelu(self.left(hidden)) * self.right(hidden)).square().mean()


def chain_input() -> tuple[Tensor, ...]:
    return (torch.randn(16, 8, generator=torch.Generator().manual_seed(1)),)
