"""Records that stay in their JSON files: memory holds only their positions and sizes."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

from striate.data.format import record_of
from striate.data.images import ImageFolder
from striate.data.record import Record, RecordError
from striate.errors import UserError

BLOCK = 2**22
"""Number of bytes read at a time."""


class RecordSize(NamedTuple):
    """Number of text characters and images of a record."""

    characters: int
    images: int

    @classmethod
    def of(cls, record: Record) -> RecordSize:
        """Count the characters and images of a record."""
        texts = [len(part["text"]) for message in record.messages for part in message["content"] if "text" in part]
        return cls(len(record.text) + sum(texts), len(record.images))


@dataclass(frozen=True)
class JsonFile:
    """A JSON file, its modification time when it was read (`stamp`), and its image folder."""

    path: Path
    folder: ImageFolder
    stamp: int

    @classmethod
    def of(cls, path: Path, folder: ImageFolder) -> JsonFile:
        """The file with its current modification time."""
        return cls(path.absolute(), folder, os.stat(path).st_mtime_ns)

    def bytes_at(self, start: int, length: int) -> bytes:
        """Read part of the file.

        Raises:
            UserError: the file has changed, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != self.stamp:
                    raise UserError(f"{self.path} has changed since its records were read: run the command again")
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class RecordLocation:
    """The position of a valid record: `length` bytes from offset `start`. `number` is that in its source."""

    file: JsonFile
    number: int
    start: int
    length: int
    size: RecordSize

    def record(self) -> Record:
        """Read the record again, and look up its images again.

        Raises:
            RecordError: an image no longer exists.
            UserError: the file has changed.
        """
        source = f"{self.file.path.name}:{self.number}"
        return record_of(parse_json(self.file.bytes_at(self.start, self.length), source), source, self.file.folder)


class LazyRecords(Sequence[Record]):
    """A sequence of records, each in memory or read from its file on access."""

    def __init__(self, entries: Iterable[Record | RecordLocation]) -> None:
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> LazyRecords: ...
    def __getitem__(self, index: int | slice) -> Record | LazyRecords:
        if isinstance(index, slice):
            return LazyRecords(self.entries[index])
        entry = self.entries[index]
        return entry.record() if isinstance(entry, RecordLocation) else entry

    def take(self, indices: Iterable[int]) -> LazyRecords:
        """The records at these indices, in this order."""
        return LazyRecords(self.entries[index] for index in indices)

    @property
    def sizes(self) -> list[RecordSize]:
        """The size of every record, without reading any."""
        return [one.size if isinstance(one, RecordLocation) else RecordSize.of(one) for one in self.entries]

    @property
    def has_images(self) -> bool:
        """Whether any record has an image."""
        return any(size.images for size in self.sizes)


def parse_json(data: bytes, source: str) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        RecordError: the data is not valid JSON, holds NaN or Infinity, or exceeds Python's limits for depth or numbers.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if not _surely_finite(data) and (place := _nonfinite_path(value)):
            raise ValueError(f"{place} is not finite; write null for a missing value")
    except (ValueError, RecursionError) as error:
        raise json_error(source, error) from None
    return value


def _surely_finite(data: bytes) -> bool:
    """Whether JSON certainly has only finite numbers, by a search for the two words."""
    return b"NaN" not in data and b"Infinity" not in data


def _nonfinite_path(value: Any, place: str = "") -> str:
    """The path of the first number that is not finite, such as `choices[2]`; empty for none."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    name = "{0}.{1}" if isinstance(value, dict) else "{0}[{1}]"
    places = (_nonfinite_path(one, name.format(place, key).lstrip(".")) for key, one in inner)
    return next(filter(None, places), "")


def json_error(source: str, why: object) -> RecordError:
    """The error for a file or line that is not valid JSON."""
    return RecordError(source, f"not valid JSON ({why}); fix or remove it")


class JsonElement(NamedTuple):
    """A value of `length` bytes at offset `start`; unparsed bytes for lines and where NaN or Infinity may be in it."""

    number: int
    start: int
    length: int
    value: Any


def json_lines(file: BinaryIO) -> Iterator[JsonElement]:
    """The nonblank lines of a file, unparsed, numbered from 1."""
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield JsonElement(number, start, len(line), line)
        start += len(line)


def json_elements(file: BinaryIO, name: str) -> Iterator[JsonElement]:
    """The elements of a JSON list, numbered from 1; memory holds one block of the file.

    Raises:
        RecordError: the file is not a JSON list; the message has the line and column.
    """
    window, number = _Window(file, name), 0
    window.expect("[")
    character = window.expect("]", optional=True)
    while character != "]":
        number += 1
        yield window.element(number)
        character = window.expect(",]")
    window.end()


_SPACE = re.compile(r"[ \t\n\r]*")


class _Window:
    """A block of a JSON file as text, which advances through the file.

    `at` is the position in the text, `start` its offset in the file; the text begins at `line` and `column`.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.column = "", 0, 1, 1
        mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.start = file.seek(len(codecs.BOM_UTF8) if mark else 0)
        self.parse = json.JSONDecoder().raw_decode

    def element(self, number: int) -> JsonElement:
        """Parse the value at the current position."""
        while True:
            try:
                value, end = self.parse(self.text, self.at)
            except json.JSONDecodeError as error:  # the value may continue in the next block
                ahead = error.pos - self.at
                if not self._grow():
                    raise self._error(error.msg, self.at + ahead) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self.at) from None
            if end < len(self.text) or not self._grow():  # a number at the end of the text may continue
                break
        data = self.text[self.at : end].encode()
        found = JsonElement(number, self.start, len(data), value if _surely_finite(data) else data)
        self.at, self.start = end, self.start + len(data)
        return found

    def expect(self, expected: str, *, optional: bool = False) -> str:
        """Read a character of `expected` and the space around it; empty if `optional` and the next is another."""
        self._skip_space()
        found = self.text[self.at : self.at + 1]
        if found and found in expected:
            self.at, self.start = self.at + 1, self.start + 1
            self._skip_space()
            return found
        if not optional:
            raise self._error(f"expected {' or '.join(expected)}", self.at)
        return ""

    def end(self) -> None:
        """Check that nothing follows."""
        if self.at < len(self.text):
            raise self._error("extra data", self.at)

    def _skip_space(self) -> None:
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # the pattern also matches an empty string
            self.start += space.end() - self.at
            self.at = space.end()
            if self.at < len(self.text) or not self._grow():
                return

    def _grow(self) -> bool:
        """Drop the parsed text and read at least as much as is left; false at the end of the file."""
        self.line, self.column = self._position(self.at)
        self.text, self.at = self.text[self.at :], 0
        data = self.file.read(max(BLOCK, len(self.text)))
        try:
            more = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._error(str(error), len(self.text)) from None
        self.text += more
        return bool(data)

    def _position(self, at: int) -> tuple[int, int]:
        """Line and column of a position in the text, both from 1."""
        breaks = self.text.count("\n", 0, at)
        return self.line + breaks, (at - self.text.rfind("\n", 0, at) if breaks else self.column + at)

    def _error(self, what: str, at: int) -> RecordError:
        line, column = self._position(at)
        return json_error(self.name, f"{what}: line {line} column {column}")
