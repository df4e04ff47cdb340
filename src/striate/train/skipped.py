"""Records that training leaves out: how many bad ones end it, and a warning about long ones."""

from __future__ import annotations

from collections.abc import Iterable

from striate.data import Skipped
from striate.errors import UserError
from striate.train.options import TrainOptions
from striate.train.watch import Log

MOST_SKIPPED = 0.01  # share of the records; more bad records than this mean that the data as a whole is wrong


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
