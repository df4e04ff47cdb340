"""Convert a row of a data file, in any supported format, to a record; errors are one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from striate.data.images import ImageFolder
from striate.data.keys import (
    IMAGES,
    KINDS,
    LOSS_MARKS,
    PART_IMAGES,
    REASONING,
    REFUSED,
    ROW_MARKS,
    SYSTEM,
    TEXTS,
    TURNS,
    check_placeholders,
    is_learned,
    is_missing,
    unread_keys,
)
from striate.data.record import DatasetImage, ImageSource, Record, RecordError

MARK = "<image>"
"""Placeholder of an image in a text, in all formats."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_MARKED = re.compile(rf"({MARK})|<img>([^<>\n]+)</img>")  # Qwen-VL's contains the path
_PLAIN_TURNS = {("from", "value"), ("role", "content")}

Message = dict[str, Any]
Part = dict[str, Any]


def record_of(row: Any, source: str, folder: ImageFolder, unknown: set[str] | None = None) -> Record:
    """Convert a row to a record; images are looked up in `folder`, ignored keys are added to `unknown`.

    Raises:
        RecordError: the row is not a valid record.
    """
    if not isinstance(row, dict):
        raise RecordError(source, f"a record must be an object, found {_kind(row)}")
    row = {key: value for key, value in row.items() if not is_missing(value)}
    strange = unread_keys(row, "row", source)
    turns = _turns(row, source)
    if turns is None and "text" not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise RecordError(source, f"expected 'conversations', 'messages' or 'text', found {found}")
    if not row.keys().isdisjoint(ROW_MARKS) and not is_learned(row, row.keys() & ROW_MARKS, source):
        raise RecordError(source, "its loss mark excludes it from the loss; remove the record")
    if not row.keys().isdisjoint(TURNS):
        strange |= row.keys() & {"text", "prompt", "completion"}
    listed = [folder.locate(one, source) for one in _images(row, source, strange)]
    messages, images = _conversation(turns, row, listed, source, folder, strange)
    if unknown is not None:
        unknown |= strange
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


def _turns(row: dict[str, Any], source: str) -> Any:
    """The conversation; for TRL's prompt and completion, the loss counts only the completion."""
    turns = _only(row, TURNS, source)
    prompt, completion = row.get("prompt"), row.get("completion")
    if turns is None and isinstance(prompt, list) and isinstance(completion, list):
        return [*(turn | {"loss": False} if isinstance(turn, dict) else turn for turn in prompt), *completion]
    return turns


def _images(given: dict[str, Any], source: str, strange: set[str], where: str = "") -> list[Any]:
    """The images of a row or a turn, from the first of its image keys; the other image keys are added to `strange`."""
    found = [key for key in IMAGES if given.get(key)]  # some text-only records have an empty image
    lists = [given[key] if isinstance(given[key], list) else [given[key]] for key in found]
    if len(found) > 1:
        if found[1] == "image" and any(_load_image(one) not in map(_load_image, lists[0]) for one in lists[1]):
            raise RecordError(source, f"{where}'image' and 'images' differ; keep one")
        strange |= {*found[1:]} - {"image"}
    return lists[0] if lists and not all(map(_no_image, lists[0])) else []


def _load_image(image: Any) -> Any:
    return image.load() if isinstance(image, DatasetImage) else image


def _no_image(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, dict) and all(map(is_missing, value.values())))


