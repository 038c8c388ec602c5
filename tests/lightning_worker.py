"""Run by test_distributed.py under torchrun: ``lightning_worker.py FOLDER``; Lightning's DDP on two processes.

Lightning steps with a closure, and DDP fills gradients of closed units with zeros inside of it. Rank r writes
FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from test_lightning import SETTINGS, Module, lightning, loader, trainer

import slimfit_fx
from slimfit_fx.integrations import SlimFitLightning


class Watch(lightning.Callback):
    """Which units moved although they were closed."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.moved: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {name: param.detach().clone() for name, param in pl_module.net.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        closed = slimfit_fx.session(pl_module.net).gates.closed
        self.moved += [name for name in closed if not torch.equal(self.before[name], pl_module.net.get_parameter(name))]


def main(folder: pathlib.Path) -> None:
    module, watch = Module(), Watch()
    run = trainer(folder, SlimFitLightning("net", **SETTINGS), strategy="ddp", devices=2, max_epochs=2)
    run.callbacks.append(watch)
    run.fit(module, loader())
    session = slimfit_fx.session(module.net)
    found = {
        "history": [sorted(opened) for _, opened in session.gates.history],
        "moved": watch.moved,
        "steps": session.steps,
        "traffic": (session.traffic.bytes_sent, session.traffic.bytes_full),
        "weights": {name: param.detach() for name, param in module.net.named_parameters()},
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]))
