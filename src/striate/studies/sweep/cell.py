"""The cells of a sweep on disk.

    out/
        sweep.json            the plan: name, grid values, run folders and status of every cell
        cells/<name>.json     options, content, status and error of a cell
        cells/<name>.log      the output of its process
        cells/<name>.lock     held while a process works on it
        <name>/               the tuned run, evaluated
        <name>+<pruning>/     a pruning of it, evaluated

Nothing here imports torch, so that a report or a scheduler reads the state of a sweep fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.runs.run import LOG, Run

FILE, NOTES = "sweep.json", "cells"
BLOCK = 4096  # bytes at the end of a log that are looked at first, then twice as many
NOT_STARTED, RUNNING, FINISHED, FAILED, INTERRUPTED = "not started", "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a tuned run and the runs pruned from it.

    `values` are the cell's options by name; `runs` the run folders, the tuned one first; `prunings` the options of
    `prune` that made each of the others. `status` is one of "not started", "running", "finished", "failed" and
    "interrupted"; after a kill it stays "running" until the sweep is started again. `error` says why it failed.
    """

    name: str
    values: Mapping[str, Any]
    runs: tuple[Path, ...]
    prunings: tuple[Mapping[str, Any], ...] = ()
    status: str = NOT_STARTED
    error: str = ""

    @property
    def out(self) -> Path:
        """The folder of the sweep."""
        return self.runs[0].parent

    @property
    def log(self) -> Path:
        """The output of its process."""
        return self.out / NOTES / f"{self.name}.log"

    @property
    def lock(self) -> Path:
        """Held while a process works on the cell."""
        return self.out / NOTES / f"{self.name}.lock"

    @property
    def note(self) -> Note:
        """The saved state of the cell's work."""
        return Note.load(self.out / NOTES / f"{self.name}.json")

    def update(self, **fields: Any) -> None:
        """Replace fields of `note`."""
        note = replace(self.note, **fields)
        write_json(self.out / NOTES / f"{self.name}.json", vars(note))

    def refresh(self) -> Cell:
        """The cell with the status that it has on disk now."""
        note = self.note
        # A pruning that was added to the grid is still to be made.
        status = NOT_STARTED if note.status == FINISHED and not self.complete else note.status
        return replace(self, status=status, error=note.error)

    @property
    def stage(self) -> tuple[str, Path]:
        """The verb that a running cell is at, "tune", "eval" or "prune", and its run folder."""
        for folder in self.runs:
            status = Run(folder).info.get("status")
            if status != FINISHED:
                return ("tune" if folder == self.runs[0] else "prune"), folder
            if Run(folder).results is None:
                return "eval", folder
        return "eval", self.runs[-1]

    @property
    def complete(self) -> bool:
        """Whether all of its runs are finished and evaluated."""
        return all(Run(folder).info.get("status") == FINISHED and Run(folder).results for folder in self.runs)

    def to_json(self) -> dict[str, Any]:
        """The cell as sweep.json has it; folders are relative to that of the sweep."""
        return {
            "name": self.name,
            "values": dict(self.values),
            "runs": [folder.name for folder in self.runs],
            "prunings": [dict(values) for values in self.prunings],
            "status": self.status,
            "error": self.error,
        }


@dataclass(frozen=True)
class Note:
    """The saved state of a cell's work; `made_from`: per run folder the options and content that it is made from."""

    status: str = NOT_STARTED
    error: str = ""
    made_from: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Note:
        """Read a note; a missing one means not started."""
        try:
            return cls(**json.loads(file.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): remove it together with the runs of its cell") from None


def cells(folder: str | Path) -> tuple[Cell, ...]:
    """The cells of a sweep, in the order of the grid, with their present status.

    Args:
        folder: the sweep's folder (its `out`).

    Raises:
        UserError: the folder is not a sweep.
    """
    out = Path(folder)
    try:
        found = json.loads((out / FILE).read_bytes())["cells"]
        return tuple(
            Cell(
                cell["name"], cell["values"], tuple(out / name for name in cell["runs"]), tuple(cell["prunings"])
            ).refresh()
            for cell in found
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{out} is not a sweep: a folder with {FILE} was expected", see="not-a-run-folder") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{out / FILE} cannot be read: {error!r}") from None


def write_plan(out: Path, about: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Write sweep.json: the fields `about` the sweep, and its cells with their present status."""
    write_json(out / FILE, {**about, "cells": [cell.refresh().to_json() for cell in cells]})


def last_step(run: Path) -> dict[str, Any]:
    """The last whole line of a run's log; empty when there is none. Reads the end of the file only."""
    try:
        with (run / LOG).open("rb") as file:
            start, whole = file.seek(0, os.SEEK_END), list[bytes]()
            size = start
            while start and not whole:  # a line can be long: a loss spike names the records of its step
                start = max(0, 2 * start - size - BLOCK)
                file.seek(start)
                whole = file.read(size - start).split(b"\n")[start > 0 : -1]
        return json.loads(whole[-1]) if whole else {}
    except (OSError, ValueError):
        return {}


def last_line(log: Path) -> str:
    """The last line that is not blank; empty if there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
