"""One row of a data file as a record, in either spelling: what is wrong with it is said in one line."""

from __future__ import annotations

import re
from typing import Any

from striate.data.images import ImageFolder
from striate.data.record import ImageSource, Record, RecordError

MARK = "<image>"
"""Where an image belongs in a text, in both spellings."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MARKED = re.compile(rf"\n?({MARK})\n?")  # a line break beside a mark belongs to it: chat templates write their own


def record_of(row: Any, source: str, folder: ImageFolder) -> Record:
    """The record that a row is, its images looked up in `folder`.

    Raises:
        RecordError: it is none.
    """
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
        answers=_strings(row["answers"], "answers", source) if "answers" in row else (),
        choices=_strings(row["choices"], "choices", source) if "choices" in row else (),
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
    if isinstance(content, str):
        parts = _cut(content)
    elif isinstance(content, list):
        parts = [new for part in content for new in _parts(part, number, source)]
    else:
        raise RecordError(source, f"turn {number}: the content must be text or a list, found {_kind(content)}")
    if ROLES[role] == "assistant":
        parts = [{"type": "text", "text": _answer(parts, number, source)}]
    elif not parts:
        raise RecordError(source, f"turn {number} is empty")
    return {"role": ROLES[role], "content": parts}


def _cut(text: str) -> list[dict[str, Any]]:
    """A text, cut at the image marks."""
    if MARK not in text:
        return [{"type": "text", "text": text}] if text else []
    pieces = _MARKED.split(text)
    return [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]


def _parts(part: Any, number: int, source: str) -> list[dict[str, Any]]:
    """A content part, its text cut at the image marks; an image that the part itself names stays in it."""
    match part:
        case {"type": "text", "text": str(text)}:
            return _cut(text)
        case {"type": "image" | "image_url"}:
            named = [part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None]
            return [{"type": "image", "image": named[0]} if named else {"type": "image"}]
    raise RecordError(source, f"turn {number}: a content part must be text or an image, found {str(part)[:60]}")


def _answer(parts: list[dict[str, Any]], number: int, source: str) -> str:
    texts = [part["text"] for part in parts if "text" in part]
    if len(texts) < len(parts):
        raise RecordError(source, f"turn {number}: an answer cannot hold an image")
    answer = "".join(texts)
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
