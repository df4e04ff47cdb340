"""Records from JSON, JSONL, Parquet, a folder of these, or a hub data set, in either spelling.

Two public benchmarks are read as they are published: OCR-VQA and TDIUC.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from striate.data.images import ImageFolder
from striate.data.record import Cell, Record, RecordError, Skipped
from striate.data.spelling import record_of
from striate.data.stored import Element, JsonFile, Place, Size, Stored, elements, lines, parsed
from striate.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Records:
    """The sound records of a data file, in its order, and the ones left out.

    Those of JSON files are read again from their places when asked for: half a million take 0.2 GB.
    """

    records: Stored
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def read(
    path: str | Path,
    *,
    images: str | Path | None = None,
    allow_urls: bool = False,
    on_bad: Literal["stop", "skip"] = "stop",
    split: str = "train",
) -> Records:
    """Read and check every record; images are looked up but not opened.

    The spellings, told apart record by record: LLaVA's (`image`, `conversations` of `from` and `value`) and
    Hugging Face's (`images`, `messages` of `role` and `content`). `images` is the folder that image paths
    start from (default: the data file's own). `split` is for hub data sets and OCR-VQA. Raises `RecordError` at
    the first bad record, or lists them under `skipped` with `on_bad="skip"`; `UserError` when nothing is left.

    Two benchmarks are known by their shape, with a record a question. OCR-VQA's `dataset.json` (Mishra et al.
    2019): the questions of `split` (train, validation, test), task `ocrvqa_SPLIT`, images in `images/ID.jpg`.
    TDIUC's annotations (Kafle and Kanan 2017): task `tdiuc_TYPE` for each type of question, so that the mean over
    tasks is the arithmetic mean-per-type; images in `val2014/COCO_val2014_NUMBER.jpg` (or train2014). Give the
    file of annotations, `mscoco_val2014_annotations.json`: that of the questions,
    `OpenEnded_mscoco_val2014_questions.json`, is looked for beside it and in `../Questions`.
    """

    @cache
    def folder(home: Path) -> ImageFolder:
        return ImageFolder(Path(images or home), allow_urls)

    @cache
    def file(place: Path) -> JsonFile:
        return JsonFile.of(place, folder(place.parent))

    entries: list[Record | Place] = []
    skipped: list[Skipped] = []
    for row in _rows(path, split):
        try:
            value = parsed(row.value, row.source) if isinstance(row.value, bytes) else row.value
            record = record_of(value, row.source, folder(row.home))
        except RecordError as error:
            if on_bad == "stop":
                raise
            skipped.append(error.skipped)
            continue
        if row.place:
            place, element = row.place
            entries.append(Place(file(place), element.number, element.start, element.length, Size.of(record)))
        else:
            entries.append(record)
    if not entries:
        why = f"none of its {len(skipped)} records can be used: {skipped[0].reason}" if skipped else "it is empty"
        raise UserError(f"{path}: {why}")
    return Records(Stored(entries), skipped)


# Where rows come from.


class Row(NamedTuple):
    """What is to become a record; `home` is the folder its images are in unless told otherwise.

    `place` is the JSON file and the element in it, where it can be read again.
    """

    source: str
    value: Any
    home: Path
    place: tuple[Path, Element] | None = None


def _rows(path: str | Path, split: str) -> Iterator[Row]:
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{place}: no {', '.join(SUFFIXES)} file in this folder")
    elif place.exists():
        files = [place]
    elif place.suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        yield from _hub_rows(str(path), split)
        return
    else:
        raise UserError(f"{place}: no such file; expected {', '.join(SUFFIXES)}, a folder of these, or a hub data set")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: expected a {', '.join(SUFFIXES)} file")
        try:
            yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file, split)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _json_rows(path: Path, split: str) -> Iterator[Row]:
    """A JSON list, numbered by record, JSON lines, numbered by line, or a benchmark's one object."""
    with path.open("rb") as file:
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        file.seek(0)
        if not is_list and (benchmark := _benchmark_rows(path, file, split)):
            yield from benchmark
            return
        file.seek(0)
        name, home = path.name, path.parent  # `Path` makes both anew each time
        for element in elements(file, name) if is_list else lines(file):
            yield Row(f"{name}:{element.number}", element.value, home, (path, element))


