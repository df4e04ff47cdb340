"""Records that stay in their JSON files: where each one is, and how much there is of it, is all that memory holds."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

from striate.data.images import ImageFolder
from striate.data.record import Record, RecordError
from striate.data.spelling import record_of
from striate.errors import UserError

BLOCK = 2**22
"""Bytes of a file that are read at a time."""


class Size(NamedTuple):
    """How much there is of a record."""

    characters: int
    images: int

    @classmethod
    def of(cls, record: Record) -> Size:
        """Count its texts' characters and its images."""
        texts = [len(part["text"]) for message in record.messages for part in message["content"] if "text" in part]
        return cls(len(record.text) + sum(texts), len(record.images))


@dataclass(frozen=True)
class JsonFile:
    """A file of JSON, as it was when it was read (`stamp`), and the folder of its images."""

    path: Path
    folder: ImageFolder
    stamp: int

    @classmethod
    def of(cls, path: Path, folder: ImageFolder) -> JsonFile:
        """The file as it is now."""
        return cls(path.absolute(), folder, os.stat(path).st_mtime_ns)

    def bytes_at(self, start: int, length: int) -> bytes:
        """A part of it.

        Raises:
            UserError: it has been written again, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != self.stamp:
                    raise UserError(f"{self.path} has changed since its records were read: start again")
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sound record is: `length` bytes from `start` on. `number` is what its source is called by."""

    file: JsonFile
    number: int
    start: int
    length: int
    size: Size

    def record(self) -> Record:
        """Read it once more; its images are looked up once more, too.

        Raises:
            RecordError: an image is gone.
            UserError: the file has changed.
        """
        source = f"{self.file.path.name}:{self.number}"
        return record_of(parsed(self.file.bytes_at(self.start, self.length), source), source, self.file.folder)


class Stored(Sequence[Record]):
    """Records, each in memory or read from its place when it is asked for."""

    def __init__(self, entries: Iterable[Record | Place]) -> None:
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Record | Stored:
        if isinstance(index, slice):
            return Stored(self.entries[index])
        entry = self.entries[index]
        return entry.record() if isinstance(entry, Place) else entry

    def take(self, indices: Iterable[int]) -> Stored:
        """Some of them, in that order."""
        return Stored(self.entries[index] for index in indices)

    def size(self, index: int) -> Size:
        """How much there is of one, without reading it."""
        entry = self.entries[index]
        return entry.size if isinstance(entry, Place) else Size.of(entry)


def parsed(data: bytes, source: str) -> Any:
    """JSON in UTF-8.

    Raises:
        RecordError: it is none, or too deep or too long a number for Python.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise broken(source, error) from None


def broken(source: str, why: object) -> RecordError:
    """What is said of a file or line that is not JSON."""
    return RecordError(source, f"not valid JSON ({why}); mend or remove it")


class Element(NamedTuple):
    """A value in a file: `length` bytes from `start` on. Of a line, the bytes themselves."""

    number: int
    start: int
    length: int
    value: Any


def lines(file: BinaryIO) -> Iterator[Element]:
    """The lines of a file that are not blank, numbered from 1, to be parsed one by one."""
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield Element(number, start, len(line), line)
        start += len(line)


def elements(file: BinaryIO, name: str) -> Iterator[Element]:
    """The elements of a JSON list, numbered from 1; a file of any size takes the memory of a block.

    Raises:
        RecordError: it is not a JSON list; says what is wrong, and the line and column.
    """
    window, number = _Window(file, name), 0
    window.sign("[")
    sign = window.sign("]", optional=True)
    while sign != "]":
        number += 1
        yield window.element(number)
        sign = window.sign(",]")
    window.end()


_SPACE = re.compile(r"[ \t\n\r]*")


class _Window:
    """A stretch of a JSON file as text, that moves on by the block.

    `at` is the place in the text, `start` the byte in the file that lies there; the text begins at `line` and `column`.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.column = "", 0, 1, 1
        mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.start = file.seek(len(codecs.BOM_UTF8) if mark else 0)
        self.parse = json.JSONDecoder().raw_decode

    def element(self, number: int) -> Element:
        """The value that begins here."""
        while True:
            try:
                value, end = self.parse(self.text, self.at)
            except json.JSONDecodeError as error:  # perhaps only because the rest is not there yet
                ahead = error.pos - self.at
                if not self._grow():
                    raise self._wrong(error.msg, self.at + ahead) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._wrong(str(error), self.at) from None
            if end < len(self.text) or not self._grow():  # a number at the end of the text may go on
                break
        length = len(self.text[self.at : end].encode())
        found = Element(number, self.start, length, value)
        self.at, self.start = end, self.start + length
        return found

    def sign(self, expected: str, *, optional: bool = False) -> str:
        """The next character, one of those `expected`, and the space around it; empty where it may be another."""
        self._pass_space()
        found = self.text[self.at : self.at + 1]
        if found and found in expected:
            self.at, self.start = self.at + 1, self.start + 1
            self._pass_space()
            return found
        if not optional:
            raise self._wrong(f"expected {' or '.join(expected)}", self.at)
        return ""

    def end(self) -> None:
        """Nothing follows."""
        if self.at < len(self.text):
            raise self._wrong("extra data", self.at)

    def _pass_space(self) -> None:
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it matches nothing, too
            self.start += space.end() - self.at
            self.at = space.end()
            if self.at < len(self.text) or not self._grow():
                return

    def _grow(self) -> bool:
        """Drop the text behind, and take at least as much again as is left; false at the end of the file."""
        self.line, self.column = self._position(self.at)
        self.text, self.at = self.text[self.at :], 0
        data = self.file.read(max(BLOCK, len(self.text)))
        try:
            more = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._wrong(str(error), len(self.text)) from None
        self.text += more
        return bool(data)

    def _position(self, at: int) -> tuple[int, int]:
        """Line and column of a place in the text, both from 1."""
        breaks = self.text.count("\n", 0, at)
        return self.line + breaks, (at - self.text.rfind("\n", 0, at) if breaks else self.column + at)

    def _wrong(self, what: str, at: int) -> RecordError:
        line, column = self._position(at)
        return broken(self.name, f"{what}: line {line} column {column}")
