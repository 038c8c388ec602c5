"""Run by test_distributed.py under ``accelerate launch`` or torchrun: ``accelerate_worker.py FOLDER``.

Hugging Face's Trainer with SlimFitCallback on several processes; rank r writes FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import pathlib
import sys

import torch
import torch.distributed as dist
from test_hf_trainer import SETTINGS, bert, trainer

import slimfit_fx
from slimfit_fx.integrations import SlimFitCallback


def main(folder: pathlib.Path) -> None:
    found = {}
    for stop in (False, True):
        model = bert()
        run = trainer(
            model, folder, callbacks=[SlimFitCallback(**SETTINGS)], save_strategy="steps", save_steps=3, max_steps=6
        )
        run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if stop else None)
        session = slimfit_fx.session(model)
        found[stop] = {
            "history": [sorted(opened) for _, opened in session.gates.history][-3:],
            "weights": {name: param.detach().clone() for name, param in model.named_parameters()},
            "traffic": session.traffic and (session.traffic.bytes_sent, session.traffic.bytes_full),
            "steps": session.steps,
            "world": dist.get_world_size(),
        }
        torch._dynamo.reset()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]))
