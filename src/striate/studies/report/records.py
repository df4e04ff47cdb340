"""Every evaluated record with the answer of every run, as compact JSON that the page's script reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from striate.errors import UserError
from striate.studies.html import data_address, page_data, script_safe
from striate.studies.report.compared import ComparedRun
from striate.studies.report.comparison import Comparison
from striate.studies.report.pairing import Key

IMAGES, PER_RECORD = 200, 4  # in the page, all sets of records together; of one record
SIDE = 128  # pixels
RECORDS = 10_000  # of one set
LETTERS = 400  # of a question or an answer


class Browser(NamedTuple):
    """What the script shows: its data, and a note on what was left out."""

    json: Markup
    records: int
    images: str
    left_out: str


def browser(
    comparison: Comparison, marks: Mapping[str, tuple[str, str]], *, explored: Mapping[str, str]
) -> Browser | None:
    """All records that runs answered, set by set of the same records; None when there are none.

    Texts stand once in a pool, however many runs share them; answers and scores are columns of numbers.
    `marks` are the color and the glyph of every arm, `explored` the addresses of the pages of `explore` by run.
    """
    sets: dict[str, list[ComparedRun]] = {}
    for row in comparison.rows:
        if row.predictions.lines:
            sets.setdefault(row.predictions.fingerprint(), []).append(row)
    if not sets:
        return None
    shown = {key: list(_spread(rows[0].predictions.lines))[:RECORDS] for key, rows in sets.items()}
    pool, thumbnails = _Pool(), _Thumbnails([(sets[key][0], records) for key, records in shown.items()])
    arms = {row.name: arm.name for arm in comparison.arms for row in arm.rows}
    written = [_set(rows, shown[key], arms, pool, thumbnails, explored) for key, rows in sets.items()]
    content = {"sets": written, "pool": list(pool.numbers), "images": thumbnails.addresses, "marks": marks}
    total = sum(len(rows[0].predictions.lines) for rows in sets.values())
    there = sum(map(len, shown.values()))
    left_out = f"{there:,} of {total:,} records are in this page." if there < total else ""
    return Browser(script_safe(content), there, thumbnails.note, left_out)


class _Pool:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        return self.numbers.setdefault(str(text)[:LETTERS], len(self.numbers))


class _Thumbnails:
    """Small copies of images by number, as many as there is room for, spread evenly over tasks."""

    def __init__(self, sets: Sequence[tuple[ComparedRun, Sequence[Key]]]) -> None:
        seen = ([row.predictions.lines[key].get("images") for key in keys] for row, keys in sets)
        turns = zip_longest(*([images for images in of_set if images] for of_set in seen))
        files = dict.fromkeys(str(one) for turn in turns for images in turn if images for one in images[:PER_RECORD])
        self.addresses, self.numbers = list[str](), dict[str, int]()
        for file in list(files)[:IMAGES]:
            if address := thumbnail(Path(file), SIDE):
                self.numbers[file] = len(self.addresses)
                self.addresses.append(address)
        self.note = f"{len(self.addresses):,} of {len(files):,} images are in this page." if files else ""

    def __call__(self, images: Sequence[Any]) -> list[int]:
        """The numbers of a record's first images that are in the page."""
        return [self.numbers[file] for file in map(str, images[:PER_RECORD]) if file in self.numbers]


def _spread(lines: Mapping[Key, Any]) -> Iterator[Key]:
    """The records in turns, one of each task."""
    tasks: dict[str, list[Key]] = {}
    for key in lines:
        tasks.setdefault(key[0], []).append(key)
    for turn in zip_longest(*tasks.values()):
        yield from (key for key in turn if key is not None)


def _set(
    rows: Sequence[ComparedRun], chosen: Sequence[Key], arms: Mapping[str, str], pool: _Pool, thumbnails: _Thumbnails,
    explored: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    lines = rows[0].predictions.lines
    wanted, names = {*chosen}, [arms[row.name] for row in rows]
    names = [row.name if names.count(name) > 1 else name for row, name in zip(rows, names, strict=True)]
    keys = [key for key in lines if key in wanted]  # in the order of the data
    tasks = list(dict.fromkeys(key[0] for key in keys))
    places = {task: number for number, task in enumerate(tasks)}
    return {
        "name": rows[0].data or "records",
        "runs": [[name, arms[row.name]] for row, name in zip(rows, names, strict=True)],
        "tasks": tasks,
        "task": [places[key[0]] for key in keys],
        "question": [pool(lines[key]["question"]) for key in keys],
        "truth": [pool(", ".join(map(str, dict.fromkeys(lines[key]["answers"])))) for key in keys],
        "images": [thumbnails(lines[key].get("images") or ()) for key in keys],
        "answer": [[pool(row.predictions.lines[key]["prediction"]) for key in keys] for row in rows],
        "score": [[_short(row.predictions.lines[key]["score"]) for key in keys] for row in rows],
        "explored": [
            [place, number, f"{explored[row.name]}#{quote(key[1], safe='')}"]
            for number, row in enumerate(rows)
            if row.name in explored
            for place, key in _samples(row, keys)
        ],
    }


def _samples(row: ComparedRun, keys: Sequence[Key]) -> Iterator[tuple[int, Key]]:
    """The records in a run's page of `explore`, each with its place among `keys`."""
    content = page_data(row.run.exploration, "data") or {}
    samples = {(one["id"], one["question"]) for one in content.get("samples", ())}
    for place, key in enumerate(keys):
        if (key[1], row.predictions.lines[key]["question"]) in samples:
            yield place, key


def _short(score: float) -> float:
    """A score in two digits, of which only a right one is 1 and only a wrong one 0."""
    if score <= 0 or score >= 1:
        return round(score)
    return min(0.99, max(0.01, round(float(score), 2)))


def thumbnail(path: Path, side: int) -> str:
    """A small copy of an image as a `data:` address, the shorter of PNG and JPEG; empty when unreadable."""
    from striate.data import open_image  # late: brings in torch

    try:
        image = open_image(path) if os.path.isfile(path) else None
    except UserError:
        image = None
    return "" if image is None else data_address(image, side)
