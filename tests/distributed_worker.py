"""Run by test_distributed.py: ``distributed_worker.py FOLDER RANKS:SCENARIO,...``; gloo, job after job.

Ranks are forked from one process that has imported and compiled before: else that is most of the time of a small job.
Under torchrun this is one of the ranks.
Each scenario returns plain values; rank r of n writes ``{scenario: result}`` to FOLDER/<n>/rank<r>.pt.
"""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import tqdm
from reference import optimized
from small_models import WIDTH, Tiny, optimizer_state, same_state, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.functional import cross_entropy, gelu
from torch.nn.parallel import DistributedDataParallel
from tower import Tower, rows

import slimfit_fx
from slimfit_fx.integrations import ScheduleState

TRAFFIC_STEPS, BATCH = 6, 8
SAMPLE = 100
"""Elements of a tensor that distances are measured on: most units have more."""
EXACT = {"preset": "exact", "scheduler": "random", "freeze_rate": 0.6}


class Residual(nn.Module):
    """Half of a transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """An embedding, blocks of two matrices, a head: compiled in half the time that attention takes."""

    def __init__(self, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.train()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x.mean(1)), labels)


class TorchBlocks(Tiny):
    """Blocks of torch's own classes, whose frames dynamo skips."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True),
                nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
            ]
        )


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
    return mean(loss)


def mean(loss: Tensor) -> Tensor:
    """Of all ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All of each parameter, also of shards (then all ranks have to ask)."""
    return {n: whole(p.detach()) for n, p in model.named_parameters()}


def whole(tensor: Any) -> Tensor:
    """A copy of ``tensor``, put together if it is a shard."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def history(session: Any) -> list[list[str]]:
    return [sorted(opened) for _, opened in session.gates.history]


def ungated(session: Any) -> set[str]:
    """Units without a gate, by the plans of the graphs: ``session.plan`` would follow the memory of a step as well."""
    plans = [(graph.unit_names, graph.plan) for graph in session.backend.graphs if graph.plan is not None]
    return set(session.gates.names) - {names[gate] for names, plan in plans for gate in plan.gated}


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


def watched(watch: Watch) -> dict[str, Any]:
    """What was seen of closed units, what was open, and what became of the weights."""
    return {
        "looked": watch.looked,
        "moved": watch.moved,
        "gradients": watch.gradients,
        "history": history(watch.session),
        "weights": weights(watch.model),
    }


# ---- DDP and FSDP2


def curve(wrap: Callable[[nn.Module], Any], steps: int = 50) -> dict[str, Any]:
    """Nothing that is closed moves in any step."""
    model, session = optimized(Tiny(depth=1, dropout=0.0), **EXACT)
    net, optimizer = wrap(model), adamw(model)
    watch = Watch(model, session, optimizer)
    losses = [one_step(net, optimizer, number).item() for number in range(steps)]
    compiles = (session.compiles, session.recompiles)
    return {"losses": losses, "compiles": compiles, "ungated": ungated(session), **watched(watch)}


def inductor_run(wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A few steps as users get them: with the default executor."""
    model = slimfit_fx.optimize(Tower(), freeze_rate=0.5, min_bytes=256, strict=True)
    session, net = slimfit_fx.session(model), (fully_shard if wrap is shard else wrap)(model)
    optimizer = adamw(model)
    watch = Watch(model, session, optimizer)
    for number in range(6):
        optimizer.zero_grad()
        net(rows(16, number)[0].chunk(dist.get_world_size())[dist.get_rank()]).backward()
        optimizer.step()
    said = (session.executor, session.steps, session.compiles, session.recompiles)
    return {"session": said, "ungated": ungated(session), **watched(watch)}


def diverge(wrap: Callable[[nn.Module], Any]) -> str:
    """What is said when one rank pins units in the middle of a run, at a step at which decisions are compared."""
    model, session = optimized(Stack(), **EXACT)
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


def beside_plain(
    wrap: Callable[[nn.Module], Any],
    backward: Callable[[Any, int], float],
    make: Callable[[], nn.Module] = lambda: Tiny(depth=1, dropout=0.0),
) -> dict[str, Any]:
    """Four steps with clipping, watched; then the same without us, with the closed gradients dropped by hand.

    ``error``: the distance between the weights of the two, over the distance that the latter went.
    """
    found: dict[str, Any] = {}
    for kind in ("ours", "plain"):
        model, norms, losses = make(), [], []
        if kind == "ours":
            model, session = optimized(model, **EXACT)
        start = weights(model)
        net = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        watch = Watch(model, session, optimizer) if kind == "ours" else None
        for number in range(4):
            optimizer.zero_grad()
            losses.append(backward(net, number))
            if watch is None:
                for name in set(session.gates.names) - set(session.gates.history[number][1]):
                    model.get_parameter(name).grad = None
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1)).item())
            optimizer.step()
        if watch is not None:
            found |= watched(watch) | {"recompiles": session.recompiles, "ungated": ungated(session)}
        found |= {f"{kind}_norms": norms, f"{kind}_losses": losses}
    plain = weights(model)
    apart = sum((plain[name] - found["weights"][name]).square().sum() for name in plain)
    went = sum((plain[name] - start[name]).square().sum() for name in plain)
    return found | {"error": (apart / went).sqrt().item()}


