"""Weight files of a checkpoint: finding, reading, copying and writing them, one tensor at a time.

The files are chosen as `transformers` does: the file that config.json names (`transformers_weights`), else
model.safetensors, else the shards listed in its index; other files are ignored. A safetensors file consists of the
header length (8 bytes), the header (JSON: dtype, shape and offsets of every tensor) and the bytes of the tensors.
Unchanged tensors are copied as bytes, one MiB at a time, whatever their dtype, also quantized; changed tensors are in
memory one at a time. An old `.bin` that is not a zip archive cannot be memory-mapped: then one whole file is in memory.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from striate.errors import UserError, first_line

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
INDEX = WEIGHTS + INDEX_SUFFIX
SHARD_BYTES = 5 * 10**9
"""Largest size of a written shard in bytes, a former default of `save_pretrained`."""
CHUNK = 1 << 20
"""Bytes copied at a time; they fit in the CPU cache."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Torch dtypes by their codes in a safetensors header."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Codes of weights that are not quantized."""

Rename = Callable[[str], str | None]
"""Maps a tensor's name to its new name, or to None to leave the tensor out."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, read lazily by `read`.

    `code` is its dtype in a safetensors header; `span` the offsets of its bytes in `file`, None where they cannot be
    copied (the tensor is transformed, or in a `.bin`).
    """

    name: str
    shape: tuple[int, ...]
    code: str
    read: Callable[[], Tensor]
    file: Path = Path()
    span: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype; None where torch has none for it."""
        return DTYPES.get(self.code)

    @property
    def num_bytes(self) -> int:
        """Size on disk in bytes."""
        if self.span is not None:
            return self.span[1] - self.span[0]
        return math.prod(self.shape) * DTYPES[self.code].itemsize

    def transform(self, function: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None) -> StoredTensor:
        """The tensor with a function applied after it is read."""
        return replace(self, read=lambda: function(self.read()), shape=shape or self.shape, span=None)

    def cast(self, dtype: torch.dtype) -> StoredTensor:
        """The tensor converted to another dtype."""
        return replace(self, read=lambda: self.read().to(dtype), code=CODES[dtype], span=None)


# Finding files


def weight_files(folder: Path, *, pickles: bool = False) -> list[Path]:
    """The weight files of a checkpoint, with `pickles` also `.bin`; empty when there are none.

    Raises:
        UserError: an index cannot be read, points outside the folder or lists a file that is missing.
    """
    entry = _entry(folder, pickles)
    if entry is None:
        return []
    return _shard_files(entry) if entry.name.endswith(INDEX_SUFFIX) else [entry]


def _entry(folder: Path, pickles: bool) -> Path | None:
    """The single weight file, or the index of the shards."""
    if named := _file_in_config(folder):
        return folder / named
    names = (WEIGHTS, INDEX, *((PICKLED, PICKLED + INDEX_SUFFIX) if pickles else ()))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _file_in_config(folder: Path) -> str:
    try:
        named = json.loads((folder / "config.json").read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):  # reported when the config is loaded
        return ""
    if isinstance(named, str) and Path(named).name != named:
        raise UserError(
            f"{folder / 'config.json'} points outside its folder, to {named!r}; use a file name without a path",
            see="untrusted-checkpoint",
        )
    return named if isinstance(named, str) else ""


def _shard_files(index: Path) -> list[Path]:
    try:
        names: list[Any] = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cannot read {index}: {type(error).__name__}; download it again", see="missing-weights"
        ) from error
    if outside:
        raise UserError(
            f"{index} points outside its folder, to {outside[0]!r}; use file names without a path",
            see="untrusted-checkpoint",
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent} lacks {missing[0]}, which {index.name} lists; download it again", see="missing-weights"
        )
    return [index.parent / name for name in names]


def need_weights(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        UserError: there are none; the message says how to convert a `.bin`.
    """
    if files := weight_files(folder):
        return files
    advice = ""
    if weight_files(folder, pickles=True):
        advice = f"; convert {PICKLED}: load it with transformers and save it with save_pretrained"
    raise UserError(f"{folder} has no {WEIGHTS}: weights are read from safetensors only{advice}")


def check_folder(folder: Path) -> None:
    """Check the files of an untrusted checkpoint before their content is used; does nothing for a hub id.

    Raises:
        UserError: a link or an index points outside the folder, or a weight file is corrupted or has a wrong header.
    """
    if not folder.is_dir():
        return
    root = _allowed_root(folder)
    for file in sorted(folder.iterdir()):
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} is a link that points outside its folder; replace it by the file itself",
                see="untrusted-checkpoint",
            )
    for file in weight_files(folder):
        _check_header(file)


def _allowed_root(folder: Path) -> Path:
    """The folder that links may point into: the checkpoint, or in the hub's cache the folder of the model."""
    root = folder.resolve()
    cached = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    return root.parent.parent if cached else root


def _check_header(file: Path) -> None:
    # safetensors checks the header against the file size without reading a weight.
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}; download it again", see="missing-weights") from error


# Reading