def _conversation(
    turns: Any, row: dict[str, Any], listed: list[ImageSource], source: str, folder: ImageFolder, strange: set[str]
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The turns as messages, and their images in the order of the placeholders."""
    if turns is None:
        if listed:
            raise RecordError(source, "a plain text record cannot have images; give the text as a turn")
        return (), ()
    if not isinstance(turns, list) or not turns:
        raise RecordError(source, f"the conversation must be a list of turns, found {_kind(turns)}")
    messages = [_message(turn, number, source, strange) for number, turn in enumerate(turns, 1)]
    if not row.keys().isdisjoint(SYSTEM):
        messages = [*_system(row, messages, source), *messages]
    if all(message["role"] != "user" for message in messages):
        raise RecordError(source, "the conversation has no question: no turn of 'human' or 'user'")
    answers = [message for message in messages if message["role"] == "assistant"]
    if answers and not any(message.get("learn", True) for message in answers):
        raise RecordError(source, "its loss marks exclude all answers from the loss; remove the record")
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if listed and not parts:  # as in LLaVA: the images come before the first question
        question = next(message for message in messages if message["role"] == "user")
        parts = [{"type": "image"} for _ in listed]
        question["content"] = [*parts, *question["content"]]
    own = sum("image" in part for part in parts)
    if len(parts) - own != len(listed):
        raise RecordError(source, f"{len(parts) - own} {MARK} placeholders for {len(listed)} images; they must match")
    remaining = iter(listed)
    images = [folder.locate(part.pop("image"), source) if "image" in part else next(remaining) for part in parts]
    return tuple(messages), tuple(images)


def _system(row: dict[str, Any], messages: list[Message], source: str) -> list[Message]:
    """The row's system prompt as a turn, unless the conversation has the same one."""
    text = _only(row, SYSTEM, source)
    if not text:
        return []
    turn = {"role": "system", "content": [{"type": "text", "text": _string(text, "system", source)}]}
    first = next((message for message in messages if message["role"] == "system"), None)
    if first not in (None, turn):
        raise RecordError(source, "'system' and the turn of role system differ; keep one")
    return [] if first else [turn]


def _message(turn: Any, number: int, source: str, strange: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(source, f"turn {number} must be an object, found {_kind(turn)}")
    where = f"turn {number}: "
    plain = tuple(turn) in _PLAIN_TURNS  # fast path for nearly all records
    if plain:
        role, content = turn.values()
    else:
        turn = {key: value for key, value in turn.items() if not is_missing(value)}
        strange |= unread_keys(turn, "turn", source, where)
        role = _only(turn, ("from", "role"), source, where)
        content = _only(turn, ("value", "content"), source, where)
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(source, f"{where}unknown role {str(role)[:40]!r}; expected {', '.join(ROLES)}")
    role = ROLES[role]
    if isinstance(content, str):
        parts = _split_text(content, role, source, where)
    elif isinstance(content, list):
        parts = [new for part in content for new in _parts(part, role, source, where, strange)]
    else:
        raise RecordError(source, f"{where}the content must be text or a list, found {_kind(content)}")
    marks: dict[str, Any] = {}
    if not plain:
        _add_images(parts, turn, source, where, strange)
        marks = _marks(turn, role, source, where)
    if role == "assistant":
        parts = [{"type": "text", "text": _answer(parts, number, source)}]
    elif not parts:
        raise RecordError(source, f"turn {number} is empty")
    return {"role": role, "content": parts} | marks if marks else {"role": role, "content": parts}


def _add_images(parts: list[Part], turn: dict[str, Any], source: str, where: str, strange: set[str]) -> None:
    """Assign the images of a turn to its placeholders, or put them before its text if it has none."""
    if not (images := _images(turn, source, strange, where)):
        return
    free = [part for part in parts if part == {"type": "image"}]
    if not free:
        free = [{"type": "image"} for _ in images]
        parts[:0] = free
    if len(free) != len(images):
        raise RecordError(source, f"{where}{len(free)} {MARK} placeholders for its {len(images)} images")
    for part, image in zip(free, images, strict=True):
        part["image"] = image


def _marks(turn: dict[str, Any], role: str, source: str, where: str) -> dict[str, Any]:
    """Other fields of a turn's message: `learn`, if the loss ignores it, and the reasoning before an answer."""
    keys = turn.keys() & LOSS_MARKS
    learn = is_learned(turn, keys, source, where)
    reasoning = _only(turn, REASONING, source, where)
    if role == "assistant":
        found = {"reasoning_content": _string(reasoning, "reasoning_content", source)} if reasoning else {}
        return found if learn else found | {"learn": False}
    if reasoning:
        raise RecordError(source, f"{where}only an answer can have reasoning")
    if keys and any(turn[key] for key in keys):
        raise RecordError(source, f"{where}'{min(keys)}' includes it in the loss; only answers can be, remove the mark")
    return {}


def _split_text(text: str, role: str, source: str, where: str) -> list[Part]:
    """Split a text at the image placeholders. Answers may contain other placeholders."""
    if "<" not in text or (role == "assistant" and MARK not in text):
        return [{"type": "text", "text": text}] if text else []
    parts: list[Part] = []
    for index, piece in enumerate(_MARKED.split(text)):
        if not piece:
            continue
        if index % 3 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            parts.append({"type": "image"} if index % 3 == 1 else {"type": "image", "image": piece.strip()})
    if role != "assistant":
        for part in parts:
            if "<" in part.get("text", ""):
                check_placeholders(part["text"], source, where)
    return parts


def _parts(part: Any, role: str, source: str, where: str, strange: set[str]) -> list[Part]:
    """Convert a content part, splitting its text at the image placeholders; an image given in the part stays in it."""
    if isinstance(part, dict):
        part = {key: value for key, value in part.items() if not is_missing(value)}
        named = str(part.get("type") or next(iter(part), ""))  # Qwen-VL's parts have no type
        kind = KINDS.get(named)
        if kind:
            strange |= unread_keys(part, "part", source, where)
            texts = _only(part, TEXTS if kind == "text" else TEXTS[:1], source, where)
            places = [key for key in PART_IMAGES if part.get(key) and (kind == "image" or key not in TEXTS)]
            images = [part[key] for key in places if not _no_image(part[key])]
            if kind == "text" and isinstance(texts, str) and not images:
                return _split_text(texts, role, source, where)
            if kind == "image" and not texts and all(image == images[0] for image in images):
                return [
                    {"type": "image", "image": _image_of_part(images[0], source, where)}
                    if images
                    else {"type": "image"}
                ]
            raise RecordError(source, f"{where}a content part must hold one text or one image, found {str(part)[:60]}")
        if named in REFUSED["part"]:
            raise RecordError(source, f"{where}a part of type {named!r} is not supported: {REFUSED['part'][named]}")
    raise RecordError(source, f"{where}a content part must be text or an image, found {str(part)[:60]}")


def _image_of_part(image: Any, source: str, where: str) -> Any:
    """The image of a part, after a check of the keys of OpenAI's object with a URL."""
    if isinstance(image, dict):
        unread_keys(image, "part", source, where)
    return image


def _answer(parts: list[Part], number: int, source: str) -> str:
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


def _only(given: dict[str, Any], keys: Iterable[str], source: str, where: str = "") -> Any:
    """The value of the one key that is present; None if none is."""
    found = [key for key in keys if key in given]
    if len(found) > 1:
        found = [key for key in found if given[key] not in ("", [])] or found[:1]
        for key in found[1:]:
            if given[key] != given[found[0]]:
                raise RecordError(source, f"{where}'{found[0]}' and '{key}' differ; keep one")
    return given[found[0]] if found else None


def _string(value: Any, field: str, source: str) -> str:
    if not isinstance(value, str):
        raise RecordError(source, f"'{field}' must be text, found {_kind(value)}")
    return value


def _strings(value: Any, field: str, source: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    for number, one in enumerate(values, 1):
        if is_missing(one):
            raise RecordError(source, f"'{field}' has an empty item {number}; write its text, or remove it")
        if not isinstance(one, str | int | float) or isinstance(one, bool) or one in (float("inf"), -float("inf")):
            raise RecordError(source, f"'{field}' must be a list of texts, found {str(value)[:60]}")
    # A column of integers with a missing value becomes a column of floats.
    return tuple(str(int(one) if isinstance(one, float) and one.is_integer() else one) for one in values)


def _kind(value: Any) -> str:
    if is_missing(value):
        return "nothing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
