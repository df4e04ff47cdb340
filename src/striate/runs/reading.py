"""The options that the verbs which measure a model on records have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from striate.data import Records, read
from striate.routing import load
from striate.scores.sampling import Sampling
from striate.vlm import Vlm


@dataclass(frozen=True)
class ReadOptions(Sampling):
    """How `score`, `revert` and `eval` read records and the model."""

    device: str | None = None
    """device to run on, such as cpu or cuda:0; default: the GPU if there is one"""
    dtype: str = "auto"
    """dtype of the model: auto (that of the checkpoint), float32, bfloat16 or float16"""

    def records(self, file: str | Path, images: Path | None, *, split: str = "train") -> Records:
        """The records of a file; image paths are relative to `images`."""
        return read(file, images=images, split=split, on_bad=self.on_bad_record)

    def model(self, source: str | Path) -> Vlm:
        """The model of a model folder, a run folder or a hub id."""
        return load(source, device=self.device, dtype=self.dtype)
