"""The saved states of a training: each is there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from striate.errors import UserError

PART = "part"  # the folder of the state that is being written
KEPT = 2  # whole states; the one before the last goes only when the next is on the disk
MARGIN = 2**20  # bytes for all that is small


def last_saved(state: Path) -> str | None:
    """The last saved state of a training."""
    saved = sorted(state.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)
    return str(saved[-1]) if saved else None


def settle(written: Path, state: Path) -> None:
    """Bring a state to the disk and only then put it in its place; drop what is older than the one before it."""
    for path in (*written.rglob("*"), written):
        _sync(path)
    written.rename(state / written.name)
    _sync(state)
    written.parent.rmdir()
    for older in sorted(state.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)[:-KEPT]:
        shutil.rmtree(older)


def missing_bytes(folder: Path, needed: int) -> int:
    """How much more room a folder's disk would have to have for so many bytes; 0 where they fit."""
    return max(0, needed + MARGIN - shutil.disk_usage(folder).free)


def check_room(folder: Path, needed: int) -> None:
    """Raise `UserError` when a model of so many bytes does not fit, before hours of work for it."""
    if missing_bytes(folder, needed):
        free = shutil.disk_usage(folder).free
        raise UserError(f"the trained model takes {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free")


def _step(saved: Path) -> int:
    return int(saved.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
