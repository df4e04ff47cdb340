"""Read records from JSON, JSONL or Parquet files, folders of these, and saved or hub data sets, in any format.

Two public benchmarks are supported as published: OCR-VQA and TDIUC.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast, get_type_hints, overload

from striate.data.format import record_of
from striate.data.images import ImageFolder, image_data
from striate.data.keys import IMAGES, TURNS
from striate.data.layout import EXPECTED, check_file, data_files, is_saved, suffix_of
from striate.data.lazy_records import (
    JsonElement,
    JsonFile,
    LazyRecords,
    RecordLocation,
    RecordSize,
    json_elements,
    json_lines,
    parse_json,
)
from striate.data.record import DatasetImage, Record, RecordError, Skipped
from striate.errors import UserError, check_choices, nearest, need


@dataclass(frozen=True)
class Records:
    """The valid records of a data file, in order, and the skipped ones.

    Records of JSON files are read again on access: half a million take 0.2 GB. `notes` are warnings about ignored keys
    and skipped files.
    """

    records: LazyRecords
    skipped: list[Skipped]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Records:
        """Records of any iterable, such as a list of chosen ones; those that were read stay as they are.

        Raises:
            UserError: something else than records is given.
        """
        if isinstance(records, Records):
            return records
        listed = [*records]
        if odd := next((one for one in listed if not isinstance(one, Record)), None):
            raise UserError(f"records as striate.read gives them were expected, found {type(odd).__name__}")
        return cls(LazyRecords(listed), [])

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, chosen: int) -> Record: ...
    @overload
    def __getitem__(self, chosen: slice) -> Records: ...
    def __getitem__(self, chosen: int | slice) -> Record | Records:
        """One record, or a slice of the records: `records[:8]`."""
        return Records(self.records[chosen], []) if isinstance(chosen, slice) else self.records[chosen]

    @property
    def has_images(self) -> bool:
        """Whether any record has an image."""
        return self.records.has_images


def read(
    path: str | Path,
    *,
    images: str | Path | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    split: str = "train",
) -> Records:
    """Read and check every record; images are looked up but not opened.

    The format is detected per record: LLaVA's (`image`, `conversations` of `from` and `value`), Hugging Face's
    (`images`, `messages` of `role` and `content`), and variants of them (docs/data.md). `images` is the root folder of
    image paths (default: that of the data file). `split` is for saved and hub data sets, folders with files named after
    splits, and OCR-VQA. With `on_bad="skip"`, invalid records are listed in `skipped`.

    Two benchmarks are detected, with one record per question. OCR-VQA's `dataset.json` (Mishra et al.
    2019): the questions of `split` (train, validation, test), task `ocrvqa_SPLIT`, images in `images/ID.jpg`.
    TDIUC's annotations (Kafle and Kanan 2017): task `tdiuc_TYPE` for each type of question, so that the mean over
    tasks is the arithmetic mean-per-type; images in `val2014/COCO_val2014_NUMBER.jpg` (or train2014). Give the
    annotation file, `mscoco_val2014_annotations.json`: the question file,
    `OpenEnded_mscoco_val2014_questions.json`, is searched next to it and in `../Questions`.

    Raises:
        RecordError: a record is invalid, with `on_bad="stop"`.
        UserError: the file cannot be read, or has no valid record.
    """
    check_choices(get_type_hints(read), {"on_bad": on_bad})

    @cache
    def folder(home: Path) -> ImageFolder:
        return ImageFolder(Path(images or home))

    @cache
    def file(place: Path) -> JsonFile:
        return JsonFile.of(place, folder(place.parent))

    entries: list[Record | RecordLocation] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    unknown: set[str] = set()
    for row in _rows(path, split, notes):
        try:
            value = parse_json(row.value, row.source) if isinstance(row.value, bytes) else row.value
            record = record_of(value, row.source, folder(row.home), unknown)
        except RecordError as error:
            if on_bad == "stop":
                raise
            skipped.append(error.skipped)
            continue
        if row.place:
            place, element = row.place
            entries.append(
                RecordLocation(file(place), element.number, element.start, element.length, RecordSize.of(record))
            )
        else:
            entries.append(record)
    if not entries:
        why = f"none of its {len(skipped)} records can be used: {skipped[0].reason}" if skipped else "it is empty"
        raise UserError(f"{path}: {why}", see="bad-records")
    if unknown:
        notes.append(f"{path}: ignored keys: {', '.join(sorted(unknown)[:20])}")
    return Records(LazyRecords(entries), skipped, notes)


# Sources of rows.


class RawRecord(NamedTuple):
    """A row of a data file; `home` is the default folder of its images.

    `place` is the JSON file and the element in it, if the row can be read again.
    """

    source: str
    value: Any
    home: Path
    place: tuple[Path, JsonElement] | None = None


def _rows(path: str | Path, split: str, notes: list[str]) -> Iterator[RawRecord]:
    place = Path(path)
    if place.is_dir():
        files, unread = data_files(place, split)
        notes += unread
    elif place.exists():
        files = [place]
    elif not suffix_of(place) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        yield from _hub_rows(str(path), split)
        return
    else:
        raise UserError(f"{place}: no such file; expected {EXPECTED}, a folder of these, or a hub data set")
    for file in files:
        try:
            if is_saved(file):
                yield from _saved_rows(file)
                continue
            check_file(file)
            yield from _json_rows(file, split) if "json" in suffix_of(file) else _arrow_rows(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json_rows(path: Path, split: str) -> Iterator[RawRecord]:
    """Rows of a JSON list, numbered by record, of JSON lines, numbered by line, or of a benchmark's single object."""
    packed = path.suffix.lower() == ".gz"  # no random access: its records stay in memory
    with cast(BinaryIO, gzip.open(path) if packed else path.open("rb")) as file:
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        file.seek(0)
        if not is_list and (rows := _object_rows(path, file, split)):
            yield from rows
            return
        file.seek(0)
        name, home = path.name, path.parent  # `Path` computes them on each access
        for element in json_elements(file, name) if is_list else json_lines(file):
            yield RawRecord(f"{name}:{element.number}", element.value, home, None if packed else (path, element))


