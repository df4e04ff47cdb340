"""What a data set looks like on disk: the layouts in use are read, or named with the fix; nothing is passed over."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from striate.data import Record, RecordError, open_image, read
from striate.data.record import DatasetImage
from striate.errors import UserError
from striate.runs.provenance import content_of

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
ROWS = [{"messages": CHAT, "id": str(number)} for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def write(file: Path, rows: list[Any] = ROWS) -> Path:
    """As a list or as lines, packed or not, as the name has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if ".json." in f"{file.name}." else "\n".join(map(json.dumps, rows))
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def ids(path: Path, **options: Any) -> list[str]:
    return [record.id for record in read(path, **options)]


def row(name: str) -> dict[str, Any]:
    return {"messages": CHAT, "id": name}


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.ndjson", "A.JSON", "a.jsonl"])
def test_files(folder: Path, name: str) -> None:
    write(folder / name)
    for path in (folder / name, folder):
        found = read(path)
        assert [record.id for record in found] == ["0", "1", "2"]
        assert found.records[1].source == f"{name}:2"


@pytest.mark.parametrize(
    "body", [b"no gzip at all", gzip.compress(b'[{"text": "a"}]' * 99)[:40], b""], ids=["plain", "cut", "empty"]
)
def test_a_packed_file_that_is_broken(folder: Path, body: bytes) -> None:
    (folder / "a.json.gz").write_bytes(body)
    with pytest.raises(UserError, match=r"a.json.gz: (cannot be read|it is empty)") as caught:
        read(folder / "a.json.gz", on_bad="skip")
    assert "\n" not in str(caught.value)


def test_folders_below(folder: Path) -> None:
    write(folder / "part1" / "a.jsonl", [row("a")])
    write(folder / "part2" / "deep" / "b.json.gz", [row("b")])
    write(folder / ".cache" / "c.json", [row("c")])
    assert ids(folder) == ["a", "b"]
    assert read(folder).notes == []
    write(folder / "own.json", [row("own")])
    found = read(folder)
    assert [record.id for record in found] == ["own"]
    assert found.notes == [f"{folder}: files in subfolders are skipped: part1/a.jsonl, part2/deep/b.json.gz"]


@pytest.mark.parametrize("form", ["{}.json", "{}-00000-of-00001.jsonl", "data/{}.jsonl", "{}/0.json", "my_{}2017.json"])
def test_files_of_other_splits_are_passed_over(folder: Path, form: str) -> None:
    for split in ("train", "test", "val"):
        write(folder / form.format(split), [row(split)])
    assert ids(folder) == ["train"]
    assert ids(folder, split="test") == ["test"]
    assert ids(folder, split="validation") == ["val"]
    names = sorted(form.format(split) for split in ("test", "val"))
    assert read(folder).notes == [f"{folder}: files of other splits are skipped: {', '.join(names)}"]
    assert sorted(ids(folder, split="other")) == ["test", "train", "val"]


@pytest.mark.parametrize("form", ["{}.JSONL", "{}-0.json", "data/{}.jsonl", "{}/deep/0.json.gz"])
def test_the_content_of_a_folder_is_that_of_the_files_that_are_read(folder: Path, form: str) -> None:
    files = {split: write(folder / form.format(split), [row(split)]) for split in ("train", "test")}
    before = {split: content_of(folder, split=split) for split in files}
    assert all(form.format(split) in before[split] for split in files)
    write(files["train"], [row("other")])
    assert content_of(folder, split="train") != before["train"]
    if "/" in form:
        assert content_of(folder, split="test") == before["test"]


def test_what_else_is_there_is_named(folder: Path) -> None:
    for name in ("a.tar", "b.tar", "c.csv", "README.md", "x.png"):
        (folder / name).write_bytes(b"x")
    advice = r"no .json, .jsonl, .parquet file in this folder; it holds .*2 .tar"
    with pytest.raises(UserError, match=advice):
        read(folder)
    write(folder / "train.json")
    assert read(folder).notes in ([f"{folder}: skipped: {amounts}"] for amounts in ("2 .tar, 1 .csv", "1 .csv, 2 .tar"))


