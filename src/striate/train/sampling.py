"""A random subset of the training records; nested, so that data sizes can be compared."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from striate.data import Records
from striate.errors import UserError


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
