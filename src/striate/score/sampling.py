"""Which records are measured, and in what batches."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from striate.data import Batch, Examples, Record, RecordError, Skipped, collate, read
from striate.errors import UserError
from striate.vlm import Vlm


@dataclass(frozen=True)
class Sampling:
    """How records become batches.

    `samples`: records drawn at random with `seed`; `batch`: records a forward pass; `max_length`: tokens of a record,
    longer text is cut at its end; `on_bad`: "stop" at a record that cannot be used, or "skip" it.
    """

    samples: int = 64
    batch: int = 8
    max_length: int = 2048
    seed: int = 0
    on_bad: Literal["stop", "skip"] = "stop"
    allow_urls: bool = False

    def draw(self, data: str | Path, images: Path | None = None) -> Sample:
        """Records with an answer, drawn at random, in their order; the draw depends on the seed and the data alone.

        A record in the spelling of evaluation, with `answers` and no turn of the assistant, gets its first answer as
        such a turn. Plain text counts: all of it is to be predicted.

        Raises:
            UserError: nothing can be read, or no record has an answer.
        """
        if self.samples < 1 or self.batch < 1:
            raise UserError(f"at least one sample and a batch of one are needed, not {self.samples} and {self.batch}")
        found = read(data, images=images, allow_urls=self.allow_urls, on_bad=self.on_bad)
        answered = [index for index, record in enumerate(found) if _answered(record)]
        if not answered:
            raise UserError(f"{data}: none of its {len(found)} records has an answer to measure layers on")
        if self.samples < len(answered):
            drawn = random.Random(self.seed).sample(range(len(answered)), self.samples)
            answered = [answered[index] for index in sorted(drawn)]
        records = map(_answered, found.records.take(answered))
        return Sample([record for record in records if record], found.skipped)

    def batches(self, vlm: Vlm, sample: Sample) -> Iterator[Batch]:
        """The sample's records in batches of like length on the model's device; adds bad ones to `sample.skipped`.

        The longest come first, so that memory that will not do fails at once; the others in random order, so that a
        part of them is no worse a sample than the whole.

        Raises:
            RecordError: a bad record, unless they are skipped.
            UserError: no record is left.
        """
        examples = Examples(sample.records, vlm.processor, max_length=self.max_length, truncate_text=True)
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__, reverse=True)
        first, *others = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        random.Random(self.seed).shuffle(others)
        usable = False
        for indices in (first, *others):
            batch = collate([examples[index] for index in indices], pad_id=vlm.pad_token_id)
            for bad in batch.skipped:
                if self.on_bad == "stop":
                    raise RecordError(bad.source, bad.reason)
                sample.skipped.append(bad)
            if len(batch):
                usable = True
                yield batch.to(vlm.device, vlm.model.dtype)
        if not usable:
            bad = sample.skipped[-1]
            raise UserError(f"none of the {len(order)} records can be used: {bad.source}: {bad.reason}")

    def shown(self, vlm: Vlm, sample: Sample, title: str, *, progress: bool) -> Generator[Batch, None, None]:
        """The same batches, under a progress bar with a title."""
        batches, total = self.batches(vlm, sample), self.num_batches(sample)
        yield from track(batches, title, total=total, console=Console(stderr=True), disable=not progress)

    def num_batches(self, sample: Sample) -> int:
        """How many batches there will be, empty ones included."""
        return -(-len(sample.records) // self.batch)


@dataclass(frozen=True)
class Sample:
    """Records to be measured, and those that cannot be."""

    records: Sequence[Record]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        """Whether any record has an image."""
        return any(record.images for record in self.records)


def _answered(record: Record) -> Record | None:
    if record.text or any(message["role"] == "assistant" for message in record.messages):
        return record
    if not record.answers:
        return None
    turn = {"role": "assistant", "content": [{"type": "text", "text": record.answers[0]}]}
    return replace(record, messages=(*record.messages, turn))