@pytest.mark.parametrize(("name", "message"), [
    ("a.tar", "a.tar: expected a .json, .jsonl, .parquet file; unpack the WebDataset shards and write"),
    ("a.tsv", "a.tsv: expected a .json, .jsonl, .parquet file; write it as JSON lines"),
    ("a.jsonl.zst", "a.jsonl.zst: expected a .json, .jsonl, .parquet file; unpack it"),
    ("state.json", "state.json: this is metadata of a data set, not records; give the folder or the data file"),
    ("dataset_info.json", "dataset_info.json: this is metadata of a data set, not records"),
])  # fmt: skip
def test_files_that_are_not_read(folder: Path, name: str, message: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(UserError) as caught:
        read(folder / name)
    assert message in str(caught.value)


def test_a_folder_of_images_with_its_metadata(folder: Path) -> None:
    write(folder / "train" / "metadata.jsonl", [{"file_name": "b.png", "messages": CHAT}])
    (folder / "a.png").rename(folder / "train" / "b.png")
    (found,) = read(folder)
    assert found.images == (folder / "train" / "b.png",)
    write(folder / "train" / "metadata.jsonl", [{"file_name": "b.png", "text": "a cat"}])
    with pytest.raises(RecordError, match=r"metadata.jsonl:1: a plain text record cannot have images; give the"):
        read(folder)


def test_the_registry_of_llama_factory_is_not_a_data_file(folder: Path) -> None:
    write(folder / "mine.json")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    assert ids(folder) == ["0", "1", "2"]


def test_a_folder_of_the_cache_of_the_hub(folder: Path) -> None:
    cached = folder / "datasets--someone--cats"
    write(cached / "snapshots" / "0123" / "data" / "train.jsonl")
    with pytest.raises(UserError, match=r"belongs to the hub's cache; give 'someone/cats', or a folder in its snap"):
        read(cached)
    assert ids(cached / "snapshots" / "0123") == ["0", "1", "2"]


@pytest.mark.parametrize(("whole", "message"), [
    ({"data": ROWS, "version": 1}, "train.json: one object with data, version; expected a list of records, or one"),
    ({"image": {"0": "a.png"}, "question": {"0": "What?"}}, "train.json: one object with image, question"),
])  # fmt: skip
def test_one_object_that_is_not_a_record(folder: Path, whole: Any, message: str) -> None:
    (folder / "train.json").write_text(json.dumps(whole, indent=2))
    with pytest.raises(UserError) as caught:
        read(folder / "train.json")
    assert message in str(caught.value)


def test_one_object_that_is_a_record(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(ROWS[0], indent=2))
    assert ids(folder / "train.json") == ["0"]


# Of `datasets`.


@pytest.fixture
def datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    found.disable_progress_bars()
    return found


pytestmark = pytest.mark.filterwarnings("ignore")  # of `datasets` and its own dependencies


@pytest.mark.parametrize("form", [None, "numpy"])
def test_a_saved_data_set(folder: Path, datasets: Any, form: str | None) -> None:
    data = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    rows = [{"messages": CHAT, "image": data, "answers": ["3"]}, {"messages": CHAT, "image": None, "answers": None}]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).with_format(form)
    dataset.save_to_disk(folder / "saved", num_shards=2)
    for path in (folder / "saved", *(folder / "saved").glob("*-00000-of-*.arrow")):
        found = list(read(path))
        assert [len(record.images) for record in found] == [1, 0][: len(found)]
        assert isinstance(found[0].images[0], DatasetImage)
        assert open_image(found[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
        assert found[0].answers == ("3",)
    assert len(read(folder / "saved")) == 2
    assert any(name.endswith(".arrow") for name in content_of(folder / "saved"))


def test_a_saved_dict_of_splits(folder: Path, datasets: Any) -> None:
    splits = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    assert ids(folder / "saved") == ["train"]
    assert ids(folder / "saved", split="test") == ["test"]
    for split in splits:
        content = content_of(folder / "saved", split=split)
        assert {f"{split}/state.json", f"{split}/data-00000-of-00001.arrow", "dataset_dict.json"} <= content.keys()
        assert len({name.rpartition("/")[0] for name in content}) == 2
    with pytest.raises(UserError, match=r"saved: no split 'validation'; there are: train, test"):
        read(folder / "saved", split="validation")
    for broken in ("[]", "{"):
        (folder / "saved" / "dataset_dict.json").write_text(broken)
        with pytest.raises(UserError, match=r"saved: its dataset_dict.json is corrupted; save the data set again"):
            read(folder / "saved")
    (folder / "saved" / "dataset_dict.json").unlink()
    assert ids(folder / "saved") == ["train"]
    next((folder / "saved" / "train").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"train: not a readable saved data set"):
        read(folder / "saved" / "train")


def test_images_as_text_in_parquet(folder: Path, datasets: Any) -> None:
    text = b64encode((folder / "a.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{text}"
    rows = [{"messages": CHAT, "images": [one], "img": None} for one in (text, uri, "a.png", "data:image/png;base64,*")]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    found = read(folder / "train.parquet", on_bad="skip")
    images = [record.images[0] for record in found]
    assert [type(image) for image in images[:2]] == [DatasetImage, DatasetImage]
    assert [open_image(image).getpixel((0, 0)) for image in images] == [(255, 0, 0)] * 3
    assert [one.source for one in found.skipped] == ["train.parquet:4"]


def test_arrow_fills_up_what_other_records_have(folder: Path, datasets: Any) -> None:
    """Rows of several formats in one table have every key of each other, with nothing in it."""
    part = {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}, "video": None}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}, {**CHAT[1], "content": [
            {"type": "text", "text": "red"}], "weight": 0}, *[
                {"role": role, "content": [{"type": "text", "text": "So"}]} for role in ("user", "assistant")]],
         "videos": [], "tools": None, "choices": None, "score": 1.0},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, {
            "role": "assistant", "content": [{"type": "text", "text": "So"}], "reasoning_content": "Hm", "weight": 1}],
         "choices": ["a", "b"]},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    found = read(folder / "train.parquet")
    first, second = found
    assert [message.get("learn", True) for message in first.messages] == [True, False, True, True]
    assert first.images == (folder / "a.png",)
    assert second.messages[1]["reasoning_content"] == "Hm"
    assert (first.choices, second.choices) == ((), ("a", "b"))
    assert found.notes == [f"{folder / 'train.parquet'}: ignored keys: score"]
    assert isinstance(first, Record)
