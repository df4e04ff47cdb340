"""One question about images, answered as it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from striate.data import ImageSource, Record, collate, encode
from striate.errors import UserError, at_least
from striate.evaluation.answers import generate
from striate.vlm import Vlm
from striate.vlm.processors import image_token_id
from striate.vlm.template import turn


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took.

    `tokens` are those of the answer, with the end token if it ends. `prompt_tokens` includes the `image_tokens`;
    `first_seconds` pass until the first token of the answer is there (tower and prompt), `seconds` until the last.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    first_seconds: float
    seconds: float

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, after the first token; None where there is only one."""
        return (self.new_tokens - 1) / (self.seconds - self.first_seconds) if self.new_tokens > 1 else None


def question_record(question: str, images: Sequence[ImageSource] = ()) -> Record:
    """A question as a record, with its images before it.

    Raises:
        UserError: the question is empty.
    """
    if not question.strip():
        raise UserError("the question is empty: give a text")
    message = turn("user", question)
    message["content"] = [{"type": "image"} for _ in images] + message["content"]
    return Record("question", (message,), tuple(images))


def ask(
    vlm: Vlm,
    question: str,
    *,
    images: Sequence[ImageSource] = (),
    max_new_tokens: int = 256,
    max_length: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> Reply:
    """The model's answer to a question about images, by its chat template, greedy; with its reasoning, if any.

    As in `evaluate`, but without image tokens, which no image would fill. The images come before the question.
    `stream` is called with each piece of the answer as soon as it is generated; the pieces together are the answer.
    `max_length` is the maximum number of tokens of the prompt, by default the model's.

    Raises:
        UserError: the question is empty, an image cannot be read, or the prompt is too long.
    """
    at_least(1, max_new_tokens=max_new_tokens)
    record = question_record(question, images)
    longest = getattr(vlm.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
    example = encode(record, vlm.processor, max_length=max_length or longest, generation=True)
    batch = collate([example], pad_id=vlm.pad_token_id, side="left").to(vlm.device, vlm.model.dtype)
    pieces = _Pieces(vlm.tokenizer, stream or (lambda piece: None))
    began = time.perf_counter()
    with torch.inference_mode():
        (tokens,) = generate(
            vlm, batch, max_new_tokens=max_new_tokens, without=image_token_id(vlm.processor), streamer=pieces
        )
    ended = time.perf_counter()
    return Reply(
        text="".join(pieces.texts),
        tokens=tuple(tokens),
        prompt_tokens=len(example),
        image_tokens=int(example.image_mask.sum()),
        first_seconds=pieces.first - began,
        seconds=ended - began,
    )


class _Pieces(TextStreamer):
    """Passes the answer on word by word, and keeps the time of its first token."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.first = show, 0.0
        self.texts: list[str] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and not self.first:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.texts.append(text)
            self.show(text)
