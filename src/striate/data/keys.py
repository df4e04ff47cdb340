"""Keys and placeholders with a meaning in common record formats: each is supported or raises an error.

The formats are those of LLaVA, ShareGPT, LLaMA-Factory, ms-swift, axolotl, TRL, OpenAI, Hugging Face, Qwen-VL, XTuner
and InternVL. `HONORED` and `REFUSED` are the complete list, by place: a row, a turn of its conversation, a part of
a turn's content. docs/data.md shows them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from striate.data.record import RecordError

TURNS = ("messages", "conversations", "conversation")
IMAGES = (
    "images", "image", "image_path", "image_paths", "img", "img_path", "image_file", "image_url", "image_urls",
    "image_base64", "image_bytes", "file_name",
)  # fmt: skip
"""Keys of the images of a row or a turn; the first one present is used."""

SYSTEM = ("system", "system_prompt")
ROW_MARKS = frozenset({"loss", "weight", "loss_weight", "loss_scale", "loss_mask", "sample_weight"})
LOSS_MARKS = ROW_MARKS | {"train", "training", "trainable"}
"""Keys that say whether the loss counts a record or an answer: true or 1, false or 0."""

REASONING = ("reasoning_content", "reasoning", "thinking")
KINDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
}
TEXTS = ("text", "value")
PART_IMAGES = ("image", "image_url", "url", "path", "image_path", "base64", "bytes", "data", "source", "value")

HONORED: dict[str, frozenset[str]] = {
    "row": frozenset(
        {*TURNS, *IMAGES, *SYSTEM, *ROW_MARKS, "prompt", "completion", "id", "text", "task", "metric"}
        | {"answers", "choices"}
    ),
    "turn": frozenset({"from", "role", "value", "content", *IMAGES, *LOSS_MARKS, *REASONING}),
    "part": frozenset({"type", *TEXTS, *PART_IMAGES}),
}

_FRAMES = "striate supports images and text; give frames as images, or remove the record"
_SOUND = "striate supports images and text; remove the record"
_TOOLS = "write tools into the system turn and calls into the texts"
_PAIRS = "striate trains on answers, not on preferences; keep the better answer as the last turn"
_WHOLE = "the loss counts a whole answer or none of it; mark its turn with loss: true or false"
_BOXES = "write names and boxes into the texts"
_PIXELS = "the model's processor decides the size, the same for all images; set it there"
_WORDS = "write it into the texts"
_LIST = "put the images into one list, 'images', in the order of the <image> placeholders"
_TOKENS = "the model's processor creates the tokens; give texts"
_MARK = "write <image>"

REFUSED: dict[str, dict[str, str]] = {
    "row": {
        **dict.fromkeys(("video", "videos", "video_path", "video_url", "frames"), _FRAMES),
        **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "speech"), _SOUND),
        **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "documents"), _TOOLS),
        **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"), _PAIRS),
        **dict.fromkeys(("kto_tag", "label", "margin"), _PAIRS),
        "history": "put the earlier turns into the conversation",
        "segments": "write them as turns, with loss: false for text that the loss ignores",
        **dict.fromkeys(("objects", "boxes_seq"), _BOXES),
        **dict.fromkeys(("input_ids", "labels", "attention_mask"), _TOKENS),
        **dict.fromkeys(("chat_template", "chat_template_kwargs"), "set the template in the model's processor"),
        **dict.fromkeys(("min_pixels", "max_pixels", "resized_height", "resized_width"), _PIXELS),
        **{f"image{gap}{number}": _LIST for gap in ("", "_") for number in range(10)},
    },
    "turn": {
        **dict.fromkeys(("video", "videos"), _FRAMES),
        **dict.fromkeys(("audio", "audios", "audio_url"), _SOUND),
        **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id", "recipient"), _TOOLS),
        **dict.fromkeys(("name", "refusal"), _WORDS),
        **dict.fromkeys(("training_detail", "train_detail", "mask", "masked"), _WHOLE),
        **dict.fromkeys(("prefix", "partial"), "give the whole answer"),
        **dict.fromkeys(("input", "output"), "write two turns, of role user and of role assistant"),
        **dict.fromkeys(("system", "system_prompt"), "write a turn of role system"),
        **dict.fromkeys(("boxes", "boxes_seq", "objects"), _BOXES),
        **dict.fromkeys(("chosen", "rejected"), _PAIRS),
    },
    "part": {
        **dict.fromkeys(("video", "video_url", "frames", "nframes", "fps"), _FRAMES),
        **dict.fromkeys(("audio", "audio_url", "input_audio"), _SOUND),
        **dict.fromkeys(("min_pixels", "max_pixels", "resized_height", "resized_width", "detail"), _PIXELS),
        **dict.fromkeys(("file", "file_id", "file_data"), "give images as paths or data"),
        **dict.fromkeys(("refusal", "name"), _WORDS),
        **dict.fromkeys(LOSS_MARKS, _WHOLE),
        **dict.fromkeys(REASONING, "give it as 'reasoning_content' of the turn"),
        **dict.fromkeys(("tool_calls", "tool_use", "tool_result", "input"), _TOOLS),
        **dict.fromkeys(("bbox", "boxes", "objects"), _BOXES),
    },
}

PLACEHOLDERS: dict[str, str] = {
    **dict.fromkeys(("<video>", "<|video|>", "<|video_pad|>"), _FRAMES),
    **dict.fromkeys(("<audio>", "<speech>", "<|audio|>", "<|AUDIO|>"), _SOUND),
    **dict.fromkeys(("<img>", "<Image>", "<IMAGE>", "<ImageHere>", "<image_placeholder>", "<|image|>"), _MARK),
    **dict.fromkeys(("<|image_pad|>", "<IMG_CONTEXT>", "<start_of_image>", "<image_soft_token>"), _MARK),
    **dict.fromkeys(("<image_1>", "<image1>", "<image 1>", "<|image_1|>"), _MARK),  # and any other number
    **dict.fromkeys(("<ref-object>", "<boxes>"), _BOXES),
}
"""Placeholders for media in the text of a question, with the fix. HTML tags of the same name are ordinary text."""

_HTML = "|".join(("<video>", "<audio>", "<img>"))
_TAG = re.compile(rf"^[ \t]*({_HTML})|({_HTML})[ \t]*$", re.MULTILINE)
_OTHER = re.compile("|".join([*map(re.escape, PLACEHOLDERS.keys() - set(_HTML.split("|"))), r"<\|?image[ _]?\d+\|?>"]))


_FLAGS = {"label", "kto_tag"}
"""Keys that mark a preference if their value is true or false; other values are class labels and are ignored."""


def is_missing(value: Any) -> bool:
    """Whether a value is None, or NaN, which pandas and Arrow use for it."""
    return value is None or (isinstance(value, float) and value != value)


def unread_keys(given: dict[str, Any], place: str, source: str, where: str = "") -> set[str]:
    """The keys of a row, turn or part without a meaning in any format.

    Raises:
        RecordError: a key with a meaning that is not supported has a value.
    """
    others = given.keys() - HONORED[place]
    if not others:
        return others
    refused = REFUSED[place]
    for key in sorted(others & refused.keys()):
        if _has_value(key, given[key]):
            raise RecordError(source, f"{where}'{key}' is not supported: {refused[key]}")
    return others - refused.keys() | others & _FLAGS


def _has_value(key: str, value: Any) -> bool:
    if key in _FLAGS:
        return isinstance(value, bool)
    return not _empty(value) and (key, value) != ("detail", "auto")


def _empty(value: Any) -> bool:
    """Whether a value is empty, also as Arrow fills missing fields, or ms-swift and LLaMA-Factory write them."""
    if isinstance(value, dict | list):
        return all(map(_empty, value.values() if isinstance(value, dict) else value))
    return is_missing(value) or value in (False, "", "[]", "{}")


def is_learned(given: dict[str, Any], keys: Collection[str], source: str, where: str = "") -> bool:
    """Whether all loss marks among `keys` are true.

    Raises:
        RecordError: a mark is not true, false, 1 or 0.
    """
    for key in sorted(keys):
        if (value := given[key]) not in (0, 1):
            raise RecordError(source, f"{where}'{key}' is {value!r:.40}, expected 0 or 1: {_WHOLE}")
    return all(given[key] for key in keys)


def check_placeholders(text: str, source: str, where: str) -> None:
    """Raise `RecordError` for a placeholder, other than <image>, in the text of a question."""
    found = _OTHER.search(text)
    tag = _TAG.search(text)
    name = found[0] if found else tag[1] or tag[2] if tag else ""
    if not name or (not found and f"</{name[1:]}" in text):
        return
    raise RecordError(source, f"{where}{name} is not supported: {PLACEHOLDERS.get(name, _MARK)}")