# A file with one object: a record, or a benchmark as published.
# Invalid questions are reported when they are converted to records.

OCR_VQA_SPLITS = {"train": 1, "validation": 2, "test": 3}


def _object_rows(path: Path, file: BinaryIO, split: str) -> Iterator[RawRecord] | None:
    """The rows of a file with one object; None for other files, such as JSON lines."""
    line, rest = file.readline(), b""
    found = _object(line)
    if found is None:
        rest = file.read()
        found = _object(line + rest)
    match found:
        case {"annotations": [{"question_id": _, "question_type": _}, *_] as annotations}:
            return _tdiuc_rows(path, annotations, str(found.get("data_subtype")))
        case {"questions": [{"question_id": _}, *_]}:
            raise UserError(f"{path}: this file has questions without answers; give its annotation file")
        case dict() if found and all(
            isinstance(one, dict) and {"questions", "answers"} <= {*one} for one in found.values()
        ):
            return _ocr_vqa_rows(path, found, split)
        case dict() if rest and {*TURNS, "text", "prompt"} & found.keys():
            return iter([RawRecord(f"{path.name}:1", line + rest, path.parent)])
        case dict() if rest:
            keys = ", ".join(map(str, [*found][:8]))
            raise UserError(f"{path}: one object with {keys}; expected a list of records, or one record per line")
    return None


