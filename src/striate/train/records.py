"""Which records train: a random subset, nested so that data sizes compare; their order; how many may be left out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from striate.data import Records, Skipped
from striate.errors import UserError
from striate.train.options import TrainOptions
from striate.train.watch import Log

MOST_SKIPPED = 0.01  # share of the records; more bad records than this mean that the data as a whole is wrong


def sample_records(records: Records, samples: int | str | None, *, seed: int) -> Records:
    """A random subset of `samples` records, in their order; all records for None.

    The subset depends on the seed and the number of records alone, and is nested: a smaller subset is contained in a
    larger one. Raises `UserError` as `num_samples` does.
    """
    if samples is None:
        return records
    total = len(records)
    # `random()` is the one method whose sequence is guaranteed for every version of Python.
    generator = random.Random(seed)
    ranked = sorted(range(total), key=lambda _: generator.random())
    return replace(records, records=records.records.take(sorted(ranked[: num_samples(samples, total)])))


def num_samples(samples: int | str, total: int) -> int:
    """The number of records, out of `total`, that "500" or "25%" means; a share is rounded half to even, at least 1.

    Raises:
        UserError: `samples` is neither a whole number nor a share, or larger than `total`.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(%?)", str(samples).strip())
    number, percent = match.groups() if match else ("0", "")
    if not float(number) or (not percent and "." in number) or (percent and float(number) > 100):
        raise UserError(f"samples {samples!r}: a number of records (500) or a share of them (25%) was expected")
    if percent:
        return max(1, round(total * float(number) / 100))
    if int(number) > total:
        raise UserError(f"samples {samples}: there are only {total} records")
    return int(number)


def length_grouped(lengths: list[int], batch: int, seed: int) -> list[int]:
    """Record indices in groups of `batch` of similar length, the groups in random order.

    The longest group comes first, so that a lack of memory shows at once.
    """
    generator = torch.Generator().manual_seed(seed)
    # `transformers` leaves the groups sorted by length within every fifty: training would see long records, then short
    # ones, again and again.
    indices = get_length_grouped_indices(lengths, batch, generator=generator)
    groups = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    full, rest = (groups[:-1], groups[-1:]) if len(groups[-1]) < batch else (groups, [])
    shuffled = torch.randperm(max(len(full) - 1, 0), generator=generator).tolist()
    order = [*full[:1], *(full[1 + place] for place in shuffled), *rest]
    return [index for group in order for index in group]


def log_skipped(records: Records, options: TrainOptions, log: Log) -> Log:
    """The log, with what was skipped on reading, and warnings about the data.

    Raises:
        UserError: too many records are bad.
    """
    for record in records.skipped:
        log.skip(record)
    for note in records.notes:
        log.warn(note)
    check_skipped(records.skipped, len(records) + len(records.skipped), options)
    return log


def check_skipped(skipped: Iterable[Skipped], total: int, options: TrainOptions) -> None:
    """Raise `UserError` when too many of `total` records are bad; one that is too long is not bad."""
    bad = [record for record in skipped if not record.too_long]
    allowed = MOST_SKIPPED if options.on_bad_record == "skip" else 0.0
    if len(bad) > allowed * total:
        raise UserError(
            f"{bad[-1].source}: {bad[-1].reason} ({len(bad)} bad records of {total}, {allowed:.0%} allowed; "
            "all are listed in skipped.jsonl)",
            see="bad-records",
        )


def warn_of_too_long(log: Log, total: int, options: TrainOptions) -> None:
    """Warn, with the fix, when many records are too long."""
    too_long = sum(record.too_long for record in log.skipped.values())
    if too_long > MOST_SKIPPED * total:
        cut = "" if options.truncate_text else " or set --truncate-text"
        log.warn(
            f"{too_long} of {total} records are longer than {options.max_length} tokens and were left out: "
            f"raise --max-length{cut}"
        )
