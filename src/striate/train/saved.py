"""The saved states of a training run, written atomically."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from striate.errors import UserError

PREFIX = "step-"  # of the folder of a state
PART = "part"  # the folder of the state being written
KEEP = 2  # complete states
MARGIN = 2**20  # bytes for small files


def last_saved(state: Path) -> Path | None:
    """The folder of the last saved state of a training run; None if there is none."""
    return max(state.glob(f"{PREFIX}*"), key=_step, default=None)


def commit_state(written: Path, step: int) -> None:
    """Flush a state to the disk, then rename it to its final name; delete all but the last two states."""
    for path in (*written.rglob("*"), written):
        _sync(path)
    written.rename(written.with_name(f"{PREFIX}{step}"))
    _sync(written.parent)
    for older in sorted(written.parent.glob(f"{PREFIX}*"), key=_step)[:-KEEP]:
        shutil.rmtree(older)


def missing_bytes(folder: Path, needed: int) -> int:
    """How many bytes more a folder's disk would need to hold `needed` bytes; 0 if they fit."""
    return max(0, needed + MARGIN - shutil.disk_usage(folder).free)


def check_room(folder: Path, needed: int) -> None:
    """Raise `UserError` when a model of `needed` bytes does not fit on the disk, before hours of training."""
    if missing_bytes(folder, needed):
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"the trained model takes {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free", see="disk-full"
        )


def _step(saved: Path) -> int:
    return int(saved.name.removeprefix(PREFIX))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