def _object(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _ocr_vqa_rows(path: Path, books: dict[str, dict[str, Any]], split: str) -> Iterator[RawRecord]:
    if split not in OCR_VQA_SPLITS:
        raise UserError(f"{path}: no split {nearest(split, OCR_VQA_SPLITS)}")
    number = 0
    for name, book in books.items():
        pairs = zip_longest(book["questions"], book["answers"])
        for question, answer in pairs if book.get("split") == OCR_VQA_SPLITS[split] else ():
            number += 1
            row = _question(f"images/{name}.jpg", question, [answer], f"ocrvqa_{split}")
            yield RawRecord(f"{path.name}:{number}", row, path.parent)


def _tdiuc_rows(path: Path, annotations: list[dict[str, Any]], subset: str) -> Iterator[RawRecord]:
    questions = _tdiuc_questions(path)
    for number, one in enumerate(annotations, 1):
        image = f"{subset}/COCO_{subset}_{str(one.get('image_id')).zfill(12)}.jpg"
        answers = [answer.get("answer") for answer in one.get("answers", ())]
        question = questions.get(one.get("question_id"))
        row = _question(image, question, answers, f"tdiuc_{one.get('question_type')}")
        yield RawRecord(f"{path.name}:{number}", row, path.parent)


def _tdiuc_questions(path: Path) -> dict[Any, Any]:
    """Questions by id, from the question file of the annotations."""
    name = f"OpenEnded_{path.name.replace('annotations', 'questions')}"
    for file in (path.parent / name, path.parent.parent / "Questions" / name):
        if file.exists():
            listed = parse_json(file.read_bytes(), file.name).get("questions", ())
            return {one["question_id"]: one["question"] for one in listed}
    raise UserError(f"{path}: its questions, {name}, are neither next to it nor in ../Questions")


def _question(image: str, question: Any, answers: list[Any], task: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0] if answers else None}]
    return {"image": image, "messages": turns, "answers": answers, "task": task}


def _datasets() -> Any:
    need("datasets", "a Parquet, saved or hub data set", extra="data")
    import datasets

    return datasets


def _arrow_rows(path: Path) -> Iterator[RawRecord]:
    datasets = _datasets()
    parquet = path.suffix.lower() == ".parquet"
    try:
        dataset = datasets.Dataset.from_parquet(str(path)) if parquet else datasets.Dataset.from_file(str(path))
    except Exception as error:  # Parquet and Arrow raise many kinds of errors
        kind = "a readable Parquet" if parquet else "a readable Arrow"
        raise UserError(f"{path}: not {kind} file ({type(error).__name__})") from error
    yield from _dataset_rows(dataset, path.name, path.parent)


def _saved_rows(folder: Path) -> Iterator[RawRecord]:
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # as above
        raise UserError(f"{folder}: not a readable saved data set ({type(error).__name__})") from error
    yield from _dataset_rows(dataset, folder.name, folder)


def _hub_rows(name: str, split: str) -> Iterator[RawRecord]:
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, permission, unknown name or split: reported to the user
        reason = str(error).split("\n")[0]
        raise UserError(f"{name}: no such file, and not loadable from the hub ({reason})") from error
    yield from _dataset_rows(dataset, name, Path(datasets.config.HF_CACHE_HOME))


def _dataset_rows(dataset: Any, name: str, home: Path) -> Iterator[RawRecord]:
    """Rows whose images stay on disk, each replaced by a `DatasetImage`."""
    datasets = _datasets()
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Sequence(datasets.Image(decode=False)))
    for number, row in enumerate(dataset):
        for column in row.keys() & set(IMAGES):
            value = row[column]
            if isinstance(value, list):
                row[column] = [
                    DatasetImage(dataset, number, column, index) if _holds_data(one) else one
                    for index, one in enumerate(value)
                ]
            elif _holds_data(value):
                row[column] = DatasetImage(dataset, number, column)
        yield RawRecord(f"{name}:{number + 1}", row, home)


def _holds_data(value: Any) -> bool:
    try:
        return image_data(value, "") is not None
    except RecordError:  # reported when the row is converted to a record
        return False
