"""A few evaluated records to look at, with the answers of every run."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from striate.errors import UserError
from striate.report.comparison import PERPLEXITY, Comparison

PER_TASK = 2
MOST = 24
PICTURES = 4  # of one record
THUMBNAIL = 224  # pixels on the longer side


class Sample(NamedTuple):
    """An evaluated record, its pictures as `data:` addresses, and by run the lines of predictions.jsonl."""

    record: Mapping[str, Any]
    pictures: tuple[str, ...]
    replies: Mapping[str, Mapping[str, Any]]


def samples(comparison: Comparison) -> list[Sample]:
    """The first `PER_TASK` records with a picture of every task, in the order of the data, `MOST` in all.

    Nothing is chosen by its result. Replies are those of the comparable runs. Perplexity has no replies.
    """
    predictions = {row.name: row.run.predictions() for row in comparison.comparable}
    order = predictions.get(comparison.reference.name) or next(filter(None, predictions.values()), [])
    firsts: dict[str, list[Mapping[str, Any]]] = {}
    for record in order:
        shown = firsts.setdefault(record["task"], [])
        if record["images"] and record["metric"] != PERPLEXITY and len(shown) < PER_TASK:
            shown.append(record)
    chosen = {(r["task"], r["id"]): r for records in firsts.values() for r in records}
    found = {
        name: {key: line for line in lines if (key := (line["task"], line["id"])) in chosen}
        for name, lines in predictions.items()
    }
    return [
        Sample(
            record,
            tuple(thumbnail(Path(image)) for image in record["images"][:PICTURES]),
            {name: lines[key] for name, lines in found.items() if key in lines},
        )
        for key, record in list(chosen.items())[:MOST]
    ]


def thumbnail(path: Path) -> str:
    """A small copy of a picture as a `data:` address, the shorter of PNG and JPEG; empty when unreadable."""
    from striate.data import (
        open_image,
    )  # late: brings in torch

    try:
        picture = open_image(path) if os.path.isfile(path) else None
    except UserError:
        picture = None
    if picture is None:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    addresses = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        addresses.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(addresses, key=len)
