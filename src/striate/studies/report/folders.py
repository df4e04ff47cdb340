"""Folders that hold runs: a run itself, a sweep, or any folder with runs somewhere below it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from striate.errors import UserError
from striate.runs.run import INFO

SWEEP = "sweep.json"
DEEP = 3  # folders below the one that was named


class RunFolder(NamedTuple):
    """A run folder, and what a sweep says about it: its status where it left no run, and its place in the grid."""

    path: Path
    status: str = ""
    values: tuple[tuple[str, str], ...] = ()


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """All runs in `folders`, each once, in their order.

    Raises:
        UserError: a folder holds no run.
    """
    runs: dict[Path, RunFolder] = {}
    for folder in map(Path, folders):
        inside = list(_inside(folder))
        if not inside:
            raise UserError(
                f"{folder} is not a run folder and has none in it: a folder with {INFO} was expected",
                see="not-a-run-folder",
            )
        for one in inside:
            runs.setdefault(one.path.resolve(), one)
    return list(runs.values())


def _inside(folder: Path) -> Iterator[RunFolder]:
    if (folder / INFO).is_file():
        yield RunFolder(folder)
        return
    listed = list(_sweep_runs(folder))
    yield from listed
    known = {one.path.resolve() for one in listed}
    yield from (RunFolder(path) for path in _below(folder, DEEP) if path.resolve() not in known)


def _below(folder: Path, deep: int) -> Iterator[Path]:
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for inner in folders:
        if (inner / INFO).is_file():
            yield inner
        elif deep > 1 and not inner.name.startswith("."):
            yield from _below(inner, deep - 1)


def _sweep_runs(folder: Path) -> Iterator[RunFolder]:
    """The runs that sweep.json lists, made or not; none if the file cannot be read."""
    try:
        cells = json.loads((folder / SWEEP).read_bytes())["cells"]
        for cell in cells:
            values = tuple((str(key), _text(value)) for key, value in dict(cell.get("values") or {}).items())
            for name in cell.get("runs") or [cell["name"]]:
                yield RunFolder(folder / str(name), str(cell.get("status") or "not started"), values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
