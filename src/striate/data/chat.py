"""Render a conversation with the model's chat template, and locate the answers in the text.

Most chat templates do not mark the answers. So a conversation is rendered a second time with a placeholder for every
answer: the text around the placeholders is the template's own, the rest are the answers. The loss counts the text from
the end of the generation prompt on: reasoning, or an empty reasoning block, is learned with the last answer.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from striate.data.record import RecordError
from striate.errors import UserError
from striate.vlm.processors import image_token_id
from striate.vlm.template import (
    ANSWER_PLACEHOLDER,
    REASONING_KEYS,
    THINKING,
    Message,
    apply_template,
    check_template,
    drops_reasoning,
    end_token,
    end_tokens,
    image_mark,
    lead_of,
    reads_reasoning,
    split_reasoning,
    template_of,
    turn,
)

Span = tuple[int, int]
"""Start and end of a range of characters; the end is exclusive."""


def render(processor: Any, messages: list[Message], source: str, *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt`, the generation prompt is added.

    Line breaks between a text and an image are kept, unless the template writes them itself.
    """
    template = template_of(processor)
    if template is None:
        raise UserError(
            "the model's processor has no chat template; set processor.chat_template and save it", see="chat-template"
        )
    own = _own_breaks(processor, template)
    try:
        return apply_template(processor, [_without_breaks(message, *own) for message in messages], prompt=prompt)
    except (TemplateError, TypeError) as error:
        raise RecordError(source, f"the model's chat template rejects the conversation ({error})") from error


@lru_cache(maxsize=8)
def _own_breaks(processor: Any, template: str) -> tuple[bool, bool]:
    """Whether the chat template writes a line break between a text and an image, and between an image and a text.

    `template` is a key of the cache: a processor may be given another.
    """
    before, behind = "\ue000before\ue001", "\ue000behind\ue001"
    content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": behind}]
    try:
        text = apply_template(processor, [{"role": "user", "content": content}])
    except (TemplateError, TypeError):  # reported for the first record
        return False, False
    return f"{before}\n" in text, f"\n{behind}" in text


def _without_breaks(message: Message, before: bool, behind: bool) -> Message:
    """The message without the line breaks next to images that the template writes itself."""
    if not (before or behind):
        return message
    kinds = ["", *(part["type"] for part in message["content"]), ""]
    parts = []
    for part, last, following in zip(message["content"], kinds, kinds[2:], strict=False):
        if part["type"] == "text":
            text = part["text"].removeprefix("\n") if behind and last == "image" else part["text"]
            text = text.removesuffix("\n") if before and following == "image" else text
            part = part | {"text": text}
        if part.get("text") != "":
            parts.append(part)
    return message | {"content": parts}


def render_prompt(processor: Any, messages: list[Message], source: str) -> str:
    """The text of a conversation up to and including the last generation prompt."""
    check_template(processor)
    return render(processor, _with_reasoning(processor, messages), source, prompt=True)


def render_answers(processor: Any, messages: list[Message], source: str) -> tuple[str, list[Span]]:
    """The text of a conversation that ends with an answer, and the span of each answer with its end token.

    The text begins with the rendered prompt of the last answer, whose span follows it immediately. If the template
    writes no end token after the last answer (as LLaVA 1.5's), the tokenizer's is appended, or the model would never
    learn to stop.
    """
    check_template(processor)
    if processor.tokenizer.eos_token is None:
        raise UserError(
            "the model's tokenizer has no end token; set tokenizer.eos_token and save it", see="chat-template"
        )
    messages = _with_reasoning(processor, messages)
    reasoning = messages[-1].get(REASONING_KEYS[0]) or ""
    text = render(processor, messages, source)
    bare = _bare_answers(processor, messages, text, source)
    spans = [(start, end + len(end_token(text[end:], processor))) for start, end in bare]
    text, spans[-1] = _append_end_token(processor, text, *spans[-1], bare[-1][1])
    if len(messages) == 1:
        return text, spans
    prompt, (start, end) = render(processor, messages[:-1], source, prompt=True), spans[-1]
    lead = lead_of(prompt, text[:start], reasoning)
    header = _after_common_prefix(prompt, render(processor, messages[:-1], source)) if len(spans) > 1 else ""
    behind = [0, *(end for _, end in spans)]
    own = [
        (start - _lead_length(text[at:start], header, lead), end)
        for at, (start, end) in zip(behind, spans[:-1], strict=False)
    ]
    before = prompt + lead
    return before + text[start:], [*own, (len(prompt), end + len(before) - start)]


def _after_common_prefix(text: str, other: str) -> str:
    """The text from the first character that differs from the other text."""
    return text[next((at for at, pair in enumerate(zip(text, other, strict=False)) if len({*pair}) > 1), len(other)) :]


