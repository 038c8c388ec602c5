"""Finished cells on disk: one JSON line each, written at once, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.cells import Cell, Row


class Store:
    """A file of finished cells.

    A line is either a cell (:class:`Row`) or a header ``{"run": ...}``: who ran it, on what, with which command. A last
    line that was cut off, because the process was killed while it wrote, counts as not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[Cell, Row] = {}
        """The last row of each cell."""
        for line in _whole_lines(path):
            found = json.loads(line)
            if "cell" in found:
                self._keep(Row.from_dict(found))

    @property
    def rows(self) -> tuple[Row, ...]:
        """All finished cells, in the order in which they were written."""
        return tuple(self._rows.values())

    def rows_of(self, task: str, scale: str) -> tuple[Row, ...]:
        """The finished cells of one task, of the recipe and data that it was last trained with."""
        rows = [row for row in self.rows if (row.cell.task, row.cell.scale) == (task, scale)]
        return tuple(row for row in rows if row.fingerprint == rows[-1].fingerprint)

    def find(self, cell: Cell, fingerprint: str) -> Row | None:
        """The finished ``cell``; None if it is not, or was finished on other data or by another recipe."""
        row = self._rows.get(cell)
        return row if row is not None and row.fingerprint == fingerprint else None

    def add(self, row: Row) -> None:
        """Write a finished cell, and see it safely on the disk."""
        self._write(row.to_dict())
        self._keep(row)

    def add_header(self, header: Mapping[str, Any]) -> None:
        """Write what is true of all cells that follow."""
        self._write({"run": dict(header)})

    def _keep(self, row: Row) -> None:
        self._rows.pop(row.cell, None)  # so that the newest stands last
        self._rows[row.cell] = row

    def _write(self, entry: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[str]:
    """The lines that end in a newline."""
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line.strip()]


def _cut_torn_line(path: Path) -> None:
    """Remove what stands behind the last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("rb+") as file:
            file.truncate(end)
