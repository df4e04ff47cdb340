"""A record as a model reads it: tokens, labels on the answers only, and where the image tokens are."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaProcessor

from striate.data.chat import Message, Span, render, render_answers
from striate.data.images import open_image
from striate.data.record import ImageSource, Record, RecordError
from striate.errors import UserError
from striate.vlm import image_token_id

IGNORED = -100
"""The label of a token that no loss is taken of."""

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Inputs with one value a token; all else that a processor gives describes images."""

ACROSS = "cross_attention_mask"
"""What each token sees of the images [1, T, images, tiles], where layers look across to them instead of having them
among the tokens. Then image tensors have a row a record."""


@dataclass(frozen=True)
class Example:
    """One encoded record of T tokens.

    `inputs`: `input_ids` [T] and other per-token tensors [T], image tensors as the processor gives them.
    `labels` [T]: the token id where it is to be learnt, -100 elsewhere. `image_mask` [T]: true at image
    tokens, one for each feature that the projector puts there.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    image_mask: Tensor
    id: str
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def encode(
    record: Record,
    processor: Any,
    *,
    max_length: int = 2048,
    truncate_text: bool = False,
    generation: bool = False,
) -> Example:
    """One record as tokens and image tensors.

    The labels are the answers, each with the end token that the chat template puts behind it; of plain text,
    all of it. With `generation` the text ends where the model is to answer the last question. More than
    `max_length` tokens raise, or with `truncate_text` are cut at the end, but never in an image and never
    down to no label. Raises `RecordError` for what is wrong with the record or its images, `UserError` with
    the processor.
    """
    if not record.messages:
        encoded = _encode_text(record, processor)
    elif isinstance(processor, PaliGemmaProcessor):
        encoded = _encode_prefix(record, processor, generation)
    else:
        encoded = _encode_chat(record, processor, generation)
    length, labelled = len(encoded.labelled), encoded.labelled
    if not generation and not labelled.any():
        raise RecordError(record.source, "there is no token to learn from")
    if length > max_length:
        kept = labelled[:max_length]
        if not truncate_text or generation or not kept.any() or encoded.images_end > max_length:
            reason = f"{length:,} tokens, more than --max-length {max_length:,}"
            raise RecordError(record.source, reason, too_long=True)
        length, labelled = max_length, kept
    tokens = {key: value[:length] for key, value in encoded.tokens.items()}
    labels = tokens["input_ids"].masked_fill(~labelled, IGNORED)
    image_mask = tokens["input_ids"] == image_token_id(processor)
    return Example(tokens | encoded.vision, labels, image_mask, record.id, record.source)


@dataclass(frozen=True)
class _Encoded:
    tokens: dict[str, Tensor]  # [T] each
    vision: dict[str, Tensor]
    labelled: Tensor  # [T] bool
    images_end: int = 0  # number of tokens up to the end of the last image


def _encode_text(record: Record, processor: Any) -> _Encoded:
    if not record.text.strip():
        raise RecordError(record.source, "there is neither a conversation nor text")
    # PaliGemma's processor insists on an image.
    reader = processor.tokenizer if isinstance(processor, PaliGemmaProcessor) else processor
    output = _process(reader, record.source, text=[record.text], return_offsets_mapping=True)
    starts, ends = output.pop("offset_mapping")[0].unbind(-1)
    tokens, vision = _split(output)
    if reader is not processor:  # type 0 is PaliGemma's prefix, whose tokens see those behind them
        tokens["token_type_ids"] = torch.ones_like(tokens["input_ids"])
    return _Encoded(tokens, vision, labelled=ends > starts)


def _encode_chat(record: Record, processor: Any, generation: bool) -> _Encoded:
    messages, images = _relevant(record, generation)
    answers: list[Span] = []
    if generation:
        text = render(processor, messages, record.source, prompt=True)
    else:
        text, answers = render_answers(processor, messages, record.source)
    _check_marks(text, processor.image_token, len(images), record.source)
    bos = processor.tokenizer.bos_token
    output = _process(
        processor,
        record.source,
        text=[text],
        images=_open(images, record.source),
        # The chat template and the tokenizer may both write the first token; it must be there once.
        add_special_tokens=not (bos and text.startswith(bos)),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
    )
    placed = list(output.pop("text_replacement_offsets", [[]])[0])
    if len(placed) != len(images):
        placed = _placed(text, _open(images, record.source), processor)
    if len(placed) != len(images):
        raise UserError(f"{type(processor).__name__} does not tell where it puts images")
    starts, ends = output.pop("offset_mapping")[0].unbind(-1)  # T, in the text with its images
    labelled = torch.zeros(len(starts), dtype=torch.bool)
    for start, end in (_moved(span, placed) for span in answers):
        labelled |= (starts < end) & (ends > start)
    images_end = int((starts < placed[-1]["new_span"][1]).sum()) if placed else 0
    # The template alone ends the text: an end token that the tokenizer adds has no characters, and goes.
    length = int((ends > starts).nonzero().max()) + 1
    tokens, vision = _split(output)
    tokens = {key: value[:length] for key, value in tokens.items()}
    if ACROSS in vision:  # [1, T, images, tiles]
        vision[ACROSS] = vision[ACROSS][:, :length]
    return _Encoded(tokens, vision, labelled[:length], images_end)


def _encode_prefix(record: Record, processor: Any, generation: bool) -> _Encoded:
    """PaliGemma's way: no chat template, and a question that sees all of itself, apart from the answer."""
    messages, images = _relevant(record, generation)
    answer = "" if generation else messages.pop()["content"][0]["text"].strip()
    if any(message["role"] == "assistant" for message in messages):
        raise RecordError(record.source, "PaliGemma takes one question and one answer, not a conversation")
    texts = [part["text"] for message in messages for part in message["content"] if "text" in part]
    output = _process(
        processor,
        record.source,
        text=[processor.image_token * len(images) + "\n".join(texts)],
        images=_open(images, record.source),
        **({} if generation else {"suffix": [answer]}),
    )
    output.pop("labels", None)
    tokens, vision = _split(output)
    images_end = int((tokens["input_ids"] == image_token_id(processor)).sum())  # they come first
    return _Encoded(tokens, vision, tokens["token_type_ids"] == 1, images_end)


