"""A record as a model reads it: tokens, labels on the answers only, and where the image tokens are."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GotOcr2Processor, PaliGemmaProcessor

from striate.data.chat import Message, Span, image_mark, render, render_answers
from striate.data.images import open_image
from striate.data.record import ImageSource, Record, RecordError
from striate.errors import UserError
from striate.vlm import image_token_id

IGNORED = -100
"""The label of a token that no loss is taken of."""

TOKEN_KEYS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
)
"""Inputs with one value a token, the last with one for each image and tile too; all else that a processor gives
describes images."""


@dataclass(frozen=True)
class Example:
    """One encoded record of T tokens.

    `inputs`: `input_ids` [T] and other per-token tensors [T, ...], image tensors as the processor gives them.
    `labels` [T]: the token id where it is to be learnt, -100 elsewhere. `image_mask` [T]: true at image
    tokens, one for each feature that the projector puts there; one for each image where cross-attention brings it in.
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
    image_token = image_token_id(processor)
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
    image_mask = tokens["input_ids"] == image_token
    return Example(tokens | encoded.vision, labels, image_mask, record.id, record.source)


@dataclass(frozen=True)
class _Encoded:
    tokens: dict[str, Tensor]  # [T, ...] each
    vision: dict[str, Tensor]
    labelled: Tensor  # [T] bool
    images_end: int = 0  # number of tokens up to the end of the last image


def _encode_text(record: Record, processor: Any) -> _Encoded:
    if not record.text.strip():
        raise RecordError(record.source, "there is neither a conversation nor text")
    if isinstance(processor, PaliGemmaProcessor):  # which insists on an image
        output = _process(processor.tokenizer, record.source, text=[record.text], return_offsets_mapping=True)
        starts, ends = output.pop("offset_mapping")[0].unbind(-1)
        tokens, vision = _split(output)
        # Type 0 is the prefix, whose tokens see those behind them.
        return _Encoded(tokens | {"token_type_ids": torch.ones_like(starts)}, vision, labelled=ends > starts)
    _check_marks(record.text, image_mark(processor), 0, record.source)
    written = _write(processor, record.text, (), record.source)
    return _Encoded(written.tokens, written.vision, written.covered([(0, len(record.text))]))


def _encode_chat(record: Record, processor: Any, generation: bool) -> _Encoded:
    messages, images = _relevant(record, generation)
    answers: list[Span] = []
    if generation:
        text = render(processor, messages, record.source, prompt=True)
    else:
        text, answers = render_answers(processor, messages, record.source)
    _check_marks(text, image_mark(processor), len(images), record.source)
    written = _write(processor, text, images, record.source)
    # The template alone ends the text: an end token that the tokenizer adds has no characters, and goes.
    starts, ends = written.offsets.unbind(-1)
    length = int((ends > starts).nonzero().max()) + 1
    tokens = {key: value[:length] for key, value in written.tokens.items()}
    images_end = int((starts < written.pieces[-1][1]).sum()) if images else 0
    return _Encoded(tokens, written.vision, written.covered(answers)[:length], images_end)


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


@dataclass(frozen=True)
class _Written:
    """What a processor makes of a text with images.

    `offsets` [T, 2] are the characters of each token in the text that was tokenized. `pieces` tells where each piece of
    text between two images begins: in the text that the processor was given, and in the one that was tokenized.
    """

    tokens: dict[str, Tensor]  # [T, ...] each
    vision: dict[str, Tensor]
    offsets: Tensor
    pieces: list[tuple[int, int]]

    def covered(self, spans: list[Span]) -> Tensor:
        """The tokens [T] of these characters of the given text, none of which runs over an image."""
        starts, ends = self.offsets.unbind(-1)
        found = torch.zeros(len(starts), dtype=torch.bool)
        for start, end in spans:
            given, written = self.pieces[bisect_right(self.pieces, start, key=lambda piece: piece[0]) - 1]
            found |= (starts < end - given + written) & (ends > start - given + written)
        return found


class _Listener:
    """A tokenizer that notes the texts it is given: a processor writes image tokens, or its own prompt, into them."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: str | list[str], **settings: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else text
        # The chat template, the processor and the tokenizer may each write the first token; it must be there once.
        bos = self.tokenizer.bos_token
        settings["add_special_tokens"] = not (bos and self.texts[-1].startswith(bos))
        return self.tokenizer(text, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _write(processor: Any, text: str, images: tuple[ImageSource, ...], source: str) -> _Written:
    """Let the processor turn a text into tokens, and images into tensors."""
    listening = copy(processor)
    listening.tokenizer = listener = _Listener(processor.tokenizer)
    opened = _open(images, source)
    if opened and isinstance(processor, GotOcr2Processor):  # a list in the list is the pages of one document to it
        (opened,) = opened
    settings = {"return_offsets_mapping": True}
    if "mm_token_type_ids" in processor.model_input_names:  # some give them only when they are asked for
        settings["return_mm_token_type_ids"] = True
    output = _process(listening, source, text=[text], images=opened, **settings)
    mark = image_mark(processor)
    pieces = _pieces(text.split(mark), len(mark), listener.texts)
    if pieces is None:
        name = type(processor).__name__
        raise UserError(f"{name} does not keep the text of a conversation: striate cannot tell where its answers are")
    offsets = output.pop("offset_mapping")[0]
    return _Written(*_split(output), offsets, pieces)


def _pieces(parts: list[str], mark: int, written: list[str]) -> list[tuple[int, int]] | None:
    """Where the parts of a text begin, in it (`mark` characters apart) and in what was written of it; None: nowhere.

    The last part ends what was written. Each other one is found at the first place behind the one before it: if there
    is any way to place them all, this is one.
    """
    if len(written) != 1:
        return None
    pieces, given, behind = [], 0, 0
    for part in parts[:-1]:
        place = written[0].find(part, behind)
        if place < 0:
            return None
        pieces.append((given, place))
        given, behind = given + len(part) + mark, place + len(part)
    last = len(written[0]) - len(parts[-1])
    return [*pieces, (given, last)] if last >= behind and written[0].endswith(parts[-1]) else None


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
