"""Records to batches: for any trainer, and for several processes, which run every part of the model equally often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from striate.data import IGNORED, Batch, Example, Examples, Record, Skipped, collate, encode
from striate.vlm import Vlm


class Collator:
    """A data collator: turns records into model inputs, with `labels` on the answer tokens only.

    Hand it to `transformers.Trainer` as `data_collator`, with a list of records as `train_dataset` and
    `remove_unused_columns=False`. Raises `RecordError` for a record that cannot be used.
    """

    def __init__(self, vlm: Vlm, *, max_length: int = 2048, truncate_text: bool = False) -> None:
        self.processor, self.pad_id = vlm.processor, vlm.pad_token_id
        self.max_length, self.truncate_text = max_length, truncate_text

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """`input_ids` and `labels` [B, T], `pixel_values` and the processor's other outputs."""
        examples = [
            encode(record, self.processor, max_length=self.max_length, truncate_text=self.truncate_text)
            for record in records
        ]
        batch = collate(examples, pad_id=self.pad_id)
        return {**batch.inputs, "labels": batch.labels}


@dataclass(frozen=True)
class DummyCollator:
    """Collates as `collate` does, and adds a dummy example, without answers, to a batch without images or records."""

    pad_id: int
    dummy: Example

    @classmethod
    def of(cls, examples: Examples, *, pad_id: int) -> DummyCollator:
        """Use the shortest readable record as the dummy example, one with images if there are any."""
        _, example = next(examples.shortest())
        return cls(pad_id, replace(example, labels=torch.full_like(example.labels, IGNORED)))

    def __call__(self, examples: Sequence[Example | Skipped]) -> Batch:
        """Collate B examples, which may be none, or B + 1 with the dummy."""
        has_image = bool(self.dummy.image_mask.any())
        complete = any(isinstance(one, Example) and (not has_image or bool(one.image_mask.any())) for one in examples)
        return collate(examples if complete else [*examples, self.dummy], pad_id=self.pad_id)
