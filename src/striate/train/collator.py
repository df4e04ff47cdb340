"""Records to model inputs, for any trainer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from striate.data import Record, collate, encode
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
