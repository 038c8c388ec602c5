"""Run by test_interruptions.py in processes of its own: ``killed_run.py FOLDER STEPS``.

Trains to STEPS, from the last checkpoint in FOLDER if there is one; writes a checkpoint after every third step and the
number of the step under way to FOLDER/step. Both get their names when they are whole.
"""

from __future__ import annotations

import os
import pathlib
import sys

import torch
from reference import optimized
from small_models import Tiny, tokens


def main(folder: pathlib.Path, steps: int) -> None:
    model, session = optimized(Tiny(depth=1), freeze_rate=0.6, preset="balanced")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    first, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        session.load_state_dict(saved["slimfit_fx"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    else:
        torch.manual_seed(3)
    for step in range(first, steps):
        (folder / "new").write_text(str(step))
        os.replace(folder / "new", folder / "step")
        optimizer.zero_grad()
        model(*tokens(step)).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 3 == 0:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "slimfit_fx": session}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "random": torch.get_rng_state(), "step": step + 1}, folder / "new.pt")
            os.replace(folder / "new.pt", path)
    torch.save({"model": model.state_dict(), "slimfit_fx": session.state_dict(), "from": first}, folder / "end.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
