"""Batches of examples, as training, scoring and evaluation use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from striate.data.example import IGNORED, Example, encode
from striate.data.lazy_records import LazyRecords
from striate.data.record import Record, RecordError, Skipped
from striate.errors import UserError
from striate.vlm.processors import TOKEN_KEYS

CHARS_PER_TOKEN = 4
"""A typical rate, good enough to sort records by length."""


@dataclass(frozen=True)
class Batch:
    """B examples padded to T tokens.

    `inputs` are the model's inputs (`input_ids` [B, T], `attention_mask` [B, T], `pixel_values`, ...).
    `labels` [B, T] is -100 outside the answers, `image_mask` [B, T] true at image tokens. `tasks` are those of the
    records, "" for one without. `skipped` are the records that are missing from the batch; a batch can be empty.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    image_mask: Tensor
    ids: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Positions [B, T] whose logits predict a labeled token, one to the left of it; the labeled tokens [N]."""
        next_labels = F.pad(self.labels[:, 1:], (0, 1), value=IGNORED)
        positions = next_labels != IGNORED
        return positions, next_labels[positions]

    def num_answer_tokens(self) -> list[int]:
        """Number of labeled tokens of each record; the first token of a row is predicted by none."""
        return (self.labels[:, 1:] != IGNORED).sum(dim=1).tolist()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`, its floating-point inputs as `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)

        inputs = {key: move(value) for key, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=move(self.labels), image_mask=move(self.image_mask))


def collate(examples: Sequence[Example | Skipped], *, pad_id: int, side: str = "right") -> Batch:
    """Pad tokens on one `side` to the longest example and image tensors to the largest image, and concatenate them.

    The first axis of image tensors counts images, crops or patches of the whole batch. Only for models with
    cross-attention it counts examples, and an example without images has zeros there.
    """
    skipped = tuple(one for one in examples if isinstance(one, Skipped))
    kept = [one for one in examples if isinstance(one, Example)]
    length = max((len(example) for example in kept), default=0)

    def rows(tensors: list[Tensor], value: int | bool) -> Tensor:
        if not tensors:
            return torch.empty(0, 0, dtype=torch.long)
        gaps = [length - len(tensor) for tensor in tensors]
        sides = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
        padded = [
            F.pad(tensor, (*(0, 0) * (tensor.dim() - 1), *gap), value=value)  # from the last axis on
            for tensor, gap in zip(tensors, sides, strict=True)
        ]
        return _concatenate([tensor.unsqueeze(0) for tensor in padded])

    inputs = {}
    some = {key: value for example in kept for key, value in example.inputs.items()}
    by_record = "cross_attention_mask" in some
    for key, like in some.items():
        if key in TOKEN_KEYS:
            # Some processors give no token types for a text-only record; they are all 0.
            values = [example.inputs.get(key, _zeros(like, len(example))) for example in kept]
            inputs[key] = rows(values, pad_id if key == "input_ids" else 0)
        else:
            inputs[key] = _concatenate(
                [example.inputs.get(key, _zeros(like, 1)) for example in kept if by_record or key in example.inputs]
            )
    if by_record and "aspect_ratio_mask" in inputs:  # Mllama needs one tile of a missing image
        inputs["aspect_ratio_mask"][..., 0] = 1
    return Batch(
        inputs=inputs,
        labels=rows([example.labels for example in kept], IGNORED),
        image_mask=rows([example.image_mask for example in kept], False),
        ids=tuple(example.id for example in kept),
        tasks=tuple(example.task for example in kept),
        skipped=skipped,
    )


def _zeros(like: Tensor, length: int) -> Tensor:
    """Zeros of this length along the first axis; the other axes have size 1."""
    return like.new_zeros(length, *(1 for _ in like.shape[1:]))


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors along the first axis; the other axes are padded with zeros to the largest size."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def pad(tensor: Tensor) -> Tensor:
        gaps = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        return F.pad(tensor, [end for gap in reversed(gaps) for end in (0, gap)])  # from the last axis on

    return torch.cat([pad(tensor) for tensor in tensors])


class Examples(Dataset[Example | Skipped]):
    """Records, encoded lazily; an invalid record becomes a `Skipped`, so that the data worker continues."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: Any,
        *,
        max_length: int = 2048,
        truncate_text: bool = False,
        generation: bool = False,
    ):
        self.records = records if isinstance(records, LazyRecords) else LazyRecords(records)
        self.encode = partial(
            encode,
            processor=processor,
            max_length=max_length,
            truncate_text=truncate_text,
            generation=generation,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example | Skipped:
        try:
            return self.encode(self.records[index])
        except RecordError as error:
            return error.skipped

    @cached_property
    def lengths(self) -> list[int]:
        """Approximate number of tokens per record, for batches of similar length; opens the images of one record.

        Each image counts as many tokens as the images of the first readable record with images have on average.
        """
        sizes, per_image = self.records.sizes, 0
        for index, size in enumerate(sizes):
            if size.images and isinstance(example := self[index], Example):
                per_image = int(example.image_mask.sum()) // size.images
                break
        return [size.characters // CHARS_PER_TOKEN + per_image * size.images for size in sizes]

    def shortest(self) -> Iterator[tuple[int, Example]]:
        """The readable examples with their numbers, the shortest first; those with images before all others.

        Raises:
            UserError: none of the records can be read.
        """
        sizes, found, reason = self.records.sizes, False, "there is none"
        for index in sorted(range(len(self)), key=lambda index: (not sizes[index].images, self.lengths[index])):
            if isinstance(example := self[index], Example):
                found = True
                yield index, example
            else:
                reason = f"the last one, {example.source}: {example.reason}"
        if not found:
            raise UserError(f"no record is left to train on; {reason}", see="bad-records")
