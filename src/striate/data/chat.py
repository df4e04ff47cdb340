"""A conversation as the model's chat template writes it, and where the answers are in that text.

Chat templates mostly do not mark what the assistant says. So a conversation is rendered a second time with a
stand-in for every answer: what is around the stand-ins is the template's own text, and the rest the answers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from striate.data.record import RecordError
from striate.errors import UserError

STAND_IN = "\ue000answer\ue001"

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters from the first up to, but not with, the second."""


def image_mark(processor: Any) -> str:
    """What a chat template writes for an image: the token of its features, save in Qianfan-OCR's."""
    return getattr(processor, "image_placeholder_token", processor.image_token)


def render(processor: Any, messages: list[Message], source: str, *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt` it goes on to where the assistant is to speak."""

    def write(messages: list[Message]) -> str:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def flat(message: Message) -> Message:
        return message | {"content": "".join(p.get("text", image_mark(processor)) for p in message["content"])}

    if processor.chat_template is None:
        raise UserError("the model's processor has no chat template; set processor.chat_template and save it")
    try:
        # A template made for a language model takes contents as text: it fails on a list, or prints it.
        try:
            text = write(messages)
        except TypeError:
            return write([flat(message) for message in messages])
        printed = [str(message["content"]) in text for message in messages]
        if any(printed):
            text = write([flat(m) if p else m for m, p in zip(messages, printed, strict=True)])
        return text
    except (TemplateError, TypeError) as error:
        raise RecordError(source, f"the model's chat template refuses the conversation ({error})") from error


def render_answers(processor: Any, messages: list[Message], source: str) -> tuple[str, list[Span]]:
    """The text of a conversation that ends with an answer, and each answer in it with its end token.

    Where the template writes no end token behind the last answer (LLaVA 1.5's does not), the tokenizer's is
    put there, or the model would never learn to stop.
    """
    text = render(processor, messages, source)
    bare = _bare_answers(processor, messages, text, source)
    spans = [(start, end + _end_token(text[end:], processor)) for start, end in bare]
    start, end = spans[-1]
    if end == bare[-1][1]:
        text = text.rstrip() + processor.tokenizer.eos_token
        spans[-1] = (start, len(text))
    lead = _lead(processor, messages, text[:start], source)
    return text, [(start - len(lead) if text[:start].endswith(lead) else start, end) for start, end in spans]


def _bare_answers(processor: Any, messages: list[Message], text: str, source: str) -> list[Span]:
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    stand_in = {"role": "assistant", "content": [{"type": "text", "text": STAND_IN}]}
    hidden = [stand_in if message["role"] == "assistant" else message for message in messages]
    before, *behind = render(processor, hidden, source).split(STAND_IN)
    spans, place = [], len(before)
    for answer, after in zip(answers, behind, strict=False):
        # Some templates trim what they are given.
        written = [form for form in (answer, answer.strip()) if text.startswith(form + after, place)]
        if written:
            spans.append((place, place + len(written[0])))
            place += len(written[0] + after)
    if not text.startswith(before) or len(spans) != len(answers) or place != len(text):
        raise RecordError(source, "the model's chat template changes the answers; they cannot be told apart")
    return spans


def _end_token(text: str, processor: Any) -> int:
    """Length of the end token that `text`, what follows an answer, begins with; 0 where there is none."""
    found = _end_tokens(processor.tokenizer, image_mark(processor)).match(text)
    return found.end() if found else 0


@lru_cache(maxsize=8)
def _end_tokens(tokenizer: Any, mark: str) -> re.Pattern[str]:
    """A special token right behind the answer (`<|im_end|>`), or the tokenizer's own, also after a space."""
    if tokenizer.eos_token is None:
        raise UserError("the model's tokenizer has no end token; set tokenizer.eos_token and save it")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = special - {tokenizer.bos_token, tokenizer.eos_token, mark}
    longest_first = sorted(map(re.escape, others), key=len, reverse=True)
    return re.compile("|".join([rf"\s*{re.escape(tokenizer.eos_token)}", *longest_first]))


def _lead(processor: Any, messages: list[Message], before: str, source: str) -> str:
    """White space that the model itself has to write before an answer: the prompt stops short of it."""
    if len(messages) == 1:
        return ""
    prompt = render(processor, messages[:-1], source, prompt=True)
    rest = before[len(prompt) :]
    return rest if before.startswith(prompt) and rest.isspace() else ""
