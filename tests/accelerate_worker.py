"""Run by test_distributed.py under ``accelerate launch``: ``accelerate_worker.py FOLDER``.

Hugging Face's Trainer with SlimFitCallback, a loop of Accelerate's, and FSDP2, on several processes; rank r writes
FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from distributed_worker import Watch, curve, history, shard, weights
from reference import optimized
from small_models import Tiny
from test_hf_trainer import SETTINGS, Still, bert, trainer
from test_loops import accumulate, batches

import slimfit_fx
from slimfit_fx.integrations import SlimFitCallback


def seen(model: torch.nn.Module, watch: Watch) -> dict[str, Any]:
    session = slimfit_fx.session(model)
    assert session.traffic is not None
    return {
        "history": history(session)[-3:],
        "weights": weights(model),
        "bytes_not_sent": session.traffic.bytes_full - session.traffic.bytes_sent,
        "bytes_sent": session.traffic.bytes_sent,
        "bytes_closed": watch.closed_bytes,
        "moved": watch.moved,
        "gradients": watch.gradients,
        "steps": session.steps,
        "world": dist.get_world_size(),
    }


def trainer_run(folder: pathlib.Path, *, resume: bool) -> dict[str, Any]:
    model, still = bert(), Still()
    callbacks = [SlimFitCallback(**SETTINGS), still]
    logging = "no" if resume else "steps"  # it has the memory of a step worked out
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_strategy": logging}
    run = trainer(model, folder, callbacks=callbacks, **settings)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return seen(model, still.watch)


def loop() -> dict[str, Any]:
    """Accumulation and clipping; gradients are exchanged in every second batch."""
    prepared = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, session = optimized(Tiny(depth=1, dropout=0.0), freeze_rate=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    watch = Watch(model, session, optimizer)
    net, optimizer, loader = prepared.prepare(model, optimizer, batches(48 * dist.get_world_size()))
    accumulate(prepared, net, optimizer, loader)
    return seen(model, watch)


def main(folder: pathlib.Path) -> None:
    scenarios = {
        "trainer": lambda: trainer_run(folder, resume=False),
        "resumed": lambda: trainer_run(folder, resume=True),
        "loop": loop,
        "fsdp_curve": lambda: curve(shard, 12),
    }
    found = {}
    for name, run in scenarios.items():
        torch._dynamo.reset()
        found[name] = run()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]))
