"""The cells of a sweep as they stand on disk.

    out/
        sweep.json            the plan: name, grid values, run folders and status of every cell
        cells/<name>.json     what one cell was made from, how far it is, why it failed
        cells/<name>.log      what its process said
        cells/<name>.lock     held while a process works on it
        <name>/               the tuned run, evaluated
        <name>+<pruning>/     what was pruned from it, evaluated

Nothing here needs torch: a report or a scheduler reads the state of a sweep in no time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.run import LOG, Run

FILE, NOTES = "sweep.json", "cells"
NOT_STARTED, RUNNING, FINISHED, FAILED, INTERRUPTED = "not started", "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a tuned run, and what was pruned from it.

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
        """What its process said."""
        return self.out / NOTES / f"{self.name}.log"

    @property
    def lock(self) -> Path:
        """Held while a process works on the cell."""
        return self.out / NOTES / f"{self.name}.lock"

    @property
    def note(self) -> Note:
        """What is known of the cell's work."""
        return Note.load(self.out / NOTES / f"{self.name}.json")

    def update(self, **fields: Any) -> None:
        """Replace fields of `note`."""
        note = replace(self.note, **fields)
        write_json(self.out / NOTES / f"{self.name}.json", vars(note))

    def as_it_is(self) -> Cell:
        """The cell with the status that it has on disk now."""
        note = self.note
        # A pruning that was added to the grid is still to be made.
        status = NOT_STARTED if note.status == FINISHED and not self.complete else note.status
        return replace(self, status=status, error=note.error)

    @property
    def stage(self) -> tuple[str, Path]:
        """What a running cell is doing, "tune", "eval" or "prune", and in which run."""
        for folder in self.runs:
            status = _run(folder).get("status")
            if status != FINISHED:
                return ("tune" if folder == self.runs[0] else "prune"), folder
            if Run(folder).results is None:
                return "eval", folder
        return "eval", self.runs[-1]

    @property
    def complete(self) -> bool:
        """Whether all of its runs are finished and evaluated."""
        return all(_run(folder).get("status") == FINISHED and Run(folder).results for folder in self.runs)

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
    """What is known of a cell's work; `made_from` has, for each run folder, the content that it is made from."""

    status: str = NOT_STARTED
    error: str = ""
    made_from: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Note:
        """Read a note; one that is not there says that nothing was started."""
        try:
            return cls(**json.loads(file.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): remove it together with the runs of its cell") from None


def cells(folder: str | Path) -> tuple[Cell, ...]:
    """The cells of a sweep, in the order of the grid, as they stand now.

    Args:
        folder: the sweep's folder (its `out`).

    Raises:
        UserError: no sweep has been planned there.
    """
    out = Path(folder)
    try:
        found = json.loads((out / FILE).read_bytes())["cells"]
        return tuple(
            Cell(
                cell["name"], cell["values"], tuple(out / name for name in cell["runs"]), tuple(cell["prunings"])
            ).as_it_is()
            for cell in found
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{out} is no sweep: a folder with a {FILE} in it was expected") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{out / FILE} cannot be read: {error!r}") from None


def write_plan(out: Path, about: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Write sweep.json: what the sweep is about, and its cells as they stand now."""
    write_json(out / FILE, {**about, "cells": [cell.as_it_is().to_json() for cell in cells]})


def last_step(run: Path) -> dict[str, Any]:
    """The last line of a run's log; empty when there is none. Reads the end of the file only."""
    try:
        with (run / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    return json.loads(whole[-1]) if whole else {}


def last_line(log: Path) -> str:
    """The last line that says something; empty when there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write all of a JSON file before it takes the place of the one before."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _run(folder: Path) -> dict[str, Any]:
    return Run(folder).info