def once(net: Any, number: int) -> float:
    loss = net(*share(number))
    loss.backward()
    return mean(loss).item()


def under_autocast(net: Any, number: int) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(*share(number))
    loss.backward()
    return mean(loss).item()


def after_no_sync(net: Any, number: int) -> float:
    with net.no_sync():
        once(net, 2 * number)
    return once(net, 2 * number + 1)


def after_no_gradient_sync(net: Any, number: int) -> float:
    """FSDP2's accumulation."""
    net.set_requires_gradient_sync(False)
    once(net, 2 * number)
    net.set_requires_gradient_sync(True)
    return once(net, 2 * number + 1)


# ---- DDP


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
    return {"torch": len(graphs), "ours": session.compiles, "ungated": ungated(session)}


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
    """Bytes handed to all-reduce, counted there and by us, against those of all gradients."""
    model, session = optimized(Stack(64, 2), preset="exact", freeze_rate=0.9)
    net, optimizer = DistributedDataParallel(model, gradient_as_bucket_view=True), adamw(model)
    sent, reduce, norms = 0, dist.all_reduce, []

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    with mock.patch("slimfit_fx.runtime.gated_reduce.dist.all_reduce", counted):
        for number in range(TRAFFIC_STEPS):
            optimizer.zero_grad()
            net(*share(number)).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
    said = (session.traffic.bytes_sent, session.traffic.bytes_full)
    return {
        "sent": sent,
        "full": TRAFFIC_STEPS * sum(p.nbytes for p in model.parameters()),
        "said": said,
        "norms": norms,
    }


def ddp_accumulate() -> dict[str, Any]:
    return beside_plain(lambda model: DistributedDataParallel(model, find_unused_parameters=True), after_no_sync)


def ddp_bf16() -> dict[str, Any]:
    return beside_plain(DistributedDataParallel, under_autocast)


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


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def fsdp_accumulate() -> dict[str, Any]:
    return beside_plain(shard, after_no_gradient_sync)


def fsdp_torch_blocks() -> dict[str, Any]:
    """``forwards_left``: parts that have one of their own when all is done."""
    models: list[nn.Module] = []

    def make() -> nn.Module:
        models.append(TorchBlocks())
        return models[-1]

    found = beside_plain(shard, once, make)
    left = [name for name, module in models[0].named_modules() if name and "forward" in vars(module)]
    return found | {"forwards_left": left}


def fsdp_bf16() -> dict[str, Any]:
    """Parameters are gathered, and gradients reduced, in bf16."""
    return beside_plain(functools.partial(shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), once)


def fsdp_distances() -> dict[str, Any]:
    """ILS under both wrappers, from equal weights: the distances are of whole units, or of one sample of them."""
    return {
        (wrap.__name__, most): distances_under(wrap, most)
        for wrap in (shard, DistributedDataParallel)
        for most in (None, SAMPLE)
    } | {"shard_columns": distances_under(shard_columns, SAMPLE)}


def distances_under(wrap: Callable[[nn.Module], Any], most: int | None) -> dict[str, Any]:
    model, session = optimized(Stack(), preset="exact", freeze_rate=0.6, distance_sample=most)
    net, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=0.1)
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
        sent += sum(g.nbytes for g in gradients)
        return reduce(params, gradients, *args)

    model, session = optimized(Stack(64, 2), preset="exact", freeze_rate=0.9)
    every = sum(p.nbytes for p in model.parameters())
    shard(model)
    optimizer = adamw(model)
    with mock.patch.object(group, "foreach_reduce", counted):
        for number in range(TRAFFIC_STEPS):
            one_step(model, optimizer, number)
    return {"sent": sent, "full": TRAFFIC_STEPS * every, "steps": session.steps}


def shard_then_optimize() -> dict[str, Any]:
    model = shard(Tiny(depth=1, dropout=0.0))
    _, session = optimized(model, **EXACT)
    optimizer = adamw(model)
    losses = [one_step(model, optimizer, number).item() for number in range(5)]
    return {"losses": losses, "history": history(session), "steps": session.steps}


# ---- to an accuracy