def _relevant(record: Record, generation: bool) -> tuple[list[Message], tuple[ImageSource, ...]]:
    """The turns up to the last answer, or to the last question for generation, and the images in them."""
    last = "user" if generation else "assistant"
    turns = [number for number, message in enumerate(record.messages) if message["role"] == last]
    if not turns:
        raise RecordError(record.source, f"there is no {'question' if generation else 'answer to learn from'}")
    messages = list(record.messages[: turns[-1] + 1])
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return messages, record.images[:num_images]


def _check_marks(text: str, mark: str, num_images: int, source: str) -> None:
    if not text.strip():
        raise RecordError(source, "the model's chat template writes nothing for this conversation")
    if (found := text.count(mark)) != num_images:
        reason = f"{found} {mark} in the model's prompt for {num_images} images"
        raise RecordError(source, f"{reason}; the texts must not hold {mark} themselves")


class _Listening:
    """A tokenizer that remembers what it was given last."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.heard = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: list[str], **settings: Any) -> Any:
        self.heard = text[0]
        return self.tokenizer(text, **settings)


def _placed(text: str, images: Any, processor: Any) -> list[dict[str, Any]]:
    """Where the marks of images in a text are, and where what a processor makes of them, if it does not say so itself.

    Each becomes a run of special tokens, with at most a space behind it; none where the text comes out otherwise.
    """
    tokenizer = processor.tokenizer
    processor.tokenizer = listening = _Listening(tokenizer)
    try:
        processor(text=[text], images=images)
    finally:
        processor.tokenizer = tokenizer
    mark = processor.image_token
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = sorted({mark, *added}, key=len, reverse=True)
    run = f"((?:{'|'.join(map(re.escape, special))})+ ?)"
    grown = re.fullmatch(run.join(map(re.escape, text.split(mark))), listening.heard)
    if grown is None:
        return []
    marks = enumerate(re.finditer(re.escape(mark), text), start=1)
    return [{"span": place.span(), "new_span": grown.span(number)} for number, place in marks]


def _moved(span: Span, placed: list[dict[str, Any]]) -> Span:
    """Where characters of the rendered text are once the processor has written image tokens into it."""
    ends = [image["span"][1] for image in placed]
    gains = [0] + [image["new_span"][1] - image["span"][1] for image in placed]
    start, end = (place + gains[bisect_right(ends, place)] for place in span)
    return start, end


def _open(images: tuple[ImageSource, ...], source: str) -> list[list[Any]] | None:
    """The images of a batch of one, as processors take them."""
    return [[open_image(image, source) for image in images]] if images else None


def _process(processor: Any, source: str, **inputs: Any) -> dict[str, Any]:
    for text in (*inputs["text"], *inputs.get("suffix", ())):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError(source, "its text holds half a pair of surrogates, which is no character") from None
    try:
        return dict(processor(**inputs, return_tensors="pt"))
    except NotImplementedError:
        raise UserError("the model's tokenizer gives no offsets; a fast one (tokenizer.json) is needed") from None
    except (ValueError, ArithmeticError, RuntimeError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise RecordError(source, f"the model's processor refuses the record ({reason})") from error


def _split(output: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per-token tensors [T] and image tensors."""
    tokens = {key: output.pop(key)[0] for key in TOKEN_KEYS if key in output}
    return tokens, output
