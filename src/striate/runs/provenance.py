"""The inputs of a run, by digests of their content: paths do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from striate.data.layout import data_files
from striate.vlm.reading import model_folder

# Of larger weight files 1024 evenly spaced blocks are read: any change of at least a thousandth of the file is found.
WHOLE, BLOCKS, BLOCK = 64 * 2**20, 1024, 4096
# Files that a model or a folder of records is read from; cards and figures beside them do not matter.
SUFFIXES = (".json", ".jsonl", ".ndjson", ".gz", ".parquet", ".arrow", ".safetensors", ".jinja", ".model", ".txt")
# The part of striate's own source that trained weights depend on.
TRAINING = ("data/**/*.py", "region.py", "routing/**/*.py", "train/**/*.py", "vlm/**/*.py", "weights.py")


def content_of(path: str | Path, *, split: str | None = None) -> dict[str, str]:
    """Digests of the files of a model, a run's checkpoint or a folder of records, by name; of a single file, by "".

    With a `split`, those of a folder of records include the files in subfolders that are read for it. A hub id is not
    resolved: it is identified by its name.

    Raises:
        UserError: there are no records for the split.
    """
    source = Path(model_folder(path))
    if source.is_file():
        return {"": digest(source)}
    if not source.is_dir():
        return {str(path): "of the hub"}
    places = [source, *(data_files(source, split)[0] if split else ())]
    files = {file for place in places for file in (place.iterdir() if place.is_dir() else [place])}
    return {
        file.relative_to(source).as_posix(): digest(file)
        for file in sorted(files)
        if file.suffix.lower() in SUFFIXES and file.is_file()
    }


def digest(file: Path) -> str:
    """SHA-256 of a file; of a weight file larger than 64 MiB, of its size and 1024 blocks of 4 KiB."""
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
    """Digest of striate's own training code."""
    sources = Path(__file__).parents[1]
    found = hashlib.sha256()
    for file in sorted(file for pattern in TRAINING for file in sources.glob(pattern)):
        found.update(f"{file.relative_to(sources)} {digest(file)}".encode())
    return f"sha256 {found.hexdigest()}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Descriptions of all differences."""
    for key in [*now, *(key for key in before if key not in now)]:
        was, is_now = before.get(key), now.get(key)
        if was == is_now:
            continue
        if any("sha256" in str(value) for value in (was, is_now)):
            yield f"the content of {key} has changed"
        else:
            yield f"{key} was {was}, now it is {is_now}"


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A description of the first difference; empty if there is none."""
    return next(differences(before, now), "")
