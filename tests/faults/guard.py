"""What is watched while broken or hostile input is read: time, memory, and which files are opened."""

from __future__ import annotations

import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5  # for one record
RUN_SECONDS = 60  # for a whole verb, figures and all: it may not hang, how fast it is stands elsewhere
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
BYTES = 10**9  # on top of what the process held before


class HangError(BaseException):
    """A record took longer than `SECONDS`. No `Exception`: nobody may swallow it as a damaged file."""


@dataclass
class Watch:
    """Files opened outside `allowed`, and the most memory that the process held, in bytes, above `rest`."""

    allowed: tuple[str, ...]
    opened: list[str] = field(default_factory=list)
    rest: int = 0

    @property
    def grown(self) -> int:
        return _peak() - self.rest


_watch: Watch | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None or event != "open" or not isinstance(arguments[0], str | bytes):
        return
    name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace")
    if not str(Path(name).absolute()).startswith(_watch.allowed):
        _watch.opened.append(name)


@contextmanager
def watched(*folders: Path) -> Iterator[Watch]:
    """Note what is opened outside these folders and those of Python."""
    global _watch
    if not _hooked:
        sys.addaudithook(_note)  # cannot be taken away again
        _hooked.append(True)
    if RESET.exists():
        RESET.write_text("5")  # else more memory that was held before would hide what is taken now
    python = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    sources = str(Path(__file__).parents[2])
    _watch = Watch((*python, sources, *map(str, folders)), rest=_peak())
    try:
        yield _watch
    finally:
        _watch = None


_hooked: list[bool] = []


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `HangError` after so many seconds."""

    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    """Of resident memory: on Linux since it was reset, elsewhere since the process began."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
