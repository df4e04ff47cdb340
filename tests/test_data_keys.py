"""Every key and placeholder of the list, in every place: honored with the right effect, or refused by name."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from striate.data import Record, RecordError, read
from striate.data.format import record_of
from striate.data.images import ImageFolder
from striate.data.keys import HONORED, IMAGES, LOSS_MARKS, PLACEHOLDERS, REASONING, REFUSED, ROW_MARKS, SYSTEM, TURNS

IMAGE = {"type": "image"}
ASKED, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}
AGAIN = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
CHAT = [ASKED, SAID, *AGAIN]
SOURCE = "train.json:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    return folder


@pytest.fixture
def record(folder: Path) -> Callable[..., Record]:
    return lambda row, **kept: record_of(row, SOURCE, ImageFolder(folder), **kept)


def placed(place: str, keys: dict[str, Any]) -> dict[str, Any]:
    """A sound record with keys more in one of its places; a turn is its first answer where the keys are of one."""
    if place == "row":
        return {"messages": CHAT, **keys}
    if place == "turn":
        return {"messages": [ASKED, {**SAID, **keys}, *AGAIN]}
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"} | keys]}, *CHAT[1:]]}


PLACES = [(place, key) for place, keys in REFUSED.items() for key in sorted(keys)]


@pytest.mark.parametrize(("place", "key"), PLACES)
def test_a_refused_key_is_named_with_advice(record: Callable[..., Record], place: str, key: str) -> None:
    value: Any = True if key in ("label", "kto_tag") else ["x"]
    with pytest.raises(RecordError) as caught:
        record(placed(place, {key: value}))
    where = {"row": "", "turn": "turn 2: ", "part": "turn 1: "}[place]
    assert str(caught.value) == f"{SOURCE}: {where}'{key}' is not supported: {REFUSED[place][key]}"
    plain = record(placed(place, {}))
    for empty in (None, float("nan"), "", [], {}, "[]", [None], {"a": None, "b": []}):
        assert record(placed(place, {key: empty})) == plain


def test_no_key_is_both_honored_and_refused() -> None:
    assert all(not HONORED[place] & REFUSED[place].keys() for place in HONORED)


@pytest.mark.parametrize("key", sorted(HONORED["row"]))
def test_an_honored_key_of_a_row_counts(record: Callable[..., Record], key: str, folder: Path) -> None:
    plain = record({"messages": CHAT})
    if key in TURNS:
        assert record({key: CHAT}) == plain
    elif key in IMAGES:
        value: Any = b64encode((folder / "a.png").read_bytes()).decode() if "64" in key else "a.png"
        assert len(record({"messages": CHAT, key: value}).images) == 1
        assert record({"messages": CHAT, key: [value]}).messages[0]["content"][0] == IMAGE
    elif key in SYSTEM:
        prompted = record({"messages": CHAT, key: "Be brief."})
        turn = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        assert prompted.messages == (turn, *plain.messages)
        assert record({"messages": [{"role": "system", "content": "Be brief."}, *CHAT], key: "Be brief."}) == prompted
        with pytest.raises(RecordError, match="'system' and the turn of role system differ; keep one"):
            record({"messages": [{"role": "system", "content": "Be long."}, *CHAT], key: "Be brief."})
    elif key in ROW_MARKS:
        assert all(record({"messages": CHAT, key: value}) == plain for value in (1, True, 1.0, None, float("nan")))
        for value in (0, False):
            with pytest.raises(RecordError, match="its loss mark excludes it from the loss"):
                record({"messages": CHAT, key: value})
        for value in (0.5, 2, "no", [1, 0]):
            with pytest.raises(RecordError, match=f"'{key}' is .*, expected 0 or 1"):
                record({"messages": CHAT, key: value})
    elif key in ("prompt", "completion"):
        found = record({"prompt": CHAT[:3], "completion": CHAT[3:]})
        assert [message.get("learn", True) for message in found.messages] == [True, False, True, True]
        assert [message["content"] for message in found.messages] == [message["content"] for message in plain.messages]
    elif key == "text":
        assert record({key: "A text"}).text == "A text"
    else:
        value = "a" if key in ("id", "task", "metric") else ["a"]
        assert getattr(record({"messages": CHAT, key: value}), key) == (value if isinstance(value, str) else ("a",))


@pytest.mark.parametrize("key", sorted(HONORED["turn"]))
def test_an_honored_key_of_a_turn_counts(record: Callable[..., Record], key: str, folder: Path) -> None:
    plain = record({"messages": CHAT})
    if key in LOSS_MARKS:
        found = record(placed("turn", {key: 0}))
        assert found.messages[1] == plain.messages[1] | {"learn": False}
        assert record(placed("turn", {key: True})) == plain
        assert record({"messages": [{**ASKED, key: False}, *CHAT[1:]]}) == plain
        with pytest.raises(RecordError, match=f"turn 1: '{key}' includes it in the loss; only answers can"):
            record({"messages": [{**ASKED, key: 1}, *CHAT[1:]]})
        with pytest.raises(RecordError, match=f"turn 2: '{key}' is 0.5, expected 0 or 1"):
            record(placed("turn", {key: 0.5}))
        with pytest.raises(RecordError, match="its loss marks exclude all answers"):
            record({"messages": [ASKED, {**SAID, key: 0}]})
    elif key in REASONING:
        found = record(placed("turn", {key: "It looks red."}))
        assert found.messages[1] == plain.messages[1] | {"reasoning_content": "It looks red."}
        with pytest.raises(RecordError, match="turn 1: only an answer can have reasoning"):
            record({"messages": [{**ASKED, key: "So?"}, SAID]})
    elif key in IMAGES:
        value: Any = b64encode((folder / "a.png").read_bytes()).decode() if "64" in key else "a.png"
        found = record({"messages": [ASKED, SAID, {**AGAIN[0], key: [value]}, AGAIN[1]]})
        assert found.messages[2]["content"] == [IMAGE, {"type": "text", "text": "Sure?"}]
        assert len(found.images) == 1
        marked = {"role": "user", "content": "Is <image> red?", key: value}
        assert record({"messages": [marked, SAID]}).messages[0]["content"][1] == IMAGE
        with pytest.raises(RecordError, match="turn 1: 1 <image> placeholders for its 2 images"):
            record({"messages": [{**marked, key: [value, value]}, SAID]})
    else:
        other = {"from": "user", "value": "What?"} if key in ("from", "value") else ASKED
        assert record({"messages": [other | {"weight": None}, *CHAT[1:]]}) == plain
        twice = {"value": "Who?"} if key in ("value", "content") else {"from": "assistant"}
        with pytest.raises(RecordError, match=f"turn 1: .*'{key}'.* differ; keep one"):
            record({"messages": [ASKED | twice, *CHAT[1:]]})


def data_uri(folder: Path) -> str:
    return "data:image/png;base64," + b64encode((folder / "a.png").read_bytes()).decode()


@pytest.mark.parametrize("part", [
    {"type": "text", "text": "What?"}, {"type": "input_text", "text": "What?"}, {"text": "What?"},
    {"type": "text", "value": "What?"}, {"type": "text", "text": "What?", "image": None, "image_url": None},
    {"type": "output_text", "text": "What?"}, {"type": "text", "text": "What?", "image_url": {"url": None}},
])  # fmt: skip
def test_texts_as_parts(record: Callable[..., Record], part: dict[str, Any]) -> None:
    assert record({"messages": [{"role": "user", "content": [part]}, SAID]}) == record({"messages": [ASKED, SAID]})


@pytest.mark.parametrize("part", [
    *({"type": "image", key: "a.png"} for key in ("image", "url", "path", "image_path", "value")),
    {"type": "image_url", "image_url": "a.png"}, {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, {"type": "image_url", "value": "a.png"},
    {"type": "input_image", "image_url": "URI"}, {"type": "image_url", "image_url": {"url": "URI"}},
    {"type": "image", "base64": "B64"}, {"type": "image", "data": "B64"}, {"type": "image", "bytes": "B64"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "B64"}},
    {"image": "a.png"}, {"type": "image", "image": "a.png", "text": None},
    {"type": "image", "image": {"path": "a.png", "bytes": None}},
])  # fmt: skip
def test_images_as_parts(record: Callable[..., Record], part: dict[str, Any], folder: Path) -> None:
    text = json.dumps(part).replace("URI", data_uri(folder)).replace("B64", data_uri(folder).partition(",")[2])
    (found,) = record({"messages": [{"role": "user", "content": [json.loads(text), {"text": "What?"}]}, SAID]}).images
    content = found.read_bytes() if isinstance(found, Path) else found
    assert content == (folder / "a.png").read_bytes()


@pytest.mark.parametrize(("part", "reason"), [
    ({"type": "image", "image": "a.png", "text": "see"}, "must hold one text or one image"),
    ({"type": "text", "text": "see", "image": "a.png"}, "must hold one text or one image"),
    ({"type": "image", "image": "a.png", "url": "b.png"}, "must hold one text or one image"),
    ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "'detail' is not supported: the model's"),
    ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "'video_url' is not supported"),
    ({"type": "input_audio", "input_audio": {"data": "x"}}, "'input_audio' is not supported: striate supports"),
    ({"type": "thinking", "thinking": "So"}, "'thinking' is not supported: give it as 'reasoning_content' of the turn"),
    ({"type": "document"}, "a content part must be text or an image"),
])  # fmt: skip
def test_parts_that_are_refused(record: Callable[..., Record], part: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        record({"messages": [{"role": "user", "content": [part]}, SAID]})
    assert str(caught.value).startswith(f"{SOURCE}: turn 1: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", [*PLACEHOLDERS, "<image_12>", "<image 7>", "<|image_2|>"])
def test_a_placeholder_is_refused_in_a_question_only(record: Callable[..., Record], name: str) -> None:
    for text in (f"{name}\nWhat?", f"What?\n{name}", name, f"<image>{name}"):
        for content in (text, [{"type": "text", "text": text}]):
            with pytest.raises(RecordError, match=r"turn 1: .* is not supported: ") as caught:
                record({"image": "a.png", "messages": [{"role": "user", "content": content}, SAID]})
            assert name in str(caught.value)
    assert record({"messages": [ASKED, {"role": "assistant", "content": f"{name} it is"}]}).messages


@pytest.mark.parametrize("text", [
    "Explain the <video> tag.", "Fix this page:\n<video>\n  <source src='a.mp4'>\n</video>", "<audio></audio>?",
    'Is <img src="a.png"> right?', "x < y > z", "<b>video</b>", "<imagery>", "Use <image-set>.",
])  # fmt: skip
def test_texts_that_only_look_like_placeholders(record: Callable[..., Record], text: str) -> None:
    found = record({"messages": [{"role": "user", "content": text}, SAID]})
    assert found.messages[0]["content"] == [{"type": "text", "text": text}]


def test_an_image_named_in_the_text(record: Callable[..., Record]) -> None:
    found = record({"messages": [{"role": "user", "content": "Picture 1: <img>a.png</img>\nWhat?"}, SAID]})
    texts = [{"type": "text", "text": "Picture 1: "}, IMAGE, {"type": "text", "text": "\nWhat?"}]
    assert found.messages[0]["content"] == texts
    assert [path.name for path in found.images] == ["a.png"]
    with pytest.raises(RecordError, match=r"image ../a.png is outside the image folder"):
        record({"messages": [{"role": "user", "content": "<img>../a.png</img>What?"}, SAID]})


@pytest.mark.parametrize(("row", "reason"), [
    ({"messages": CHAT, "conversations": CHAT[:2]}, "'messages' and 'conversations' differ; keep one"),
    ({"messages": CHAT, "image": "a.png", "images": ["b.png"]}, "'image' and 'images' differ; keep one"),
    ({"messages": CHAT, "system": ["Be brief."]}, "'system' must be text, found a list"),
    ({"conversation": [{"input": "What?", "output": "red", "system": "Be brief."}]}, "turn 1: 'input' is not sup"),
    ({"prompt": "What?", "chosen": "red", "rejected": "blue"}, "'chosen' is not supported: striate trains on answers"),
    ({"prompt": "What?", "completion": "red"}, "expected 'conversations', 'messages' or 'text', found prompt, compl"),
    ({"text": "A cat", "file_name": "a.png"}, "a plain text record cannot have images; give the text as a turn"),
    ({"messages": [ASKED, {**SAID, "reasoning_content": ["So"]}]}, "'reasoning_content' must be text, found a list"),
])  # fmt: skip
def test_what_contradicts_itself(record: Callable[..., Record], row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        record(row)
    assert str(caught.value).startswith(f"{SOURCE}: {reason}")


def test_other_keys_are_listed_once(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{**ASKED, "lang": "en"}, SAID], "score": 1, "id": "1"},
        {"messages": CHAT, "score": 2, "text": "What? red", "label": 3, "image_url": "b.png", "image": "a.png"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?", "lang": "en"}]}, SAID]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = read(tmp_path / "train.json", images=folder)
    assert len(found) == 3
    assert found.notes == [f"{tmp_path / 'train.json'}: ignored keys: image_url, label, lang, score, text"]
    (tmp_path / "train.json").write_text(json.dumps(rows[2:] and [{"messages": CHAT}]))
    assert read(tmp_path / "train.json").notes == []
