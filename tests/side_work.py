"""What the processes of a test with several jobs run. It needs no torch: they begin in a moment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bench.accuracy.cells import Cell, Row
from bench.accuracy.side_by_side import Finished


def seeds_as_cells(piece: Sequence[str], finished: Finished) -> None:
    """One cell for each word of ``piece``, whose seed it is; "7" is found, "!" fails."""
    for word in piece:
        if word == "!":
            raise ValueError("this piece fails")
        row = Row(
            Cell("t", "quick", "full", int(word), 1e-4), validation=0.5, test=0.5, loss=0.1, steps=4, seconds=2.0,
            frozen_share=0.0, recompiles=0, fingerprint="f",
        )  # fmt: skip
        finished(row, word != "7")


def beat(piece: Sequence[str], finished: Finished) -> None:
    """Make the file ``piece[0]`` longer, again and again, for longer than any test takes."""
    for _ in range(6000):
        with Path(piece[0]).open("a") as file:
            file.write(".")
        time.sleep(0.1)
