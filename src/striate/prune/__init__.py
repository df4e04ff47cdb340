"""Cut decoder layers out of a model, verify that nothing else changed, and write a standard checkpoint.

Before anything is saved, the model that bypasses the layers, the model without them, and the new checkpoint as
`transformers` loads it have to agree bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from striate.data import Record
from striate.errors import UserError
from striate.prune.choice import Amount, Criterion
from striate.prune.cutting import Numbering, bypass, cut, route_after
from striate.prune.plan import Pruning
from striate.prune.proof import verify_cut, verify_saved
from striate.prune.protected import protected_layers
from striate.prune.surgery import Surgery
from striate.region import Layers, Region
from striate.roundtrip import Inputs, free_memory, probes, save
from striate.routing import load
from striate.train import TUNE, TrainOptions
from striate.vlm import Vlm
from striate.vlm.reading import check_config, quantization
from striate.vlm.template import write_stop_tokens
from striate.weights import weight_files

__all__ = [
    "Amount",
    "Criterion",
    "Numbering",
    "Pruned",
    "Pruning",
    "Surgery",
    "all_or_nothing",
    "bypass",
    "cut",
    "cut_checkpoint",
    "drop_layers",
    "protected_layers",
]


@dataclass(frozen=True)
class Pruned:
    """A model `vlm` without some of its decoder layers; `numbers` has the old and new layer numbers."""

    vlm: Vlm
    numbers: Numbering

    def save(self, folder: str | Path) -> None:
        """Write a standard checkpoint into a new folder and compare it. Raises `UserError` where it differs."""
        save(self.vlm, Path(folder))


def drop_layers(vlm: Vlm, layers: Layers, *, verify: Iterable[Record] = ()) -> Pruned:
    """Remove decoder layers from a model in memory, and verify that it equals the model that bypasses them.

    Args:
        vlm: the model; it loses the layers in place.
        layers: the layers to remove: their indices, 0-based, or a region in any form.
        verify: records; the first one with and the first one without an image are the prompts of the verification;
            default: a question about an image of noise, and a question without an image.

    Raises:
        UserError: a layer does not exist or is protected (with the reason), or the two models differ in a bit of their
            logits or generated tokens; then the model must not be used any more.
    """
    removed = Region.of(layers, vlm.depth)
    protected = protected_layers(vlm)
    if bad := next((layer for layer in removed if layer in protected), None):
        raise UserError(f"layer {bad} cannot be removed: {protected[bad]}", see="layers-cannot-be-removed")
    numbers = Numbering(removed)
    route_after(vlm.model.config, numbers)  # refuses to cut all of it
    verify_cut(vlm, numbers, probes(vlm, verify))
    return Pruned(vlm, numbers)


def cut_checkpoint(
    source: Path,
    folder: Path,
    numbers: Numbering,
    *,
    records: Sequence[Record] = (),
    prompts: Mapping[str, Inputs] | None = None,
    options: TrainOptions = TUNE,
) -> tuple[str, ...]:
    """Write a checkpoint without some of its decoder layers into a new folder, verified equal to bypassing them.

    Args:
        source: a model folder; it is only read.
        folder: the folder to write; it must not exist. An error removes it. If the process is killed, it holds a
            checkpoint that does not load or, during the last step of the verification, a complete one: write to a
            temporary name and rename it afterwards.
        numbers: the layers to cut and the new numbers of the others.
        records: the source of the verification's prompts.
        prompts: the prompts themselves, by name, as inputs of the model; default: see `probes`.
        options: only device, attn and max_length are used.

    Returns:
        Notes on how the source was read.

    Raises:
        UserError: the verification failed (names the layers and the reason), or the folder cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder", see="folder-in-use")
    _check_space(source, folder)
    dtype = "auto" if quantization(check_config(str(source))) else "float32"  # packed weights have no other type
    attn = options.attn
    if dtype == "float32" and attn and "flash" in attn:
        attn = None  # those kernels have no float32
    with _enough_memory(dtype):
        vlm = load(source, dtype=dtype, device=options.device, attn=attn)
        device, notes, surgery = vlm.device, vlm.notes, Surgery.of(vlm, source, numbers)
        prompts = probes(vlm, records, max_length=options.max_length) if prompts is None else prompts
        expected, generation = verify_cut(vlm, numbers, prompts), vlm.model.generation_config
        del vlm
        free_memory()  # the next model takes its place
        with all_or_nothing(folder):
            surgery.write(source, folder)
            write_stop_tokens(folder, generation)
            verify_saved(folder, expected, prompts, numbers=numbers, device=device, dtype=dtype, attn=attn)
    return notes


@contextmanager
def _enough_memory(dtype: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the verification needs the whole model in memory ({dtype}), this device has too little: try --device cpu"
        ) from error


def _check_space(source: Path, folder: Path) -> None:
    """Refuse early when the disk lacks space for the checkpoint."""
    parent = next(parent for parent in folder.resolve().parents if parent.is_dir())
    needed, free = sum(file.stat().st_size for file in weight_files(source)), shutil.disk_usage(parent).free
    if needed > free:
        sizes = f"up to {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise UserError(f"not enough disk space for the checkpoint in {parent}: {sizes}", see="disk-full")


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """Context that removes the folder on errors; an `OSError` becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): it was removed") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
