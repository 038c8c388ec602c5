"""Run by test_distributed.py under torchrun: ``distributed_worker.py FOLDER SCENARIO...``; gloo, any number of ranks.

Each scenario returns plain values; rank r writes ``{scenario: result}`` to FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import digits
import torch
import torch.distributed as dist
from reference import optimized
from small_models import Block, Tiny, optimizer_state, same_state, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tower import Tower, rows

import slimfit_fx
from slimfit_fx.integrations import ScheduleState

STEPS, BATCH, WIDTH = 50, 8, 64
SAMPLE = 100
"""Elements of a tensor that distances are measured on: most units have more."""
EXACT = {"preset": "exact", "scheduler": "random", "freeze_rate": 0.6}


class Wide(nn.Module):
    """Matrices make up nearly all of it, as in a real model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 4, 0.0) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)
        self.train()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x.mean(1)), labels)


def share(number: int, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of global batch ``number``."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data, labels = tokens(number, batch)
    return data.chunk(world)[rank], labels.chunk(world)[rank]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def one_step(net: Any, optimizer: torch.optim.Optimizer, number: int, batch: int = BATCH) -> torch.Tensor:
    optimizer.zero_grad()
    loss = net(*share(number, batch))
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def history(session: Any) -> list[list[str]]:
    return [sorted(opened) for _, opened in session.gates.history]


# ---- DDP


class Watch:
    """What an optimizer sees and moves of closed units, step by step."""

    def __init__(self, model: nn.Module, session: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.session, self.optimizer = model, session, optimizer
        self.looked = 0
        """How often a closed unit was looked at."""
        self.closed_bytes = 0
        """Of the gradients that closed units would have had."""
        self.gradients: list[str] = []
        """Closed units with a gradient when the optimizer reads gradients; as a hook behind all others finds them."""
        self.moved: list[str] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _held(self, name: str) -> tuple[Tensor, dict[str, Any]]:
        param = self.model.get_parameter(name)
        local = param.to_local() if hasattr(param, "to_local") else param
        return local.detach().clone(), optimizer_state(self.optimizer, param)

    def _before(self, *_: Any) -> None:
        self.gradients += [n for n in self.session.gates.closed if self.model.get_parameter(n).grad is not None]
        self._were = {n: self._held(n) for n in self.session.gates.closed}
        self.closed_bytes += sum(weight.numel() * weight.element_size() for weight, _ in self._were.values())

    def _after(self, *_: Any) -> None:
        self.looked += len(self._were)
        for name, (weight, state) in self._were.items():
            now, state_now = self._held(name)
            self.moved += [name] if not torch.equal(weight, now) or not same_state(state, state_now) else []


def ddp_curve() -> dict[str, Any]:
    """Fifty steps; nothing that is closed moves in any of them."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), **EXACT)
    net = DistributedDataParallel(model)
    optimizer = adamw(model)
    watch = Watch(model, session, optimizer)
    losses = [one_step(net, optimizer, number).item() for number in range(STEPS)]
    return {
        "losses": losses,
        "looked": watch.looked,
        "moved": watch.moved,
        "gradients": watch.gradients,
        "history": history(session),
        "weights": weights(model),
        "compiles": session.compiles,
        "gated": all(unit.gated for unit in session.plan.units),
    }


def inductor_run(wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A few steps as users get them: with the default executor."""
    model = slimfit_fx.optimize(Tower(), freeze_rate=0.5, min_bytes=256, strict=True)
    session, net = slimfit_fx.session(model), wrap(model)
    optimizer = adamw(model)
    watch = Watch(model, session, optimizer)
    for number in range(6):
        optimizer.zero_grad()
        net(rows(16, number)[0].chunk(dist.get_world_size())[dist.get_rank()]).backward()
        optimizer.step()
    return {
        "session": (session.executor, session.steps, session.compiles, session.recompiles),
        "looked": watch.looked,
        "moved": watch.moved,
        "gradients": watch.gradients,
        "history": history(session),
        "weights": weights(model) if wrap is DistributedDataParallel else full(model),
        "gated": all(unit.gated for unit in session.plan.units),
    }


def ddp_inductor() -> dict[str, Any]:
    return inductor_run(DistributedDataParallel)


def fsdp_inductor() -> dict[str, Any]:
    return inductor_run(fully_shard)


class SeveralBuckets(nn.Module):
    """Each layer takes a megabyte, as torch's first bucket is at least."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def ddp_split() -> dict[str, Any]:
    """How many graphs torch makes of a model of several buckets, with us and without."""
    graphs = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    x = torch.randn(4, 512)
    torch.compile(DistributedDataParallel(SeveralBuckets(), bucket_cap_mb=1), backend=count)(x).sum().backward()
    torch._dynamo.reset()
    model, session = optimized(SeveralBuckets(), **EXACT, units="*.weight")
    DistributedDataParallel(model, bucket_cap_mb=1)(x).sum().backward()
    return {"torch": len(graphs), "ours": session.compiles, "gated": all(unit.gated for unit in session.plan.units)}


def ddp_diverge() -> dict[str, Any]:
    return {"error": diverge(DistributedDataParallel)}


def fsdp_diverge() -> dict[str, Any]:
    return {"error": diverge(shard)}


def diverge(wrap: Callable[[nn.Module], Any]) -> str:
    """What is said when one rank pins units in the middle of a run, at a step at which decisions are compared."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), **EXACT)
    net, optimizer = wrap(model), adamw(model)
    with mock.patch("slimfit_fx.runtime.steps.CHECK_EVERY", 2):
        try:
            for number in range(4):
                if number == 2 and dist.get_rank() == 1:
                    session.freeze("*")
                one_step(net, optimizer, number)
        except RuntimeError as error:
            return str(error)
    return ""


def ddp_ils() -> dict[str, Any]:
    """ILS decides from distances; rank 1 measures badly, and must be overruled by rank 0."""
    model, session = optimized(Tiny(depth=1), freeze_rate=0.6)
    net, optimizer = DistributedDataParallel(model), adamw(model)
    measured, wrong = session._tracker._distances, 1.0 + 0.5 * dist.get_rank()

    def measured_badly() -> tuple[tuple[str, ...], Tensor]:
        names, values = measured()
        return names, values * wrong

    session._tracker._distances = measured_badly  # type: ignore[method-assign]
    torch.manual_seed(dist.get_rank())
    for number in range(12):
        one_step(net, optimizer, number)
    return {"history": history(session), "weights": weights(model), "distances": session.scheduler.distances}


def ddp_traffic() -> dict[str, Any]:
    model, session = optimized(Wide(), preset="exact", freeze_rate=0.9)
    net, optimizer = DistributedDataParallel(model, gradient_as_bucket_view=True), adamw(model)
    norms = []
    for number in range(10):
        optimizer.zero_grad()
        net(*share(number)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return {"sent": session.traffic.bytes_sent, "full": session.traffic.bytes_full, "norms": norms}


def ddp_gradients() -> dict[str, Any]:
    """Accumulation under no_sync, against the same steps with the closed gradients dropped by hand."""
    found = {}
    for ours in (True, False):
        model = Tiny(depth=1, dropout=0.0)
        if ours:
            model, session = optimized(model, **EXACT)
        net = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for number in range(4):
            optimizer.zero_grad()
            with net.no_sync():
                net(*share(2 * number)).backward()
            net(*share(2 * number + 1)).backward()
            if not ours:
                for name in set(session.gates.names) - set(session.gates.history[number][1]):
                    model.get_parameter(name).grad = None
            optimizer.step()
        found[ours] = weights(model)
    return {"worst": max((found[True][n] - found[False][n]).abs().max().item() for n in found[True])}


def ddp_then_optimize() -> dict[str, Any]:
    """The other order: DDP first. Wrapped is refused, with the right way named; the inner module works."""
    model = Tiny(depth=1, dropout=0.0)
    net = DistributedDataParallel(model)
    try:
        slimfit_fx.optimize(net)
        refused = ""
    except ValueError as error:
        refused = str(error)
    optimized(net.module, **EXACT)
    session = slimfit_fx.session(model)
    optimizer = adamw(model)
    losses = [one_step(net, optimizer, number).item() for number in range(5)]
    return {"refused": refused, "losses": losses, "history": history(session), "sent": session.traffic.bytes_sent}


def ddp_own_hook() -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model, session = optimized(Tiny(depth=1, dropout=0.0), **EXACT)
    net, optimizer = DistributedDataParallel(model), adamw(model)
    net.register_comm_hook(None, allreduce_hook)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = [one_step(net, optimizer, number).item() for number in range(5)]
    return {"said": [str(w.message) for w in said], "losses": losses}


def ddp_disagree() -> dict[str, Any]:
    model, _ = optimized(Tiny(depth=1), scheduler="random", freeze_rate=0.6, seed=dist.get_rank())
    try:
        DistributedDataParallel(model)(*share(0))
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def fsdp_flat() -> dict[str, Any]:
    """What is said of FSDP1: of the wrapper, of what is in it, of what holds it, and where it comes after us."""
    said = []
    for original in (True, False):
        wrapped = FullyShardedDataParallel(Tiny(depth=1), use_orig_params=original, device_id=torch.device("cpu"))
        for model in (wrapped, wrapped.module, nn.Sequential(wrapped)):
            try:
                slimfit_fx.optimize(model)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        inner, _ = optimized(Tiny(depth=1), **EXACT)
        late = FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))
        try:
            late(*share(0))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return {"said": said}


def ddp_join() -> dict[str, Any]:
    from torch.distributed.algorithms.join import Join

    model, _ = optimized(Tiny(depth=1))
    net = DistributedDataParallel(model)
    try:
        with Join([net]):
            net(*share(0))
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


# ---- FSDP2


def shard(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}


def fsdp_curve() -> dict[str, Any]:
    model, session = optimized(Tiny(depth=1, dropout=0.0), **EXACT)
    shard(model)
    optimizer = adamw(model)
    watch = Watch(model, session, optimizer)
    losses = [one_step(model, optimizer, number).item() for number in range(STEPS)]
    return {
        "losses": losses,
        "looked": watch.looked,
        "moved": watch.moved,
        "gradients": watch.gradients,
        "history": history(session),
        "weights": full(model),
        "steps": session.steps,
        "gated": {unit.name for unit in session.plan.units if unit.gated},
        "compiles": (session.compiles, session.recompiles),
    }


def fsdp_distances() -> dict[str, Any]:
    """ILS under both wrappers, from equal weights: the distances are of whole units, or of one sample of them."""
    return {
        (wrap.__name__, most): distances_under(wrap, most)
        for wrap in (shard, DistributedDataParallel)
        for most in (None, SAMPLE)
    } | {"shard_columns": distances_under(shard_columns, SAMPLE)}


def distances_under(wrap: Callable[[nn.Module], Any], most: int | None) -> dict[str, Any]:
    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", freeze_rate=0.6, distance_sample=most)
    net, optimizer = wrap(model), adamw(model)
    for number in range(4):
        one_step(net, optimizer, number)
    session.before_forward()
    return {"distances": session.scheduler.distances, "history": history(session)}


def shard_columns(model: nn.Module) -> nn.Module:
    """No shard of a matrix is a run of its elements."""
    return fully_shard(model, shard_placement_fn=lambda param: Shard(param.dim() - 1))


def fsdp_traffic() -> dict[str, Any]:
    """Bytes that FSDP2 hands to its reduce-scatter, against those of all gradients."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    sent, reduce = 0, group.foreach_reduce

    def counted(params: Any, gradients: Any, *args: Any) -> Any:
        nonlocal sent
        sent += sum(g.numel() * g.element_size() for g in gradients)
        return reduce(params, gradients, *args)

    group.foreach_reduce = counted
    model, session = optimized(Wide(), preset="exact", freeze_rate=0.9)
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    shard(model)
    optimizer = adamw(model)
    for number in range(10):
        one_step(model, optimizer, number)
    group.foreach_reduce = reduce
    return {"sent": sent, "full": 10 * every, "steps": session.steps}


def shard_then_optimize() -> dict[str, Any]:
    model = shard(Tiny(depth=1, dropout=0.0))
    _, session = optimized(model, **EXACT)
    optimizer = adamw(model)
    losses = [one_step(model, optimizer, number).item() for number in range(5)]
    return {"losses": losses, "history": history(session), "steps": session.steps}


# ---- to an accuracy


def digits_run(wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """With and without us: accuracy, and the step peak on this rank."""

    def run(ours: bool, order: int) -> tuple[float, int]:
        torch._dynamo.reset()
        model: nn.Module = digits.pretrained()
        if ours:
            slimfit_fx.optimize(model, **digits.OURS)
        net = wrap(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=digits.RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=digits.STEPS)
        for pixels, labels in digits.batches(digits.EPOCHS, seed=order):
            optimizer.zero_grad()
            rank, world = dist.get_rank(), dist.get_world_size()
            net(pixels.chunk(world)[rank], labels.chunk(world)[rank])["loss"].backward()
            optimizer.step()
            schedule.step()
        return digits.accuracy(model), digits.peak(model, net, digits.SIZE // dist.get_world_size())

    ways = {"ours": True, "plain": False}
    return {name: digits.mean_accuracy(functools.partial(run, ours)) for name, ours in ways.items()}


# ---- checkpoints


def checkpoint(folder: pathlib.Path, wrap: Callable[[nn.Module], Any], *, resume: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, session = optimized(Tiny(depth=1, dropout=0.0), preset="exact", freeze_rate=0.6)
    net = wrap(model)
    optimizer = adamw(model)
    if not resume:
        for number in range(6):
            one_step(net, optimizer, number)
        mine, optimizers = get_state_dict(net, optimizer)
        dcp.save({"model": mine, "optimizer": optimizers, "slimfit_fx": ScheduleState(model)}, checkpoint_id=folder)
    else:
        mine, optimizers = get_state_dict(net, optimizer)
        dcp.load({"model": mine, "optimizer": optimizers, "slimfit_fx": ScheduleState(model)}, checkpoint_id=folder)
        set_state_dict(net, optimizer, model_state_dict=mine, optim_state_dict=optimizers)
    losses = [one_step(net, optimizer, number).item() for number in range(6, 12)]
    return {
        "losses": losses,
        "history": history(session)[-6:],
        "steps": session.steps,
        "state": {name: local_state(optimizer, param) for name, param in model.named_parameters()},
    }


def local_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """This rank's part of what the optimizer remembers of ``param``."""
    state = optimizer_state(optimizer, param)
    return {key: value.to_local() if hasattr(value, "to_local") else value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {"ddp": DistributedDataParallel, "fsdp": shard}


def main(folder: pathlib.Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        torch._dynamo.reset()
        kind, _, what = name.partition("_")
        if what in ("save", "resume"):
            found[name] = checkpoint(folder / f"{kind}-checkpoint", WRAPPERS[kind], resume=what == "resume")
        elif what == "digits":
            found[name] = digits_run(WRAPPERS[kind])
        else:
            found[name] = globals()[name]()
        dist.barrier()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