def _lead_length(before: str, header: str, lead: str) -> int:
    """The number of characters before an answer that the model generates: those after the last `header`."""
    if header.strip() and header in before:
        return len(before) - before.rfind(header) - len(header)
    return len(lead) if lead.isspace() and before.endswith(lead) else 0


def _append_end_token(processor: Any, text: str, start: int, end: int, bare: int) -> tuple[str, Span]:
    """The text and its last span, with an end token appended if the template writes none."""
    if end > bare:
        return text, (start, end)
    text = text.rstrip() + processor.tokenizer.eos_token
    return text, (start, len(text))


def _bare_answers(processor: Any, messages: list[Message], text: str, source: str) -> list[Span]:
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    hidden = [
        m | {"content": turn("", ANSWER_PLACEHOLDER)["content"]} if m["role"] == "assistant" else m for m in messages
    ]
    before, *behind = render(processor, hidden, source).split(ANSWER_PLACEHOLDER)
    spans, place = [], len(before)
    for answer, after in zip(answers, behind, strict=False):
        # Some templates trim the answers.
        forms = [form for form in (answer, answer.strip()) if text.startswith(form + after, place)]
        if forms:
            spans.append((place, place + len(forms[0])))
            place += len(forms[0] + after)
    if not text.startswith(before) or len(spans) != len(answers) or place != len(text):
        raise RecordError(source, "the model's chat template changes the answers, so they cannot be located")
    return spans


def _with_reasoning(processor: Any, messages: list[Message]) -> list[Message]:
    """The messages with reasoning where the chat template expects it: under its own key, or inside the answer.

    If a template removes reasoning from an answer, or its generation prompt opens the block, reasoning also gets its
    own key, and that of the last answer is written before it.
    """
    found = [_reasoning(message) for message in messages]
    if not any(found):
        return messages
    own_key = reads_reasoning(processor) or drops_reasoning(processor)
    opening, closing = THINKING[0]

    def place(message: Message, reasoning: str, answer: str) -> Message:
        bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if own_key:
            return bare | {"content": turn("", answer)["content"]} | dict.fromkeys(REASONING_KEYS, reasoning)
        inline = f"{opening}\n{reasoning}\n{closing}\n\n{answer}"
        return bare if len(bare) == len(message) else bare | {"content": turn("", inline)["content"]}

    return [place(message, *split) if split else message for message, split in zip(messages, found, strict=True)]


def _reasoning(message: Message) -> tuple[str, str] | None:
    """The reasoning of an assistant's message, from its own key or its text, and the answer; None without reasoning."""
    if message["role"] != "assistant":
        return None
    text = message["content"][0]["text"]
    apart = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    split = (str(apart).strip(), text) if apart else split_reasoning(text)
    return None if split == ("", text) else split


# Tokens that texts must not contain.


def check_texts(processor: Any, messages: list[Message], source: str) -> None:
    """Check that no text contains a token of the template, which would inject a turn, its end or an image.

    Raises:
        RecordError: a text contains such a token.
    """
    pattern = _template_tokens(processor, str(template_of(processor)))
    for message in messages:
        texts = [part.get("text", "") for part in message["content"]] + [str(message.get(REASONING_KEYS[0], ""))]
        if found := next(filter(None, map(pattern.search, texts)), None):
            reason = f"its text contains {found.group()}, a token of the model's chat template"
            raise RecordError(source, f"{reason}: remove or rewrite it")


@lru_cache(maxsize=8)
def _template_tokens(processor: Any, _: str) -> re.Pattern[str]:
    tokenizer = processor.tokenizer
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    features = tokenizer.convert_ids_to_tokens([*end_tokens(processor), image_token_id(processor)])
    others = [getattr(processor, name, None) for name in ("video_token", "audio_token")]
    own = {image_mark(processor), tokenizer.bos_token, *features, *others}
    own |= {token for token in known if token in _render_all_roles(processor)}
    own -= {None, *(mark for marks in THINKING for mark in marks)}
    longest_first = sorted((re.escape(token) for token in own if token.strip()), key=len, reverse=True)
    return re.compile("|".join(longest_first))


def _render_all_roles(processor: Any) -> str:
    """The text of a chat template for turns of all roles that it accepts."""
    turns = [turn("system", "yes"), turn("user", "yes"), turn("assistant", "yes"), turn("user", "yes")]
    for messages in (turns, turns[1:]):
        try:
            return apply_template(processor, messages, prompt=True)
        except (TemplateError, TypeError, ValueError):  # no system prompt; or PaliGemma, which has no template
            continue
    return ""
