"""What a run is made from, by content: the same bytes in another place are the same, another byte is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from striate.run import model_folder

# Larger files are weights: 1024 blocks, evenly spread, find any change of at least a thousandth of the file.
WHOLE, BLOCKS, BLOCK = 64 * 2**20, 1024, 4096
# What a model or a folder of records is read from; cards and figures beside it do not matter.
SUFFIXES = (".json", ".jsonl", ".parquet", ".safetensors", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Contents:
    """Contents by path, each looked at once."""

    seen: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, path: str | Path) -> dict[str, str]:
        """As `content_of` gives it."""
        if str(path) not in self.seen:
            self.seen[str(path)] = content_of(path)
        return self.seen[str(path)]


def content_of(path: str | Path) -> dict[str, str]:
    """Digests of the files of a model, a run's checkpoint or a folder of records, by name; of one file, without a name.

    A name of the hub stands for itself: what is behind it is not looked at.
    """
    place = Path(model_folder(path))
    if place.is_file():
        return {"": digest(place)}
    if not place.is_dir():
        return {str(path): "of the hub"}
    return {file.name: digest(file) for file in sorted(place.iterdir()) if file.suffix in SUFFIXES and file.is_file()}


def digest(file: Path) -> str:
    """SHA-256 of a file: of all of it up to 64 MiB, of its size and 1024 blocks of 4 KiB of a larger one of weights."""
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= WHOLE or file.suffix != ".safetensors":
            return f"sha256 {hashlib.file_digest(content, 'sha256').hexdigest()}"
        found = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            content.seek(block * (size - BLOCK) // (BLOCKS - 1))
            found.update(content.read(BLOCK))
        return f"sha256 of blocks {found.hexdigest()}"


def code() -> str:
    """Digest of striate's own source."""
    sources = Path(__file__).parent
    found = hashlib.sha256()
    for file in sorted(sources.rglob("*.py")):
        found.update(f"{file.relative_to(sources)} {digest(file)}".encode())
    return f"sha256 {found.hexdigest()}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is not the same, in words."""
    for key in [*now, *(key for key in before if key not in now)]:
        was, is_now = before.get(key), now.get(key)
        if was == is_now:
            continue
        if any("sha256" in str(value) for value in (was, is_now)):
            yield f"the content of {key} is another"
        else:
            yield f"{key} was {was}, now it is {is_now}"


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing that is not the same, in words; empty when all is."""
    return next(differences(before, now), "")