def tensors(folder: Path, *, pickles: bool = False) -> list[StoredTensor]:
    """Every tensor of a checkpoint, read lazily; of tensors with the same name the last, as in `transformers`.

    Raises:
        UserError: there are no weights, a weight file cannot be read, or `check_folder` rejects the folder.
    """
    check_folder(folder)
    files = weight_files(folder, pickles=pickles) or need_weights(folder)
    return list({one.name: one for file in files for one in file_tensors(file)}.values())


def file_tensors(file: Path) -> list[StoredTensor]:
    """Every tensor of one weight file, by offset.

    Raises:
        UserError: the file is corrupted, unpickling it would run code, or it does not hold tensors by name.
    """
    if file.suffix != ".safetensors":
        return [_pickled_tensor(file, name, value) for name, value in _unpickle(file).items()]
    header, start, _ = _header(file)
    found = sorted((about["data_offsets"], name) for name, about in header.items())
    return [
        StoredTensor(
            name, tuple(header[name]["shape"]), header[name]["dtype"], _reader(file, name), file,
            (start + begin, start + end),
        )
        for (begin, end), name in found
    ]  # fmt: skip


def _header(file: Path) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The header entries of a safetensors file by tensor name, the offset of the first tensor, and the metadata."""
    _check_header(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", None)
    return header, 8 + length, metadata or {}


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    return read


def _pickled_tensor(file: Path, name: str, value: Tensor) -> StoredTensor:
    code = CODES.get(value.dtype, str(value.dtype))
    return StoredTensor(name, tuple(value.shape), code, lambda: _unpickle(file)[name], file)


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, memory-mapped where possible; code in it is never run."""
    try:
        about = file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    return _unpickle_cached(file, about.st_mtime_ns, about.st_size)  # the cache key changes when the file is rewritten


@lru_cache(maxsize=2)  # a shard of the base model and the adapter that is merged into it
def _unpickle_cached(file: Path, _changed: int, _size: int) -> dict[str, Tensor]:
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, not a zip archive
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors and would run code when it is read; use a safetensors version",
            see="untrusted-checkpoint",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} does not hold a dictionary of tensors; expected a state dict")
    return found


# Writing


def write(folder: Path, tensors: Iterable[StoredTensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as a checkpoint's safetensors files.

    Raises:
        UserError: a tensor is quantized or not of a floating-point dtype.
        OSError: the folder cannot be written.
    """
    # Sorted by source file, so that a file that cannot be memory-mapped is read only once.
    shards = _shards(sorted(tensors, key=lambda one: str(one.file)), shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    try:
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard)
    finally:
        _unpickle_cached.cache_clear()
    if len(shards) > 1:
        _write_index(folder / INDEX, dict(zip(names, shards, strict=True)), {"metadata": {}})


def copy(source: Path, target: Path, rename: Rename) -> None:
    """Copy a checkpoint's weights, file by file, leaving out some tensors and renaming others.

    A file without any tensor left is not written.

    Raises:
        UserError: the source cannot be read.
        OSError: the target cannot be written.
    """
    shards, num_dropped = {}, 0
    for file in need_weights(source):
        named = [(one, rename(one.name)) for one in file_tensors(file)]
        kept = [replace(one, name=new) for one, new in named if new is not None]
        num_dropped += sum(math.prod(one.shape) for one, new in named if new is None)
        if kept:
            shards[file.name] = kept
            write_file(target / file.name, kept, _header(file)[2])
    entry = _entry(source, pickles=False)
    if entry is None or not entry.name.endswith(INDEX_SUFFIX):
        return
    index = {"metadata": {}} | json.loads(entry.read_bytes())
    if "total_parameters" in index["metadata"]:  # packed and tied parameters are counted as before
        index["metadata"]["total_parameters"] -= num_dropped
    _write_index(target / entry.name, shards, index)


def _write_index(file: Path, shards: dict[str, list[StoredTensor]], index: dict[str, Any]) -> None:
    size = sum(one.num_bytes for shard in shards.values() for one in shard)
    weight_map = {one.name: name for name, shard in shards.items() for one in shard}
    index |= {"metadata": index["metadata"] | {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: list[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for one in tensors:
        if one.code not in FLOATS:
            raise UserError(
                f"{one.name} is stored as {one.code}, not as floating point; use the checkpoint before quantization"
            )
        if shards[-1] and size + one.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.num_bytes
    return shards


def write_file(path: Path, tensors: list[StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file; the tensors are read and written in their order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for one in tensors:
        span = [place, place + one.num_bytes]
        header[one.name] = {"dtype": one.code, "shape": list(one.shape), "data_offsets": span}
        place += one.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            if one.span is None:
                _write_tensor(file, one)
            else:
                _copy_bytes(one.file, file, *one.span)


def _write_tensor(file: BinaryIO, one: StoredTensor) -> None:
    value = one.read().detach()
    assert tuple(value.shape) == one.shape, one.name
    assert value.dtype == one.dtype, one.name
    file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _copy_bytes(source: Path, target: BinaryIO, begin: int, end: int) -> None:
    buffer = memoryview(bytearray(min(CHUNK, end - begin)))
    with source.open("rb") as file:
        file.seek(begin)
        while begin < end:
            read = file.readinto(buffer[: end - begin])
            if not read:
                raise UserError(f"{source} was truncated while it was read; run the command again")
            target.write(buffer[:read])
            begin += read