# Benchmarks as they are published: one object a file. What is wrong with a question is found when it becomes a record.

OCR_VQA_SPLITS = {"train": 1, "validation": 2, "test": 3}


def _benchmark_rows(path: Path, file: BinaryIO, split: str) -> Iterator[Row] | None:
    """The rows of a benchmark; None where the file holds something else, such as JSON lines."""
    line = file.readline()
    found = _object(line) or _object(line + file.read())
    match found:
        case {"annotations": [{"question_id": _, "question_type": _}, *_] as annotations}:
            return _tdiuc_rows(path, annotations, str(found.get("data_subtype")))
        case {"questions": [{"question_id": _}, *_]}:
            raise UserError(f"{path}: questions without answers; give the file of annotations that belongs to it")
        case dict() if found and all(
            isinstance(one, dict) and {"questions", "answers"} <= {*one} for one in found.values()
        ):
            return _ocr_vqa_rows(path, found, split)
    return None


def _object(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _ocr_vqa_rows(path: Path, books: dict[str, dict[str, Any]], split: str) -> Iterator[Row]:
    if split not in OCR_VQA_SPLITS:
        raise UserError(f"{path}: no split {nearest(split, OCR_VQA_SPLITS)}")
    number = 0
    for name, book in books.items():
        pairs = zip_longest(book["questions"], book["answers"])
        for question, answer in pairs if book.get("split") == OCR_VQA_SPLITS[split] else ():
            number += 1
            row = _question(f"images/{name}.jpg", question, [answer], f"ocrvqa_{split}")
            yield Row(f"{path.name}:{number}", row, path.parent)


def _tdiuc_rows(path: Path, annotations: list[dict[str, Any]], subset: str) -> Iterator[Row]:
    questions = _tdiuc_questions(path)
    for number, one in enumerate(annotations, 1):
        image = f"{subset}/COCO_{subset}_{str(one.get('image_id')).zfill(12)}.jpg"
        answers = [answer.get("answer") for answer in one.get("answers", ())]
        question = questions.get(one.get("question_id"))
        row = _question(image, question, answers, f"tdiuc_{one.get('question_type')}")
        yield Row(f"{path.name}:{number}", row, path.parent)


def _tdiuc_questions(path: Path) -> dict[Any, Any]:
    """Questions by number, from the file that belongs to the annotations."""
    name = f"OpenEnded_{path.name.replace('annotations', 'questions')}"
    for file in (path.parent / name, path.parent.parent / "Questions" / name):
        if file.exists():
            listed = parsed(file.read_bytes(), file.name).get("questions", ())
            return {one["question_id"]: one["question"] for one in listed}
    raise UserError(f"{path}: its questions, {name}, are neither beside it nor in ../Questions")


def _question(image: str, question: Any, answers: list[Any], task: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0] if answers else None}]
    return {"image": image, "messages": turns, "answers": answers, "task": task}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("Parquet files and hub data sets need `datasets`: pip install datasets") from None
    return datasets


def _parquet_rows(path: Path) -> Iterator[Row]:
    datasets = _datasets()
    try:
        dataset = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # the readers below raise their own kinds
        raise UserError(f"{path}: not a readable Parquet file ({type(error).__name__})") from error
    yield from _dataset_rows(dataset, path.name, path.parent)


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, permission, spelling, missing split: all are the user's to see
        reason = str(error).split("\n")[0]
        raise UserError(f"{name}: no such file here, and not loadable from the hub ({reason})") from error
    yield from _dataset_rows(dataset, name, Path(datasets.config.HF_CACHE_HOME))


def _dataset_rows(dataset: Any, name: str, home: Path) -> Iterator[Row]:
    """Rows with their images left on disk: a `Cell` in the place of each."""
    datasets = _datasets()
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Sequence(datasets.Image(decode=False)))
    for number, row in enumerate(dataset):
        for column in ("image", "images"):
            match row.get(column):
                case {"bytes": bytes()} | bytes():
                    row[column] = Cell(dataset, number, column)
                case list() as values:
                    row[column] = [
                        Cell(dataset, number, column, index) if _holds_bytes(value) else value
                        for index, value in enumerate(values)
                    ]
        yield Row(f"{name}:{number + 1}", row, home)


def _holds_bytes(value: Any) -> bool:
    return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)
