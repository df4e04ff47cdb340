"""A few evaluated records to look at, with the answers of every run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from striate.errors import UserError
from striate.studies.html import data_address
from striate.studies.report.compared import difference
from striate.studies.report.comparison import Comparison
from striate.studies.report.pairing import Key

PER_TASK = 2
MOST = 24
IMAGES = 4  # of one record
THUMBNAIL = 224  # pixels on the longer side


class RecordCard(NamedTuple):
    """An evaluated record, its images as `data:` addresses, and by run the lines of predictions.jsonl."""

    record: Mapping[str, Any]
    images: tuple[str, ...]
    replies: Mapping[str, Mapping[str, Any]]


def record_cards(comparison: Comparison) -> list[RecordCard]:
    """The first `PER_TASK` records with an image of every task, in the order of the data, `MOST` in all.

    Nothing is chosen by its result. Replies are those of the comparable runs. Perplexity has no replies.
    """
    reference = comparison.reference
    answered = [row for row in comparison.comparable if row.predictions.lines]
    own = reference if reference.predictions.lines else next(iter(answered), reference)
    # Runs of another seed may have answered other questions under the same ids.
    alike = [row for row in answered if not difference(row, own)]
    firsts: dict[str, list[Key]] = {}
    for key, record in own.predictions.lines.items():
        shown = firsts.setdefault(record["task"], [])
        if record["images"] and len(shown) < PER_TASK:
            shown.append(key)
    chosen = [key for keys in firsts.values() for key in keys]
    return [
        RecordCard(
            own.predictions.lines[key],
            tuple(thumbnail(Path(image)) for image in own.predictions.lines[key]["images"][:IMAGES]),
            {row.name: row.predictions.lines[key] for row in alike if key in row.predictions.lines},
        )
        for key in chosen[:MOST]
    ]


def thumbnail(path: Path, side: int = THUMBNAIL) -> str:
    """A small copy of an image as a `data:` address, the shorter of PNG and JPEG; empty when unreadable."""
    from striate.data import open_image  # late: brings in torch

    try:
        image = open_image(path) if os.path.isfile(path) else None
    except UserError:
        image = None
    return "" if image is None else data_address(image, side)
