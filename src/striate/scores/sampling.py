"""Sampling of the records that layers are measured on, and their batches."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_type_hints

from rich.progress import track

from striate.console import console
from striate.data import Batch, Examples, Record, RecordError, Records, Skipped, collate
from striate.errors import UserError, at_least, check_choices
from striate.vlm import Vlm


@dataclass(frozen=True)
class Sampling:
    """How records are sampled and batched."""

    samples: int | None = 64
    """most records to use, sampled at random from those with an answer (eval: of each task, by default all)"""
    batch: int = 8
    """records per forward pass; the results do not depend on it"""
    max_length: int = 2048
    """most tokens per record, image tokens included; longer text is truncated at its end (eval: the record is left out;
    of plain text, tokens per window)"""
    seed: int = 0
    """random seed of `samples`"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop, or list a bad record in skipped.jsonl and continue"""

    def __post_init__(self) -> None:
        """Raises: UserError: a number is below 1, or `on_bad_record` another word."""
        check_choices(get_type_hints(type(self)), vars(self))
        at_least(1, samples=self.samples, batch=self.batch, max_length=self.max_length)

    def draw(self, records: Iterable[Record]) -> RecordSample:
        """Sample records with an answer, in their order; the sample depends on the seed and the records alone.

        A record in the format of evaluation, with `answers` and no turn of the assistant, gets its first answer as
        such a turn; records with neither are among the skipped. Of plain text, every token is an answer token.

        Raises:
            UserError: no record has an answer.
        """
        records, indices = Records.of(records), list[int]()
        without: list[Skipped] = []
        for index, record in enumerate(records):
            if _with_answer(record):
                indices.append(index)
            else:
                without.append(Skipped(record.source, "has no answer"))
        if not indices:
            raise UserError(f"none of the {len(records)} records has an answer to measure layers on", see="bad-records")
        if self.samples is not None and self.samples < len(indices):
            indices = sorted(random.Random(int(self.seed)).sample(indices, self.samples))
        chosen = map(_with_answer, records.records.take(indices))
        return RecordSample([record for record in chosen if record], [*records.skipped, *without], records.notes)

    def batches(self, vlm: Vlm, sample: RecordSample) -> Iterator[Batch]:
        """The sample's records in batches of similar length on the model's device; bad ones go to `sample.skipped`.

        The longest batch comes first, so that a lack of memory shows at once; the others in random order, so that the
        batches so far are an unbiased sample at any time.

        Raises:
            RecordError: a record cannot be used and `on_bad_record` is "stop".
            UserError: no record can be used.
        """
        examples = Examples(sample.records, vlm.processor, max_length=self.max_length, truncate_text=True)
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__, reverse=True)
        first, *others = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        random.Random(int(self.seed)).shuffle(others)
        usable = False
        for indices in (first, *others):
            batch = collate([examples[index] for index in indices], pad_id=vlm.pad_token_id)
            for bad in batch.skipped:
                if self.on_bad_record == "stop":
                    raise RecordError(bad.source, bad.reason)
                sample.skipped.append(bad)
            if len(batch):
                usable = True
                yield batch.to(vlm.device, vlm.model.dtype)
        if not usable:
            bad = sample.skipped[-1]
            raise UserError(
                f"none of the {len(order)} records can be used: {bad.source}: {bad.reason}", see="bad-records"
            )

    def show_batches(
        self, vlm: Vlm, sample: RecordSample, title: str, *, progress: bool
    ) -> Generator[Batch, None, None]:
        """`batches` under a progress bar with a title."""
        batches, total = self.batches(vlm, sample), self.num_batches(sample)
        yield from track(batches, title, total=total, console=console(stderr=True), disable=not progress)

    def num_batches(self, sample: RecordSample) -> int:
        """Number of batches, empty ones included."""
        return -(-len(sample.records) // self.batch)


@dataclass(frozen=True)
class RecordSample:
    """Records to measure, the skipped records, and notes of the reader."""

    records: Sequence[Record]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        """Whether any record has an image."""
        return any(record.images for record in self.records)


def _with_answer(record: Record) -> Record | None:
    """The record with a turn of the assistant (or plain text); None when it has no answer."""
    if record.text or any(message["role"] == "assistant" for message in record.messages):
        return record
    if not record.answers:
        return None
    turn = {"role": "assistant", "content": [{"type": "text", "text": record.answers[0]}]}
    return replace(record, messages=(*record.messages, turn))
