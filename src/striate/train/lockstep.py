"""What keeps several processes in step: all run every part of the model equally often.

A process that leaves out a collective operation, because its records have no picture or cannot be read, would let the
others wait for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from striate.data import IGNORED, Batch, Example, Examples, Skipped, collate


@dataclass(frozen=True)
class Together:
    """Collates as `collate` does, and adds an example without answers where a batch has no picture or no record."""

    pad_id: int
    stand_in: Example

    @classmethod
    def of(cls, examples: Examples, *, pad_id: int) -> Together:
        """With the shortest readable record as the stand-in, one with pictures where there are any."""
        sizes = [examples.records.size(index) for index in range(len(examples))]
        pictured = any(size.images for size in sizes)
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__)
        read = (examples[index] for index in order if bool(sizes[index].images) == pictured)
        example = next(one for one in read if isinstance(one, Example))
        return cls(pad_id, replace(example, labels=torch.full_like(example.labels, IGNORED)))

    def __call__(self, examples: Sequence[Example | Skipped | None]) -> Batch:
        """B examples, one more where it has to stand in; None are places that no record fills."""
        there = [one for one in examples if one is not None]
        pictured = bool(self.stand_in.image_mask.any())
        full = any(isinstance(one, Example) and (not pictured or bool(one.image_mask.any())) for one in there)
        return collate(there if full else [*there, self.stand_in], pad_id=self.pad_id)


class Even(Dataset[Example | Skipped | None]):
    """Examples, and behind them empty places, so that every process gets as many; `accelerate` would fill them with
    records from the start, which then would count twice."""

    def __init__(self, examples: Examples, *, step: int) -> None:
        self.examples, self.lengths = examples, examples.lengths
        self.length = -(-len(examples) // step) * step

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example | Skipped | None:
        return self.examples[index] if index < len(self.examples) else None
