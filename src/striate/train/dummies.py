"""Dummy examples, with which all processes run every part of the model equally often.

A process that skipped a collective operation, because its records have no image or cannot be read, would make the
others wait forever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from striate.data import IGNORED, Batch, Example, Examples, Skipped, collate


@dataclass(frozen=True)
class DummyCollator:
    """Collates as `collate` does, and adds a dummy example, without answers, to a batch without images or records."""

    pad_id: int
    dummy: Example

    @classmethod
    def of(cls, examples: Examples, *, pad_id: int) -> DummyCollator:
        """Use the shortest readable record as the dummy example, one with images if there are any."""
        images = [bool(examples.records.size(index).images) for index in range(len(examples))]
        order = sorted(range(len(examples)), key=lambda index: (not images[index], examples.lengths[index]))
        read = (examples[index] for index in order)
        example = next(one for one in read if isinstance(one, Example))
        return cls(pad_id, replace(example, labels=torch.full_like(example.labels, IGNORED)))

    def __call__(self, examples: Sequence[Example | Skipped]) -> Batch:
        """Collate B examples, which may be none, or B + 1 with the dummy."""
        has_image = bool(self.dummy.image_mask.any())
        complete = any(isinstance(one, Example) and (not has_image or bool(one.image_mask.any())) for one in examples)
        return collate(examples if complete else [*examples, self.dummy], pad_id=self.pad_id)
