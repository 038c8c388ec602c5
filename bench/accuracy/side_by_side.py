"""Several pieces of a run at a time, each in a process of its own; one process writes what they finish.

A process that trains with two threads is slower than two with one each. A piece is a command line of its own, the cells
of one method on one task: within it a compiled model is used again, and its learning rate is chosen.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing.managers import SyncManager
from typing import Any

from bench.accuracy.cells import Row
from bench.accuracy.store import Store

Finished = Callable[[Row, bool], None]
"""Called for each cell with its row and whether it was trained now (rather than found)."""
Work = Callable[[Sequence[str], Finished], None]
"""Trains one piece. Known by name in its module: another process calls it."""


class ReadStore(Store):
    """What a file holds, and rows that somebody else writes into it."""

    def add(self, row: Row) -> None:
        """Know ``row``; the file stays as it is."""
        self._keep(row)


def train_side_by_side(
    pieces: Sequence[Sequence[str]], jobs: int, work: Work, store: Store, finished: Finished
) -> None:
    """Do all ``pieces``, ``jobs`` at a time and in order; each finished cell is written into ``store`` at once.

    The processes end with this one, however it ends: nobody would write what they go on to train.

    Raises:
        Exception: what the first piece that failed raised. No other piece is begun then.
    """
    spawn = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=spawn)
    manager.start(_end_with_parent)
    with manager, ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent) as pool:
        rows = manager.Queue()
        left: set[Future[None]] = {pool.submit(_work, work, list(piece), rows) for piece in pieces}
        try:
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
                _receive(rows, store, finished)
                for future in done:
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        _receive(rows, store, finished)


def _end_with_parent() -> None:
    """In another process: end it when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(work: Work, piece: Sequence[str], rows: Any) -> None:
    """In the other process."""
    work(piece, lambda row, is_new: rows.put((row, is_new)))


def _receive(rows: Any, store: Store, finished: Finished) -> None:
    """Write and report what has come."""
    while True:
        try:
            row, is_new = rows.get_nowait()
        except queue.Empty:
            return
        if is_new:
            store.add(row)
        finished(row, is_new)
