"""Part of the training records, drawn so that data sizes can be compared."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from striate.data import Records
from striate.errors import UserError


def drawn(records: Records, samples: int | str | None, *, seed: int) -> Records:
    """As many records as `samples` says, drawn at random, in their order; all where it says nothing.

    The draw depends on the seed and the number of records alone, and is nested: the records of a smaller draw are
    among those of a larger one. Raises `UserError` as `num_drawn` does.
    """
    if samples is None:
        return records
    total = len(records)
    # `random()` is the one method whose sequence Python promises to keep in every version.
    draw = random.Random(seed).random
    ranked = sorted(range(total), key=lambda _: draw())
    return replace(records, records=records.records.take(sorted(ranked[: num_drawn(samples, total)])))


def num_drawn(samples: int | str, total: int) -> int:
    """How many of `total` records "500" or "25%" means; a share is rounded, halves to even, and at least one.

    Raises:
        UserError: it is neither a whole number nor a share, or there are not so many records.
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
