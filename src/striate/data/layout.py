"""Find the data files of a folder in common layouts; skipped files are reported."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from striate.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".parquet", ".arrow")
EXPECTED = ".json, .jsonl, .parquet"
"""The suffixes listed in errors."""

ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""JSON files with metadata of a data set, not records."""

UNSUPPORTED = {
    ".tar": "unpack the WebDataset shards and write their texts as records",
    ".csv": "write it as JSON lines",
    ".tsv": "write it as JSON lines",
    ".zip": "unpack it",
    ".gz": "unpack it",
    ".tgz": "unpack it",
    ".zst": "unpack it",
    ".xz": "unpack it",
    ".bz2": "unpack it",
    ".pkl": "write it as JSON lines",
    ".xlsx": "write it as JSON lines",
}
"""Suffixes of data files that are not supported, with the fix."""

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}


def suffix_of(file: Path) -> str:
    """The suffix of a data file, one of `SUFFIXES`; empty for other files."""
    if file.name in ABOUT or file.name.startswith("."):
        return ""
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), "")


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by `save_to_disk` of a `datasets.Dataset`."""
    return (folder / "state.json").is_file() and any(folder.glob("*.arrow"))


def check_file(file: Path) -> None:
    """Raise `UserError`, with the fix, for a file that is not a supported data file."""
    if suffix_of(file):
        return
    if file.name in ABOUT:
        raise UserError(f"{file}: this is metadata of a data set, not records; give the folder or the data file")
    advice = UNSUPPORTED.get(file.suffix.lower())
    raise UserError(f"{file}: expected a {EXPECTED} file{f'; {advice}' if advice else ''}")


def data_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """The data files of a folder, or the one folder that `datasets` saved, and notes about files that are skipped.

    The files are those in the folder itself; if there are none, those in its subfolders. If files or folders are named
    after splits (train, val, test ...), those of other splits than `split` are skipped.

    Raises:
        UserError: there are no data files; the message lists files that are not supported.
    """
    if (folder / "dataset_dict.json").is_file():
        return [_saved_split(folder, split)], []
    if is_saved(folder):
        return [folder], []
    if (folder / "snapshots").is_dir():
        name = folder.name.removeprefix("datasets--").replace("--", "/")
        raise UserError(
            f"{folder}: this folder belongs to the hub's cache; give {name!r}, or a folder in its snapshots"
        )
    found = list(_files(folder))
    saved = sorted({file.parent for file in found if file.suffix == ".arrow" and is_saved(file.parent)})
    data = sorted(file for file in found if suffix_of(file) and file.parent not in saved) + saved
    own = [file for file in data if file.parent == folder]
    files, others = _select_split(own or data, folder, split)
    unsupported = Counter(
        file.suffix.lower() for file in found if not suffix_of(file) and file.suffix.lower() in UNSUPPORTED
    )
    amounts = ", ".join(f"{number} {suffix}" for suffix, number in unsupported.items())
    if not files:
        more = f"; it holds {amounts}: {UNSUPPORTED[next(iter(unsupported))]}" if unsupported else ""
        raise UserError(f"{folder}: no {EXPECTED} file in this folder{more}")
    notes = [
        f"{folder}: files of other splits are skipped: {_name_list(others, folder)}" if others else "",
        f"{folder}: files in subfolders are skipped: {_name_list(set(data) - set(own), folder)}" if own else "",
        f"{folder}: skipped: {amounts}" if unsupported else "",
    ]
    return files, [note for note in notes if note and not note.endswith(": ")]


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders with a suffix of a data file, supported or not."""
    known = (*SUFFIXES, *UNSUPPORTED)
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A folder with the name of a data file is reported when it is read.
        yield from (Path(place, name) for name in (*names, *folders) if name.lower().endswith(known))


def _name_list(files: Iterable[Path], folder: Path) -> str:
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _select_split(files: list[Path], folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Files of the split or of no split, and files of other splits. If no file is of the split, all are used."""

    def splits(file: Path) -> set[str]:
        words = set(re.split("[^a-z]+", file.relative_to(folder).as_posix().lower()))
        return {name for name, known in SPLITS.items() if words & known} | ({split} if split in words else set())

    if not any(split in splits(file) for file in files):
        return files, []
    others = [file for file in files if splits(file) and split not in splits(file)]
    return [file for file in files if file not in others], others


def _saved_split(folder: Path, split: str) -> Path:
    """The folder of one split, as written by `save_to_disk` of a `datasets.DatasetDict`."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(f"{folder}: its dataset_dict.json is corrupted; save the data set again") from error
    if split not in splits:
        raise UserError(f"{folder}: no split {nearest(split, splits)}")
    return folder / split
