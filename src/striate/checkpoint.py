"""Checkpoint folders from strangers: what is refused before any of it is read for what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from striate.errors import UserError

INDEX = ".index.json"  # how the name of a table ends that says which file has which weight


def check_folder(folder: Path) -> None:
    """Look at the files of a checkpoint; what is no folder is not looked at.

    Raises:
        UserError: a file is a link to somewhere outside, an index leads outside, or a safetensors file is damaged or
            claims to hold what it does not.
    """
    if not folder.is_dir():
        return
    reach = _reach(folder)
    for file in sorted(folder.iterdir()):
        if not file.resolve().is_relative_to(reach):
            raise UserError(f"{file} is a link out of its folder and is not followed: put the file itself there")
        if file.suffix == ".safetensors":
            _check_header(file)
        elif file.name.endswith(INDEX):
            _check_index(file)


def _reach(folder: Path) -> Path:
    """Where the files may lie: in the folder, or with the hub's own cache among all that it has of the model."""
    place = folder.resolve()
    cached = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    return place.parent.parent if cached else place


def _check_header(file: Path) -> None:
    # safetensors compares what the header claims with the size of the file, and reads no weight for it.
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; download it again") from error


def _check_index(file: Path) -> None:
    try:
        listed: Any = json.loads(file.read_bytes())["weight_map"].values()
        leading_out = [name for name in listed if Path(name).name != name]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {type(error).__name__}; download it again") from error
    if leading_out:
        raise UserError(f"{file} leads out of its folder, to {leading_out[0]!r}: refused")
