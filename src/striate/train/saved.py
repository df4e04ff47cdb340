"""The saved states of a training run, written atomically, and while training continues.

A state is a folder of three files: the trained weights, the tensors of the optimizer, and everything else (random
states, progress).
"""

from __future__ import annotations

import io
import os
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from striate.distributed import Rank
from striate.errors import UserError, first_line
from striate.train.sharding import shard_like, whole
from striate.weights import CODES, StoredTensor, file_tensors, write_file

TRAINED, MOMENTS, REST = "trained.safetensors", "optimizer.safetensors", "state.pt"

PREFIX = "step-"  # of the folder of a state
PART = "part"  # the folder of the state being written
KEEP = 2  # complete states
MARGIN = 2**20  # bytes for small files

Tensors = dict[str, Tensor]


@dataclass
class StateWriter:
    """Writes states into `folder`, one at a time.

    With `background` a state is copied to the CPU, and a thread writes the copy while training continues; the copies'
    memory is kept for the next state. Without it, the state is written from where it lies. Sharded tensors are gathered
    one at a time, and kept by the first process only. As a context it waits at its end until the last state is written.
    """

    folder: Path
    rank: Rank
    background: bool
    step: int = 0
    """of the last state"""
    _copies: Tensors = field(default_factory=dict)
    _needed: int = 0
    _thread: Thread | None = None
    _error: Exception | None = None

    def save(self, step: int, files: Mapping[str, Tensors], rest: Any) -> None:
        """Save a state: `files` of tensors by name, and `rest`. All processes take part.

        The state before has to be `finish`ed. What goes wrong, `finish` tells.
        """
        self.step, self._needed = step, size_of(files)
        gathered = ((name, whole(t.detach())) for tensors in files.values() for name, t in tensors.items())
        if not self.rank.first:
            deque(gathered, maxlen=0)
            return
        buffer = io.BytesIO()
        torch.save(rest, buffer)  # now: it refers to what training changes
        values = iter(self._copy(gathered)) if self.background else (value.cpu() for _, value in gathered)
        stored = {
            file: [
                StoredTensor(name, tuple(t.shape), CODES[t.dtype], partial(next, values)) for name, t in tensors.items()
            ]
            for file, tensors in files.items()
        }
        if self.background:
            self._thread = Thread(target=self._write, args=(stored, buffer.getvalue()), daemon=True)
            self._thread.start()
        else:
            self._write(stored, buffer.getvalue())
            deque(gathered, maxlen=0)  # after an error: the other processes gather to the end

    def finish(self) -> str:
        """Wait until the state is on the disk; the reason if it is not because the disk is full, else empty."""
        if self._thread:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None:
            return ""
        if isinstance(error, OSError):
            shutil.rmtree(self.folder / PART, ignore_errors=True)
            if missing_bytes(self.folder, self._needed):
                return first_line(error)
        raise error

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the thread, unless training was stopped at once."""
        if self._thread and kind is not KeyboardInterrupt:
            self._thread.join()

    def _copy(self, values: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Copies on the CPU, in memory that is used again: new memory takes ten times as long to write."""
        copied = []
        for name, value in values:
            if name not in self._copies:
                self._copies[name] = torch.empty(value.shape, dtype=value.dtype)
            copied.append(self._copies[name].copy_(value))
        return copied

    def _write(self, files: Mapping[str, list[StoredTensor]], rest: bytes) -> None:
        part = self.folder / PART
        try:
            shutil.rmtree(part, ignore_errors=True)  # of a killed run
            part.mkdir()
            for name, tensors in files.items():
                write_file(part / name, tensors)
            (part / REST).write_bytes(rest)
            commit_state(part, self.step)
        except Exception as error:  # raised by `finish`
            self._error = error


def size_of(files: Mapping[str, Tensors]) -> int:
    """Bytes of a state's tensors, which may be sharded."""
    return sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())


def split_moments(state: dict[str, Any]) -> tuple[Tensors, dict[int, Any]]:
    """Of the state in an optimizer's state dict the tensors, named by parameter and key (`3.exp_avg`), and the rest."""
    moments = {
        f"{index}.{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    rest = {
        index: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for index, values in state["state"].items()
    }
    return moments, rest


def load_optimizer(optimizer: torch.optim.Optimizer, moments: Path, rest: dict[int, Any]) -> None:
    """Load what `split_moments` split; each process takes its shards, for any number of processes. Rates and weight
    decay are those of now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for one in file_tensors(moments):
        index, _, key = one.name.partition(".")
        rest[int(index)][key] = shard_like(parameters[int(index)], one.read())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": rest})


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
