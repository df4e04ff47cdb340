"""Records from JSON, JSONL, Parquet, a folder of these, or a hub data set, in either spelling.

Two public benchmarks are read as they are published: OCR-VQA and TDIUC.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal

from striate.data.images import ImageFolder
from striate.data.record import Cell, ImageSource, Record, RecordError, Skipped
from striate.errors import UserError, nearest

MARK = "<image>"
"""Where an image belongs in a text, in both spellings."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SUFFIXES = (".json", ".jsonl", ".parquet")

LARGE, BLOCK = 64 * 2**20, 4 * 2**20
"""Bytes: a list above the first is not kept in memory, but read by the second."""

_SKIPPED = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Records:
    """The sound records of a data file, in its order, and the ones left out."""

    records: Sequence[Record]
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
    records: list[Record | Span] = []
    skipped: list[Skipped] = []
    for source, row, home in _rows(path, split):
        place, row = row if isinstance(row, tuple) else (None, row)
        try:
            record = _record(row, source, ImageFolder(Path(images or home), allow_urls))
            records.append(record if place is None else place)
        except RecordError as error:
            if on_bad == "stop":
                raise
            skipped.append(error.skipped)
    if not records:
        why = f"none of its {len(skipped)} records can be used: {skipped[0].reason}" if skipped else "it is empty"
        raise UserError(f"{path}: {why}")
    return Records(Located(records, images, allow_urls), skipped)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a checked record is in a large file: bytes from `start`, its number from 1."""

    path: Path
    start: int
    length: int
    number: int


@dataclass(frozen=True)
class Located(Sequence[Record]):
    """Records in memory, and places of those that are read from their file again whenever they are asked for.

    A million conversations as objects are several GB, their places some 0.2 GB.
    """

    items: list[Record | Span]
    images: str | Path | None = None
    allow_urls: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Located(self.items[index], self.images, self.allow_urls)
        item = self.items[index]
        if isinstance(item, Record):
            return item
        with item.path.open("rb") as file:
            file.seek(item.start)
            row = file.read(item.length)
        source = f"{item.path.name}:{item.number}"
        return _record(row, source, ImageFolder(Path(self.images or item.path.parent), self.allow_urls))


# Where rows come from: each is (source, row, the folder its images are in unless told otherwise).

Row = tuple[str, Any, Path]


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
        if is_list and path.stat().st_size > LARGE:
            for number, (start, length, row) in enumerate(_list_items(file, path.name), 1):
                yield f"{path.name}:{number}", (Span(path, start, length, number), row), path.parent
            return
        rows = _load_json(file.read(), path.name) if is_list else file  # a line is parsed when its turn comes
        for number, row in enumerate(rows, 1):
            if is_list or row.strip():
                yield f"{path.name}:{number}", row, path.parent


def _list_items(file: BinaryIO, source: str) -> Iterator[tuple[int, int, Any]]:
    """The items of a JSON list, a few megabytes of text at a time: first byte, number of bytes, value."""
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")().decode
    text, more, opened = "", True, False
    start = passed = place = 0  # `start`: the byte that character `passed` is at; `place`: the character that is next
    try:
        while True:
            place = _SKIPPED.match(text, place).end() if opened else place  # type: ignore[union-attr]
            if opened and text[place : place + 1] == "]":
                break
            try:
                if not opened:
                    raise ValueError
                value, end = decoder.raw_decode(text, place)
            except ValueError:  # perhaps only cut off here
                if not more:
                    raise
                start += len(text[passed:place].encode())
                block = file.read(max(BLOCK, len(text) - place, 0 if opened else 4096))  # white space comes first
                more = bool(block)
                text, place, passed = text[place:] + decode(block, not more), 0, 0
                if not opened:
                    place, opened = text.index("[") + 1, True
                continue
            start += len(text[passed:place].encode())
            length = len(text[place:end].encode())
            yield start, length, value
            start, passed, place = start + length, end, end
    except (ValueError, RecursionError) as error:
        raise RecordError(source, f"not valid JSON ({error}); mend or remove it") from None


def _load_json(data: bytes, source: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also wrong encoding, absurd numbers or nesting
        raise RecordError(source, f"not valid JSON ({error}); mend or remove it") from None


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
            yield f"{path.name}:{number}", row, path.parent


def _tdiuc_rows(path: Path, annotations: list[dict[str, Any]], subset: str) -> Iterator[Row]:
    questions = _tdiuc_questions(path)
    for number, one in enumerate(annotations, 1):
        image = f"{subset}/COCO_{subset}_{str(one.get('image_id')).zfill(12)}.jpg"
        answers = [answer.get("answer") for answer in one.get("answers", ())]
        question = questions.get(one.get("question_id"))
        row = _question(image, question, answers, f"tdiuc_{one.get('question_type')}")
        yield f"{path.name}:{number}", row, path.parent


def _tdiuc_questions(path: Path) -> dict[Any, Any]:
    """Questions by number, from the file that belongs to the annotations."""
    name = f"OpenEnded_{path.name.replace('annotations', 'questions')}"
    for file in (path.parent / name, path.parent.parent / "Questions" / name):
        if file.exists():
            listed = _load_json(file.read_bytes(), file.name).get("questions", ())
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
        yield f"{name}:{number + 1}", row, home


def _holds_bytes(value: Any) -> bool:
    return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)


# One row to one record.


def _record(row: Any, source: str, folder: ImageFolder) -> Record:
    if isinstance(row, bytes):
        row = _load_json(row, source)
    if not isinstance(row, dict):
        raise RecordError(source, f"a record must be an object, found {_kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    turns = row.get("messages", row.get("conversations"))
    if turns is None and "text" not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise RecordError(source, f"expected 'conversations', 'messages' or 'text', found {found}")
    listed = row.get("images") or row.get("image") or []  # some text-only records have an empty image
    listed = listed if isinstance(listed, list) else [listed]
    messages, images = _conversation(turns, [folder.locate(one, source) for one in listed], source, folder)
    return Record(
        id=str(row.get("id", source)),
        messages=messages,
        images=images,
        source=source,
        text="" if messages else _text(row, source),
        task=_string(row.get("task", ""), "task", source),
        metric=_string(row.get("metric", ""), "metric", source),
        answers=_strings(row.get("answers", []), "answers", source),
        choices=_strings(row.get("choices", []), "choices", source),
    )


def _conversation(
    turns: Any, listed: list[ImageSource], source: str, folder: ImageFolder
) -> tuple[tuple[dict[str, Any], ...], tuple[ImageSource, ...]]:
    """The turns in the one spelling, and their images in the order of the marks."""
    if turns is None:
        if listed:
            raise RecordError(source, "a plain text record cannot have images")
        return (), ()
    if not isinstance(turns, list) or not turns:
        raise RecordError(source, f"the conversation must be a list of turns, found {_kind(turns)}")
    messages = [_message(turn, number, source) for number, turn in enumerate(turns, 1)]
    if all(message["role"] != "user" for message in messages):
        raise RecordError(source, "the conversation has no question: no turn of 'human' or 'user'")
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if listed and not parts:  # LLaVA's habit: the images come before the first question
        question = next(message for message in messages if message["role"] == "user")
        parts = [{"type": "image"} for _ in listed]
        question["content"] = [*parts, *question["content"]]
    own = sum("image" in part for part in parts)
    if len(parts) - own != len(listed):
        raise RecordError(source, f"{len(parts) - own} {MARK} marks for {len(listed)} images; they must be as many")
    waiting = iter(listed)
    images = [folder.locate(part.pop("image"), source) if "image" in part else next(waiting) for part in parts]
    return tuple(messages), tuple(images)


def _message(turn: Any, number: int, source: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RecordError(source, f"turn {number} must be an object, found {_kind(turn)}")
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(source, f"turn {number}: unknown role {str(role)[:40]!r}; expected {', '.join(ROLES)}")
    content = turn.get("value", turn.get("content"))
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RecordError(source, f"turn {number}: the content must be text or a list, found {_kind(content)}")
    parts = [new for part in parts for new in _parts(part, number, source)]
    if ROLES[role] == "assistant":
        parts = [{"type": "text", "text": _answer(parts, number, source)}]
    elif not parts:
        raise RecordError(source, f"turn {number} is empty")
    return {"role": ROLES[role], "content": parts}


def _parts(part: Any, number: int, source: str) -> list[dict[str, Any]]:
    """A content part, its text cut at the image marks; an image that the part itself names stays in it."""
    match part:
        case {"type": "text", "text": str(text)} if MARK not in text:
            return [{"type": "text", "text": text}] if text else []
        case {"type": "text", "text": str(text)}:
            # A line break beside a mark belongs to the mark: chat templates write their own.
            pieces = re.split(rf"\n?({MARK})\n?", text)
            return [{"type": "image"} if p == MARK else {"type": "text", "text": p} for p in pieces if p]
        case {"type": "image" | "image_url"}:
            named = [part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None]
            return [{"type": "image", "image": named[0]} if named else {"type": "image"}]
    raise RecordError(source, f"turn {number}: a content part must be text or an image, found {str(part)[:60]}")


def _answer(parts: list[dict[str, Any]], number: int, source: str) -> str:
    if any(part["type"] == "image" for part in parts):
        raise RecordError(source, f"turn {number}: an answer cannot hold an image")
    answer = "".join(part["text"] for part in parts)
    if not answer.strip():
        raise RecordError(source, f"turn {number}: the answer is empty")
    return answer


def _text(row: dict[str, Any], source: str) -> str:
    text = _string(row["text"], "text", source)
    if not text.strip():
        raise RecordError(source, "the text is empty")
    return text


def _string(value: Any, field: str, source: str) -> str:
    if not isinstance(value, str):
        raise RecordError(source, f"'{field}' must be text, found {_kind(value)}")
    return value


def _strings(value: Any, field: str, source: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise RecordError(source, f"'{field}' must be a list of texts, found {str(value)[:60]}")
    return tuple(map(str, values))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}

    return names.get(type(value), "a number")
