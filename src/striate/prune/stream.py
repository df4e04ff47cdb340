"""Copying safetensors files with some tensors left out and others renamed, a megabyte at a time.

A safetensors file is the length of a header (8 bytes), the header (JSON: for every tensor its type, shape and place)
and the tensors' bytes one after the other. Bytes are copied, not read as tensors: so any type will do, quantised ones
included, and memory does not grow with the size of a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from striate.errors import UserError
from striate.score.weights import INDEX

WEIGHTS = "model.safetensors"
CHUNK = 1 << 20
"""Bytes at a time: they stay in the processor's cache on their way."""

Rename = Callable[[str], str | None]
"""From a tensor's name to its new name, or to None where it goes."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header, and where in the file its first tensor starts."""

    path: Path
    header: dict[str, Any]
    start: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header.

        Raises:
            UserError: the file is no safetensors file, or shorter than it says.
        """
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= path.stat().st_size else None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if not isinstance(header, dict):
            raise UserError(f"{path} is no safetensors file")
        shard = cls(path, header, 8 + length)
        if path.stat().st_size != shard.start + max((t["data_offsets"][1] for t in shard.tensors.values()), default=0):
            raise UserError(f"{path} is damaged: it is not as long as its header says; copy or download it again")
        return shard

    @property
    def tensors(self) -> dict[str, Any]:
        """Name to {"dtype", "shape", "data_offsets"}, in the order of the bytes."""
        named = {name: about for name, about in self.header.items() if name != "__metadata__"}
        return dict(sorted(named.items(), key=lambda item: item[1]["data_offsets"]))

    def copy(self, target: Path, rename: Rename) -> dict[str, Any]:
        """Write the file anew; returns the header's entries of the tensors in it. Without any, no file is written."""
        header: dict[str, Any] = {}
        spans: list[tuple[int, int]] = []
        place = 0
        for old, about in self.tensors.items():
            if (new := rename(old)) is not None:
                begin, end = about["data_offsets"]
                header[new] = about | {"data_offsets": [place, place + end - begin]}
                spans.append((self.start + begin, self.start + end))
                place += end - begin
        if header:
            self._write(target, header, _joined(spans))
        return header

    def _write(self, target: Path, header: dict[str, Any], spans: Iterable[tuple[int, int]]) -> None:
        metadata = {"__metadata__": self.header["__metadata__"]} if "__metadata__" in self.header else {}
        text = json.dumps(metadata | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        with self.path.open("rb") as source, target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for begin, end in spans:
                _copy_bytes(source, file, begin, end)


def stored(folder: Path) -> list[Shard]:
    """The safetensors files of a checkpoint, the one or those of the index.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if (folder / WEIGHTS).is_file():  # as transformers does: the single file wins
        return [Shard.open(folder / WEIGHTS)]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: weights are read from safetensors only")
    names = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
    return [Shard.open(folder / name) for name in sorted(set(names))]


def copy_weights(source: Path, target: Path, rename: Rename) -> None:
    """Copy a checkpoint's weights, file by file, and its index with the new names.

    Raises:
        UserError: the source cannot be read.
        OSError: the target cannot be written.
    """
    weight_map: dict[str, str] = {}
    size = lost = 0
    for shard in stored(source):
        written = shard.copy(target / shard.path.name, rename)
        weight_map |= dict.fromkeys(written, shard.path.name)
        size += sum(end - begin for begin, end in (about["data_offsets"] for about in written.values()))
        lost += _count(shard.tensors) - _count(written)
    if (source / WEIGHTS).is_file():
        return
    index = json.loads((source / INDEX).read_bytes())
    metadata = index.get("metadata", {}) | {"total_size": size}
    if "total_parameters" in metadata:  # packed and tied ones are counted as they were
        metadata["total_parameters"] -= lost
    index |= {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _count(tensors: dict[str, Any]) -> int:
    return sum(math.prod(about["shape"]) for about in tensors.values())


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans of bytes, those that follow on each other as one."""
    begin, end = spans[0]
    for next_begin, next_end in spans[1:]:
        if next_begin != end:
            yield begin, end
            begin = next_begin
        end = next_end
    yield begin, end


def _copy_bytes(source: BinaryIO, target: BinaryIO, begin: int, end: int) -> None:
    buffer = memoryview(bytearray(min(CHUNK, end - begin)))
    source.seek(begin)
    while begin < end:
        read = source.readinto(buffer[: end - begin])  # type: ignore[attr-defined]
        if not read:
            raise UserError(f"{source.name} became shorter while it was read")
        target.write(buffer[:read])
        begin += read
