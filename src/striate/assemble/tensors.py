"""Tensors of a checkpoint one at a time: read from safetensors or `.bin` files, written to safetensors shards.

Peak memory is about one tensor. An old `.bin` that cannot be mapped into memory (not a zip archive) is the exception:
then it is one such file.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from striate.checkpoint import check_folder
from striate.errors import UserError
from striate.vlm import first_line

# By name of the file that holds all weights; the index of a sharded checkpoint is that name with `.index.json`.
WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARD_BYTES = 5 * 10**9
"""Most bytes a written file, as `save_pretrained` chose for long."""

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of weights, as a safetensors header writes them."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is read, or made, when it is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: str = ""

    @property
    def num_bytes(self) -> int:
        """Size in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def made(self, make: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None) -> Stored:
        """The same tensor with something done to it after it is read."""
        return replace(self, read=lambda: make(self.read()), shape=shape or self.shape)

    def cast(self, dtype: torch.dtype) -> Stored:
        """The same tensor in another type."""
        return replace(self, read=lambda: self.read().to(dtype), dtype=dtype)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, safetensors before `.bin`; empty where there are none.

    Raises:
        UserError: the index cannot be read, or names a file that is missing; a folder that `check_folder` refuses.
    """
    check_folder(folder)
    for name in WHOLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                files = sorted({folder / file for file in json.loads(index.read_bytes())["weight_map"].values()})
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"cannot read {index}: {error}") from error
            if missing := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{folder} lacks {missing[0]}, which {index.name} names; download it again")
            return files
    return []


def stored(file: Path) -> Iterator[Stored]:
    """Every tensor of one file.

    Raises:
        UserError: the file is damaged, needs code to be unpickled, or holds something else than weights.
    """
    for name, shape, dtype in _bin_table(file) if file.suffix != ".safetensors" else _safetensors_table(file):
        yield Stored(name, shape, dtype, _reader(file, name), str(file))


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    if file.suffix == ".safetensors":
        return lambda: _read_safetensors(file, name)
    return lambda: _unpickled(file)[name]


def _safetensors_table(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    types = {code: dtype for dtype, code in CODES.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    # Integers are counters and positions, whose names are ignored later on, or quantised weights, which are not.
    return [(name, shape, types.get(code, torch.int64)) for name, shape, code in found]


def _read_safetensors(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _bin_table(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(value.shape), value.dtype) for name, value in _unpickled(file).items()]


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped where its format allows; code in it is never run."""
    about = file.stat()
    return _unpickled_once(file, about.st_mtime_ns, about.st_size)  # a file written anew is another file


@lru_cache(maxsize=2)  # a shard of the base and what is merged into it
def _unpickled_once(file: Path, _changed: int, _size: int) -> dict[str, Tensor]:
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no zip archive
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors and would run code when it is read: refused; "
            "ask its author for safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} is no table of tensors by name")
    return found


def write(folder: Path, tensors: Iterable[Stored], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as a checkpoint's safetensors files, one tensor in memory at a time.

    Raises:
        UserError: a tensor is of a type that weights do not have (quantised ones).
        OSError: the folder cannot be written.
    """
    # By source file and place in it: so that a file that cannot be mapped is read once.
    shards = _shards(sorted(tensors, key=lambda one: one.file), shard_bytes)
    try:
        _write_files(folder, shards)
    finally:
        _unpickled_once.cache_clear()


def _write_files(folder: Path, shards: list[list[Stored]]) -> None:
    if len(shards) == 1:
        _write_file(folder / WHOLE[0], shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= dict.fromkeys((one.name for one in shard), name)
    size = sum(one.num_bytes for shard in shards for one in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{WHOLE[0]}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: list[Stored], shard_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    size = 0
    for one in tensors:
        if one.dtype not in CODES:
            raise UserError(f"{one.name} is stored as {one.dtype}: give the checkpoint that was not quantised")
        if shards[-1] and size + one.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.num_bytes
    return shards


def _write_file(path: Path, tensors: list[Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for one in tensors:
        span = [place, place + one.num_bytes]
        header[one.name] = {"dtype": CODES[one.dtype], "shape": list(one.shape), "data_offsets": span}
        place += one.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            _write_tensor(file, one)


def _write_tensor(file: BinaryIO, one: Stored) -> None:
    value = one.read().detach()
    assert tuple(value.shape) == one.shape, one.name
    assert value.dtype == one.dtype, one.name
    file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
