"""Reading: both formats, every kind of file, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from striate.data import Record, RecordError, Records, Skipped, lazy_records, open_image, read
from striate.data.format import record_of
from striate.data.images import ImageFolder
from striate.errors import UserError

IMAGE = {"type": "image"}
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def read_one(folder: Path, row: Any, **options: Any) -> Record:
    (folder / "train.json").write_text(json.dumps([row]))
    return read(folder / "train.json", **options).records[0]


# Formats.

LLAVA = {
    "id": "000123",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "system", "value": "Answer briefly."},
        {"from": "human", "value": "<image>\nIs it\n<image> or <image>?"},
        {"from": "gpt", "value": "The first"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes"},
    ],
}


def test_llava_format(folder: Path) -> None:
    found = read_one(folder, {**LLAVA, "image": ["a.png", "b.png", "a.png"]})
    assert found.messages == (
        {"role": "system", "content": [text("Answer briefly.")]},
        {"role": "user", "content": [IMAGE, text("\nIs it\n"), IMAGE, text(" or "), IMAGE, text("?")]},
        {"role": "assistant", "content": [text("The first")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes")]},
    )
    assert [path.name for path in found.images] == ["a.png", "b.png", "a.png"]
    assert (found.id, found.source) == ("000123", "train.json:1")


@pytest.mark.parametrize("content", [
    "<image>What?",
    "What?",  # no mark: the image comes first
    [IMAGE, text("What?")],
    [text("<image>What?")],
    [{"type": "image", "text": None}, {"type": "text", "text": "What?", "image": None}],  # as Arrow fills it up
])  # fmt: skip
@pytest.mark.parametrize("key", ["image", "images"])
def test_formats_of_the_same_record(folder: Path, content: Any, key: str) -> None:
    image = "a.png" if key == "image" else ["a.png"]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [text("red")]}]
    other = [{"from": "human", "value": content}, {"from": "gpt", "value": "red"}]
    ours, theirs = (read_one(folder, {key: image, name: value}) for name, value in
                    (("messages", turns), ("conversations", other)))  # fmt: skip
    assert ours == theirs
    assert ours.messages[0]["content"] == [IMAGE, text("What?")]
    assert ours.images == ((folder / "a.png").resolve(),)


@pytest.mark.parametrize("part", [
    {"type": "image", "image": "b.png"}, {"type": "image", "path": "b.png"}, {"type": "image", "url": "b.png"},
    {"type": "image_url", "image_url": {"url": "b.png"}},
])  # fmt: skip
def test_parts_that_name_their_image(folder: Path, part: dict) -> None:
    content = [text("From <image> to "), part]
    found = read_one(folder, {"image": "a.png", "messages": [{"role": "user", "content": content}]})
    assert found.messages[0]["content"] == [text("From "), IMAGE, text(" to "), IMAGE]
    assert [path.name for path in found.images] == ["a.png", "b.png"]


def test_text_only_evaluation_and_plain_text_records(folder: Path) -> None:
    question = read_one(folder, {
        "messages": CHAT[:1], "image": "", "task": "read", "metric": "exact_match", "answers": ["red", 2],
        "choices": ["red", "blue"],
    })  # fmt: skip
    assert (question.task, question.metric, question.images) == ("read", "exact_match", ())
    assert (question.answers, question.choices) == (("red", "2"), ("red", "blue"))
    assert read_one(folder, {"messages": CHAT, "answers": "red"}).answers == ("red",)
    plain = read_one(folder, {"text": "Cats are animals.", "task": "held-out"})
    assert (plain.text, plain.messages, plain.id) == ("Cats are animals.", (), "train.json:1")


# Files.


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_and_lines_are_distinguished(folder: Path, name: str, as_lines: bool, mark: bytes) -> None:
    rows = [json.dumps({"messages": CHAT, "id": id}, ensure_ascii=False) for id in ("ä\u2028b", "c")]
    whole = "\n\n".join(rows) if as_lines else " [" + ",\n".join(rows) + "]"
    (folder / name).write_bytes(mark + whole.encode())
    found = read(folder / name)
    assert [record.id for record in found] == ["ä\u2028b", "c"]
    assert [record.source for record in found] == [f"{name}:1", f"{name}:{3 if as_lines else 2}"]


def test_a_folder_of_files(folder: Path) -> None:
    (folder / "b.jsonl").write_text(json.dumps({"messages": CHAT}))
    (folder / "a.json").write_text(json.dumps([{"messages": CHAT, "image": "a.png"}]))
    assert [record.source for record in read(folder)] == ["a.json:1", "b.jsonl:1"]


def test_images_elsewhere(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps([{"messages": CHAT, "image": "a.png"}]))
    (found,) = read(folder / "data" / "train.json", images=folder)
    assert found.images == ((folder / "a.png").resolve(),)
    with pytest.raises(RecordError, match=r"a.png not found in .*data; set --images"):
        read(folder / "data" / "train.json")


@pytest.mark.filterwarnings("ignore")  # of `datasets` and its own dependencies
def test_parquet_keeps_its_images_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    data = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    rows = [
        {"image": data, "images": [data, data], "messages": [{"role": "user", "content": "<image>" * n}, CHAT[1]]}
        for n in (2, 3)
    ]
    features = datasets.Features({
        "image": datasets.Image(), "images": datasets.Sequence(datasets.Image()),
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    })  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    found = read(folder / "train.parquet", on_bad="skip")
    assert found.skipped == [Skipped("train.parquet:2", "3 <image> placeholders for 2 images; they must match")]
    assert [open_image(image).getpixel((0, 0)) for image in found.records[0].images] == [(255, 0, 0)] * 2
    single = [{"image": data, "messages": CHAT}, {"image": {"bytes": None, "path": "b.png"}, "messages": CHAT}]
    datasets.Dataset.from_list(single).to_parquet(folder / "other.parquet")
    colors = [open_image(record.images[0]).getpixel((0, 0)) for record in read(folder / "other.parquet")]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_hub_data_sets_and_parquet_need_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in ("nobody/nothing", folder / "train.parquet"):
        with pytest.raises(UserError, match=r"pip install 'striate\[data\]'"):
            read(path)


@pytest.mark.filterwarnings("ignore")
def test_unreadable_data_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    (folder / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"train.parquet: not a readable Parquet file"):
        read(folder / "train.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"nobody/nothing: no such file, and not loadable from the hub"):
        read("nobody/nothing")


# Large files stay on disk.


def llava_rows(number: int) -> list[dict[str, Any]]:
    """Records with and without an image, letters of one to four bytes, an id that says which."""
    letters = ["plain", "ä\u2028", "\u4e2d", "\U0001f408"]
    return [
        {"id": str(index), "conversations": [
            {"from": "human", "value": ("<image>\n" if index % 3 else "") + letters[index % 4]},
            {"from": "gpt", "value": "red" * (1 + index % 5)},
        ]} | ({"image": "a.png"} if index % 3 else {})
        for index in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 7, 100, 10**6])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}, None])
def test_a_list_comes_in_blocks_of_any_size(
    folder: Path, block: int, layout: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_records, "BLOCK", block)
    rows = llava_rows(9)
    text = "\n".join(map(json.dumps, rows)) if layout is None else f" {json.dumps(rows, **layout)}\n"
    (folder / "train.json").write_text("\ufeff" + text, encoding="utf-8")
    found = read(folder / "train.json").records
    alone = [record_of(row, f"train.json:{number}", ImageFolder(folder)) for number, row in enumerate(rows, 1)]
    assert list(found) == alone
    assert [record.source for record in found] == [f"train.json:{number}" for number in range(1, 10)]
    assert all(isinstance(entry, lazy_records.RecordLocation) for entry in found.entries)


@pytest.mark.parametrize("text", [
    '[{"text": "a"}\n, {"text" "b"}]', '[\n {"text": "a"},\n]', '[{"text": "a"}] ]', '[{"text": "a"}', "[1 2]", "[,]",
    '[{"text": "\U0001f408"},\n\n {"text": "b]', "[tru]", "[1", "[", '[{"text": "a"},',
])  # fmt: skip
@pytest.mark.parametrize("block", [1, 5, 10**6])
def test_a_broken_list_is_refused_where_it_breaks(
    folder: Path, text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_records, "BLOCK", block)
    (folder / "train.json").write_text(text, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(RecordError, match="not valid JSON") as caught:
        read(folder / "train.json", on_bad="skip")
    line, column = map(int, re.findall(r"line (\d+) column (\d+)", str(caught.value))[0])
    assert line == expected.value.lineno
    assert abs(column - expected.value.colno) <= 1  # some say "a comma goes on to nothing", others where nothing is


def test_what_is_known_of_a_record_without_reading_it(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(llava_rows(12)))
    found = read(folder / "train.json").records
    in_memory = lazy_records.LazyRecords(list(found))
    assert found.sizes == in_memory.sizes
    assert [record.id for record in found.take([7, 2])] == ["7", "2"]
    assert [record.id for record in found[::5]] == ["0", "5", "10"]
    (folder / "a.png").unlink()
    assert found[0].id == "0"
    with pytest.raises(RecordError, match=r"train.json:2: image a.png not found"):
        found[1]


def test_records_of_a_list_of_chosen_ones(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(llava_rows(6)))
    found = read(folder / "train.json")
    assert Records.of(found) is found
    chosen = Records.of(one for one in found if one.images)
    assert [one.id for one in chosen] == [one.id for one in found if one.images]
    assert chosen.has_images
    for wrong in ("train.json", llava_rows(2)):
        with pytest.raises(UserError, match=r"records as striate.read gives them were expected, found (str|dict)"):
            Records.of(wrong)


def test_a_file_that_changes_under_a_training_is_refused(folder: Path) -> None:
    path = folder / "train.json"
    path.write_text(json.dumps(llava_rows(3)))
    found = read(path).records
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"train.json has changed since its records were read: run the command again"):
        found[0]
    path.unlink()
    with pytest.raises(UserError, match=r"train.json: cannot be read \(No such file or directory\)"):
        found[0]


# Bad input.


@pytest.mark.parametrize(("row", "reason"), [
    (7, "a record must be an object, found a number"),
    ([], "a record must be an object, found a list"),
    ({}, "expected 'conversations', 'messages' or 'text', found nothing"),
    ({"question": "?", "answer": "!"}, "expected 'conversations', 'messages' or 'text', found question, answer"),
    ({"text": ""}, "the text is empty"),
    ({"text": 7}, "'text' must be text, found a number"),
    ({"text": "a", "image": "a.png"}, "a plain text record cannot have images"),
    ({"messages": "hello"}, "the conversation must be a list of turns, found text"),
    ({"messages": []}, "the conversation must be a list of turns, found a list"),
    ({"messages": ["hello"]}, "turn 1 must be an object, found text"),
    ({"messages": CHAT[1:]}, "the conversation has no question: no turn of 'human' or 'user'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1: unknown role 'tool'; expected human, user, gpt"),
    ({"messages": [{"content": "x"}]}, "turn 1: unknown role 'None'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1: unknown role"),
    ({"messages": [{"role": "user"}]}, "turn 1: the content must be text or a list, found nothing"),
    ({"messages": [{"role": "user", "content": ""}]}, "turn 1 is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]},
     "turn 1: a part of type 'video' is not supported: striate supports images and text; give frames as images"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "turn 1: a content part must be text or an image"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "turn 2: the answer is empty"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": "see <image>"}], "image": "a.png"},
     "turn 2: an answer cannot hold an image"),
    ({"messages": [{"role": "user", "content": "<image> and <image>"}], "image": "a.png"},
     "2 <image> placeholders for 1 images; they must match"),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": ["a.png", "b.png"]},
     "1 <image> placeholders for 2 images; they must match"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> placeholders for 0 images"),
    ({"messages": CHAT, "image": "c.png"}, "image c.png not found in"),
    ({"messages": CHAT, "image": "../c.png"}, "image ../c.png is outside the image folder"),
    ({"messages": CHAT, "image": 7}, "an image must be a path or data, found 7"),
    ({"messages": CHAT, "image": [["a.png"]]}, "an image must be a path or data, found ['a.png']"),
    ({"messages": CHAT, "image": "http://localhost/a.png"},
     "image http://localhost/a.png is a URL; download it, and name the file instead"),
    ({"messages": CHAT, "answers": {"a": 1}}, "'answers' must be a list of texts, found {'a': 1}"),
    ({"messages": CHAT, "task": 7}, "'task' must be text, found a number"),
])  # fmt: skip
def test_bad_records(folder: Path, row: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_one(folder, row)
    assert str(caught.value).startswith(f"train.json:1: {reason}")
    (folder / "train.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(row))
    found = read(folder / "train.jsonl", on_bad="skip")
    assert len(found) == 1
    assert [one.source for one in found.skipped] == ["train.jsonl:2"]
    assert found.skipped[0].reason.startswith(reason)


@pytest.mark.parametrize("line", [
    b'{"messages": [', b"\xff\xfe", b"1" * 5000, b'{"a":' * 50_000, b"nonsense",
])  # fmt: skip
def test_broken_lines(folder: Path, line: bytes) -> None:
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps({"messages": CHAT}).encode() + b"\n" + line + b"\n")
    with pytest.raises(RecordError, match=r"^train.jsonl:2: (not valid JSON|a record must be)"):
        read(path)
    assert [skipped.source for skipped in read(path, on_bad="skip").skipped] == ["train.jsonl:2"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("train.json", b"", "train.json: it is empty"),
    ("train.json", b"[]", "train.json: it is empty"),
    ("train.jsonl", b"\n\n", "train.jsonl: it is empty"),
    ("train.json", b'[{"text": "a"},', r"train.json: not valid JSON .*line 1 column"),
    ("train.json", b"[" * 100_000, "train.json: not valid JSON"),
    ("train.jsonl", b"7\n8", "none of its 2 records can be used: a record must be an object, found a number"),
    ("train.csv", b"a,b", "train.csv: expected a .json, .jsonl, .parquet file"),
])  # fmt: skip
def test_bad_files(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(folder / name, on_bad="skip")
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder.json: cannot be read \(Is a directory\)"):
        read(tmp_path)
    (tmp_path / "folder.json").rmdir()
    with pytest.raises(UserError, match=r"train.json: no such file; expected .json, .jsonl, .parquet"):
        read(tmp_path / "train.json")
    with pytest.raises(UserError, match=r"no .json, .jsonl, .parquet file in this folder"):
        read(tmp_path)


# Missing values.

NAN = float("nan")


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize(("value", "place"), [
    ({"choices": ["a", NAN]}, "choices[1]"), ({"answers": NAN}, "answers"), ({"score": float("inf")}, "score"),
    ({"about": {"x": [0, -float("inf")]}}, "about.x[1]"),
])  # fmt: skip
@pytest.mark.parametrize("as_lines", [False, True])
def test_what_is_not_finite_in_json_is_refused_with_its_place(
    folder: Path, value: Any, place: str, as_lines: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_records, "BLOCK", block)
    rows = [{"messages": CHAT}, {"messages": CHAT, **value}, {"messages": CHAT, "task": "NaN, Infinity"}]
    (folder / "train.json").write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    found = read(folder / "train.json", on_bad="skip")
    reason = f"not valid JSON ({place} is not finite; write null for a missing value); fix or remove it"
    assert found.skipped == [Skipped("train.json:2", reason)]
    assert [record.task for record in found] == ["", "NaN, Infinity"]
    with pytest.raises(RecordError, match=r"^train.json:2: not valid JSON"):
        read(folder / "train.json")


@pytest.mark.parametrize(("row", "reason"), [
    ({"choices": ["a", None]}, "'choices' has an empty item 2; write its text, or remove it"),
    ({"choices": [NAN, "b"]}, "'choices' has an empty item 1"),
    ({"answers": [None]}, "'answers' has an empty item 1"),
    ({"answers": [float("inf")]}, "'answers' must be a list of texts, found [inf]"),
    ({"answers": [True]}, "'answers' must be a list of texts, found [True]"),
    ({"image": ["a.png", None], "messages": [{"role": "user", "content": "<image><image>"}]}, "an image must be a"),
    ({"image": NAN, "messages": [{"role": "user", "content": "<image>"}]}, "1 <image> placeholders for 0 images"),
    ({"messages": [{"role": "user", "content": NAN}]}, "turn 1: the content must be text or a list, found nothing"),
    ({"messages": NAN, "text": NAN}, "expected 'conversations', 'messages' or 'text', found nothing"),
])  # fmt: skip
def test_a_missing_value_does_not_become_a_word(folder: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        record_of({"messages": CHAT, **row}, "a:1", ImageFolder(folder))
    assert str(caught.value).startswith(f"a:1: {reason}")


@pytest.mark.parametrize("nothing", [None, NAN])
def test_a_missing_value_is_as_if_it_were_not_there(folder: Path, nothing: float | None) -> None:
    keys = ("id", "task", "metric", "answers", "choices", "image", "images", "text", "system", "weight")
    empty = dict.fromkeys(keys, nothing) | {"image_path": [nothing], "img": {"bytes": nothing, "path": nothing}}
    found = record_of({"messages": [CHAT[0] | {"from": nothing}, CHAT[1]], **empty}, "a:1", ImageFolder(folder))
    assert found == record_of({"messages": CHAT}, "a:1", ImageFolder(folder))
    whole = record_of({"messages": CHAT, "answers": [3.0, 2.5, 7, "None"]}, "a:1", ImageFolder(folder))
    assert whole.answers == ("3", "2.5", "7", "None")  # Arrow and pandas make 3.0 of 3 where another row has none


# Benchmarks as they are published.

BOOKS = {
    "0002": {
        "imageURL": "http://localhost/0002.jpg", "title": "Cats", "split": 1,
        "questions": ["Who wrote it?", "Is it a comic?"], "answers": ["A. Cat", "No"],
    },
    "0001": {"imageURL": "", "title": "", "split": 3, "questions": ["Which genre?"], "answers": ["Travel"]},
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_ocr_vqa(folder: Path, indent: int | None) -> None:
    (folder / "images").mkdir()
    for name in BOOKS:
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{name}.jpg")
    path = folder / "dataset.json"
    path.write_text(json.dumps(BOOKS, indent=indent))
    first, second = read(path)
    assert first.messages == (
        {"role": "user", "content": [IMAGE, text("Who wrote it?")]},
        {"role": "assistant", "content": [text("A. Cat")]},
    )
    assert (first.answers, first.task, first.source) == (("A. Cat",), "ocrvqa_train", "dataset.json:1")
    assert (second.answers, second.source) == (("No",), "dataset.json:2")
    assert [image.name for image in first.images + second.images] == ["0002.jpg"] * 2
    (test,) = read(path, split="test")
    assert (test.answers, test.task, test.images[0].name) == (("Travel",), "ocrvqa_test", "0001.jpg")
    with pytest.raises(UserError, match=r"dataset.json: it is empty"):
        read(path, split="validation")
    with pytest.raises(UserError, match=r"dataset.json: no split 'tset'; nearest: test"):
        read(path, split="tset")


def test_ocr_vqa_with_something_wrong(folder: Path) -> None:
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "1.jpg")
    books = {"../../1": BOOKS["0002"], "1": {**BOOKS["0002"], "answers": ["red"]}}
    (folder / "dataset.json").write_text(json.dumps(books))
    found = read(folder / "dataset.json", on_bad="skip")
    assert [(record.source, record.answers) for record in found] == [("dataset.json:3", ("red",))]
    assert [one.source for one in found.skipped] == ["dataset.json:1", "dataset.json:2", "dataset.json:4"]


ANNOTATIONS = [
    {"question_id": 7, "image_id": 42, "question_type": "color", "answers": [{"answer": "red", "answer_id": 1}]},
    {"question_id": 9, "image_id": 42, "question_type": "counting", "answers": [{"answer": "2"}]},
]
QUESTIONS = [
    {"question_id": 9, "image_id": 42, "question": "How many cats?"},
    {"question_id": 7, "image_id": 42, "question": "What colour is it?"},
]


@pytest.fixture
def tdiuc(folder: Path) -> Path:
    for name in ("Annotations", "Questions", "Images/val2014"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "Images/val2014/COCO_val2014_000000000042.jpg")
    questions = {"task_type": "Open-Ended", "data_subtype": "val2014", "questions": QUESTIONS}
    (folder / "Questions/OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    path = folder / "Annotations/mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"info": {}, "data_subtype": "val2014", "annotations": ANNOTATIONS}, indent=2))
    return path


def test_tdiuc_has_a_task_for_each_type_of_question(tdiuc: Path) -> None:
    color, counting = read(tdiuc, images=tdiuc.parents[1] / "Images")
    assert color.messages[0]["content"] == [IMAGE, text("What colour is it?")]
    assert (color.task, color.answers, color.source) == ("tdiuc_color", ("red",), f"{tdiuc.name}:1")
    assert (counting.task, counting.answers) == ("tdiuc_counting", ("2",))
    assert counting.messages[0]["content"] == [IMAGE, text("How many cats?")]
    assert {image.name for image in color.images + counting.images} == {"COCO_val2014_000000000042.jpg"}


def test_tdiuc_with_something_wrong(tdiuc: Path) -> None:
    questions = tdiuc.parents[1] / "Questions/OpenEnded_mscoco_val2014_questions.json"
    with pytest.raises(UserError, match=r"questions without answers; give its annotation file"):
        read(questions)
    broken = [{**ANNOTATIONS[0], "question_id": 8}, {**ANNOTATIONS[0], "answers": []}, ANNOTATIONS[1]]
    tdiuc.write_text(json.dumps({"data_subtype": "val2014", "annotations": broken}))
    found = read(tdiuc, images=tdiuc.parents[1] / "Images", on_bad="skip")
    assert [record.task for record in found] == ["tdiuc_counting"]
    assert [one.source for one in found.skipped] == [f"{tdiuc.name}:1", f"{tdiuc.name}:2"]
    questions.rename(tdiuc.parent / questions.name)  # beside it will do
    assert len(read(tdiuc, images=tdiuc.parents[1] / "Images", on_bad="skip")) == 1
    (tdiuc.parent / questions.name).unlink()
    with pytest.raises(UserError, match=r"its questions, OpenEnded_mscoco_val2014_questions.json, are neither"):
        read(tdiuc)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.sampled_from(["<image>\nWhat?", "red", "", [IMAGE], [{"type": "image", "image": "a.png"}]]) | JSON
ROLE = st.sampled_from(["user", "human", "gpt", "assistant"]) | JSON
TURN = st.fixed_dictionaries({}, optional={"role": ROLE, "from": ROLE, "content": CONTENT, "value": CONTENT})
ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations"), st.lists(TURN | JSON, max_size=3) | JSON),
        **dict.fromkeys(("image", "images"), st.sampled_from(["a.png", "../a.png", ["a.png"] * 2]) | JSON),
        **dict.fromkeys(("text", "id", "task", "metric", "answers", "choices"), JSON),
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW | JSON, max_size=6))
def test_whatever_is_read_gives_records_or_reasons(folder: Path, rows: list[Any]) -> None:
    path = folder / "train.json"
    path.write_text(json.dumps([{"messages": CHAT}, *rows]))
    found = read(path, on_bad="skip")
    assert len(found) + len(found.skipped) == len(rows) + 1
    for record in found:
        assert all(Path(image).parent == folder.resolve() for image in record.images)
        marks = [part for message in record.messages for part in message["content"] if part == IMAGE]
        assert len(marks) == len(record.images)
        assert bool(record.messages) != bool(record.text)