def digits_run(wrap: Callable[[nn.Module], Any], *, ours: bool) -> tuple[float, int]:
    """Accuracy, and the step peak on this rank. All orders of the images start anew, with what was compiled once."""
    import digits

    torch._dynamo.reset()
    model: nn.Module = digits.pretrained()
    if ours:
        slimfit_fx.optimize(model, **digits.OURS)
        session = slimfit_fx.session(model)
        schedule = session.state_dict()
    net = wrap(model)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}

    def run(order: int) -> tuple[float, int]:
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(start[name])
        if ours:
            session.load_state_dict(schedule)
        optimizer = torch.optim.AdamW(model.parameters(), lr=digits.RATE)
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=digits.STEPS)
        model.train()
        for pixels, labels in digits.batches(digits.EPOCHS, seed=order):
            optimizer.zero_grad()
            rank, world = dist.get_rank(), dist.get_world_size()
            net(pixels.chunk(world)[rank], labels.chunk(world)[rank])["loss"].backward()
            optimizer.step()
            rates.step()
        return digits.accuracy(model), digits.peak(model, net, digits.SIZE // dist.get_world_size())

    return digits.mean_accuracy(run)


# ---- checkpoints


def checkpoint(
    folder: pathlib.Path, wrap: Callable[[nn.Module], Any], *, resume: bool, **settings: Any
) -> dict[str, Any]:
    """Six steps that end in a checkpoint, or one that is loaded; then six more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, session = optimized(Stack(), **settings)
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
    stored = {name: whole_state(optimizer, param) for name, param in model.named_parameters()}
    losses = [one_step(net, optimizer, number).item() for number in range(6, 12)]
    return {
        "losses": losses,
        "history": history(session)[-6:],
        "steps": session.steps,
        "stored": stored,
        "state": {name: local_state(optimizer, param) for name, param in model.named_parameters()},
    }


def whole_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Tensor]:
    """All of what the optimizer remembers of ``param``."""
    return {key: whole(value) for key, value in optimizer_state(optimizer, param).items()}


def local_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """This rank's part of what the optimizer remembers of ``param``."""
    state = optimizer_state(optimizer, param)
    return {key: value.to_local() if hasattr(value, "to_local") else value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {"ddp": DistributedDataParallel, "fsdp": shard}


EITHER: dict[str, Callable[..., Any]] = {
    "curve": curve,
    "inductor": inductor_run,
    "diverge": diverge,
    "digits": lambda wrap: {"ours": digits_run(wrap, ours=True), "plain": digits_run(wrap, ours=False)},
}
"""Scenarios of both wrappers."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "ils": {"preset": "exact", "freeze_rate": 0.6},
    "random": {**EXACT, "seed": 1},  # with it every unit has trained before the checkpoint
}


def scenario(name: str, folder: pathlib.Path) -> Any:
    torch._dynamo.reset()
    kind, _, what = name.partition("_")
    if what in EITHER:
        return EITHER[what](WRAPPERS[kind])
    action, _, schedule = what.partition("_")
    if action in ("save", "resume"):
        where = folder / "checkpoints" / f"{kind}-{schedule}"
        return checkpoint(where, WRAPPERS[kind], resume=action == "resume", **SCHEDULES[schedule])
    return globals()[name]()


START = "spawn" if torch.backends.cuda.is_built() else "fork"
"""Autograd of a build with CUDA starts threads, behind which no process can be forked."""


def work(rank: int, ranks: int, folder: pathlib.Path, names: list[str]) -> None:
    """One rank of a job."""
    if START == "spawn" and not dist.is_torchelastic_launched():
        torch.set_num_threads(1)
        prepare(with_digits="digits" in " ".join(names))
    mine = folder / str(ranks)
    mine.mkdir(exist_ok=True)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=f"file://{mine}/store", rank=rank, world_size=ranks)
    found = {}
    for name in names:
        found[name] = scenario(name, folder)
        dist.barrier()
    torch.save(found, mine / f"rank{rank}.pt")
    dist.destroy_process_group()


def prepare(*, with_digits: bool) -> None:
    """What every rank would do for itself otherwise. What is compiled here is forgotten; imports stay."""
    tqdm.tqdm.monitor_interval = 0  # no thread before a fork
    warnings.filterwarnings("error", "slimfit_fx: torch.compile captured no graph")
    model, _ = optimized(Tiny(depth=1))
    model(*tokens()).backward()
    if with_digits:
        import digits

        digits.pretrained()
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # looking for garbage in a million objects of imports takes time, and copies what forks share


def main(folder: pathlib.Path, jobs: list[str]) -> None:
    if START == "fork" or dist.is_torchelastic_launched():
        prepare(with_digits="digits" in " ".join(jobs))
    for job in jobs:
        ranks, _, names = job.partition(":")
        settings = (int(ranks), folder, names.split(","))
        if dist.is_torchelastic_launched():
            work(int(os.environ["RANK"]), *settings)
            continue
        torch.multiprocessing.start_processes(work, settings, int(ranks), start_method=START)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
