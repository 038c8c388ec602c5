"""Run by test_distributed.py under torchrun: ``lightning_worker.py FOLDER``; Lightning's DDP on two processes.

Lightning steps with a closure, and DDP fills gradients of closed units with zeros inside of it; they are gone when it
ends. Rank r writes
FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import pathlib
import sys

import torch
import torch.distributed as dist
from test_lightning import SETTINGS, Module, Watch, loader, trainer

import slimfit_fx
from slimfit_fx.integrations import SlimFitLightning


def main(folder: pathlib.Path) -> None:
    module, watch = Module(), Watch()
    run = trainer(folder, SlimFitLightning("net", **SETTINGS), watch, strategy="ddp", devices=2, max_epochs=2)
    run.fit(module, loader())
    session = slimfit_fx.session(module.net)
    found = {
        "history": [sorted(opened) for _, opened in session.gates.history],
        "gradients": watch.gradients,
        "clipped": watch.clipped,
        "moved": watch.moved,
        "looked": watch.looked,
        "steps": session.steps,
        "traffic": (session.traffic.bytes_sent, session.traffic.bytes_full),
        "weights": {name: param.detach() for name, param in module.net.named_parameters()},
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]))
