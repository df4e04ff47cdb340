"""Encode a record for a model: tokens, labels of the answers, and the positions of image tokens."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, GotOcr2Processor, PaliGemmaProcessor

from striate.data.chat import Span, check_texts, render_answers, render_prompt
from striate.data.images import open_image
from striate.data.record import ImageSource, Record, RecordError
from striate.errors import UserError
from striate.vlm.processors import TOKEN_KEYS, image_token_id
from striate.vlm.template import Message, image_mark

IGNORED = -100
"""The label of tokens that the loss ignores."""


@dataclass(frozen=True)
class Example:
    """One encoded record of T tokens.

    `inputs`: `input_ids` [T] and other per-token tensors [T, ...], image tensors as the processor gives them.
    `labels` [T]: the token id where the loss counts it, -100 elsewhere. `image_mask` [T]: true at image tokens, one per
    feature of the projector; one per image for models with cross-attention.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    image_mask: Tensor
    id: str
    source: str
    task: str = ""

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
    """Encode one record as tokens and image tensors.

    The labels are the answers, each with the end token that the chat template writes after it; for plain text, the
    whole text. With `generation` the text ends with the generation prompt after the last question. More than
    `max_length` tokens are an error; with `truncate_text` they are cut at the end, but never inside the images and
    never so that no label is left.

    Raises:
        RecordError: the record or one of its images is invalid.
        UserError: the processor does not work for encoding.
    """
    image_token = image_token_id(processor)
    if not record.messages:
        encoded = _encode_text(record, processor)
    elif isinstance(processor, PaliGemmaProcessor):
        encoded = _encode_prefix(record, processor, generation)
    else:
        encoded = _encode_chat(record, processor, generation)
    length, labeled = len(encoded.labeled), encoded.labeled
    if not generation and not labeled.any():
        raise RecordError(record.source, "there is no token to learn from")
    if length > max_length:
        remaining = labeled[:max_length]
        if not truncate_text or generation or not remaining.any() or encoded.images_end > max_length:
            reason = f"{length:,} tokens, more than --max-length {max_length:,}"
            raise RecordError(record.source, reason, too_long=True)
        length, labeled = max_length, remaining
    tokens = {key: value[:length] for key, value in encoded.tokens.items()}
    labels = tokens["input_ids"].masked_fill(~labeled, IGNORED)
    image_mask = tokens["input_ids"] == image_token
    if image_mask.any() and not record.images:
        mark = processor.tokenizer.convert_ids_to_tokens(image_token)
        raise RecordError(record.source, f"its text contains {mark}, but it has no image")
    return Example(tokens | encoded.vision, labels, image_mask, record.id, record.source, record.task)


@dataclass(frozen=True)
class _Encoded:
    tokens: dict[str, Tensor]  # [T, ...] each
    vision: dict[str, Tensor]
    labeled: Tensor  # [T] bool
    images_end: int = 0  # number of tokens to the end of the last image


def _encode_text(record: Record, processor: Any) -> _Encoded:
    if not record.text.strip():
        raise RecordError(record.source, "there is neither a conversation nor text")
    if isinstance(processor, PaliGemmaProcessor):  # its processor requires an image
        output = _process(processor.tokenizer, record.source, text=[record.text], return_offsets_mapping=True)
        starts, ends = output.pop("offset_mapping")[0].unbind(-1)
        tokens, vision = _split(output)
        # Type 0 is the prefix, whose tokens attend to later ones.
        return _Encoded(tokens | {"token_type_ids": torch.ones_like(starts)}, vision, labeled=ends > starts)
    _check_marks(record.text, image_mark(processor), 0, record.source)
    written = _write(processor, record.text, (), record.source)
    return _Encoded(written.tokens, written.vision, written.covered([(0, len(record.text))]))


def _encode_chat(record: Record, processor: Any, generation: bool) -> _Encoded:
    messages, images = _relevant(record, generation)
    check_texts(processor, messages, record.source)
    answers: list[Span] = []
    if generation:
        text = render_prompt(processor, messages, record.source)
    else:
        text, answers = render_answers(processor, messages, record.source)
    learn = [message.get("learn", True) for message in messages if message["role"] == "assistant"]
    learned = [span for span, learns in zip(answers, learn, strict=False) if learns]
    _check_marks(text, image_mark(processor), len(images), record.source)
    written = _write(processor, text, images, record.source, tail=len(text) - answers[-1][0] if answers else 0)
    # Drop an end token that the tokenizer adds (it has no characters): only the template ends the text.
    starts, ends = written.offsets.unbind(-1)
    length = int((ends > starts).nonzero().max()) + 1
    tokens = {key: value[:length] for key, value in written.tokens.items()}
    images_end = int((starts < written.pieces[-1][1]).sum()) if images else 0
    return _Encoded(tokens, written.vision, written.covered(learned)[:length], images_end)


def _encode_prefix(record: Record, processor: Any, generation: bool) -> _Encoded:
    """Encode for PaliGemma: no chat template, and full attention within the question."""
    messages, images = _relevant(record, generation)
    check_texts(processor, messages, record.source)
    answer = "" if generation else messages.pop()["content"][0]["text"].strip()
    if any(message["role"] == "assistant" for message in messages):
        raise RecordError(record.source, "PaliGemma takes one question and one answer, not a conversation")
    texts = [part["text"].strip("\n") for message in messages for part in message["content"] if "text" in part]
    output = _process(
        processor,
        record.source,
        text=[processor.image_token * len(images) + "\n".join(filter(None, texts))],
        images=_open(images, record.source),
        **({} if generation else {"suffix": [answer]}),
    )
    output.pop("labels", None)
    tokens, vision = _split(output)
    images_end = int((tokens["input_ids"] == image_token_id(processor)).sum())  # image tokens come first
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
    """The output of a processor for a text with images.

    `offsets` [T, 2] are the character spans of the tokens in the tokenized text. `pieces` are the starts of each piece
    of text between two images, in the input text and in the tokenized text.
    """

    tokens: dict[str, Tensor]  # [T, ...] each
    vision: dict[str, Tensor]
    offsets: Tensor
    pieces: list[tuple[int, int]]

    def covered(self, spans: list[Span]) -> Tensor:
        """Mask [T] of the tokens in these character spans of the input text; no span contains an image."""
        starts, ends = self.offsets.unbind(-1)
        found = torch.zeros(len(starts), dtype=torch.bool)
        for start, end in spans:
            given, written = self.pieces[bisect_right(self.pieces, start, key=lambda piece: piece[0]) - 1]
            found |= (starts < end - given + written) & (ends > start - given + written)
        return found


class _Listener:
    """A tokenizer that records its input texts, into which the processor has written image tokens or its own prompt.

    No token crosses the position `tail` characters from the end, where the generation prompt ends: training must use
    the same tokens as generation.
    """

    def __init__(self, tokenizer: Any, tail: int):
        self.tokenizer, self.tail = tokenizer, tail
        self.texts: list[str] = []

    def __call__(self, text: str | list[str], **settings: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else text
        # The chat template, the processor and the tokenizer may each write the first token; keep only one.
        bos = self.tokenizer.bos_token
        settings["add_special_tokens"] = not (bos and self.texts[-1].startswith(bos))
        output, cut = self.tokenizer(text, **settings), len(self.texts[-1]) - self.tail
        starts, ends = torch.as_tensor(output["offset_mapping"]).reshape(-1, 2).unbind(-1)
        return self._tokenize_parts(text, cut, settings) if ((starts < cut) & (ends > cut)).any() else output

    def _tokenize_parts(self, text: str | list[str], cut: int, settings: dict[str, Any]) -> Any:
        """Tokenize the two parts of the text separately."""
        plain = settings | {"return_tensors": None}
        head = self.tokenizer(self.texts[-1][:cut], **plain)
        tail = self.tokenizer(self.texts[-1][cut:], **plain | {"add_special_tokens": False})
        length = max(at for at, (start, end) in enumerate(head["offset_mapping"], 1) if end > start)
        tail["offset_mapping"] = [(start + cut, end + cut) for start, end in tail["offset_mapping"]]
        joined = {key: values[:length] + tail[key] for key, values in head.items()}
        batch = joined if isinstance(text, str) else {key: [values] for key, values in joined.items()}
        return BatchEncoding(batch, tensor_type=settings.get("return_tensors"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _write(processor: Any, text: str, images: tuple[ImageSource, ...], source: str, *, tail: int = 0) -> _Written:
    """Process a text to tokens (`tail`: see `_Listener`) and images to tensors."""
    listening = copy(processor)
    listening.tokenizer = listener = _Listener(processor.tokenizer, tail)
    opened = _open(images, source)
    if opened and isinstance(processor, GotOcr2Processor):  # it takes a nested list as the pages of one document
        (opened,) = opened
    settings = {"return_offsets_mapping": True}
    if "mm_token_type_ids" in processor.model_input_names:  # some return them only on request
        settings["return_mm_token_type_ids"] = True
    output = _process(listening, source, text=[text], images=opened, **settings)
    mark = image_mark(processor)
    pieces = _pieces(text.split(mark), len(mark), listener.texts)
    if pieces is None:
        name = type(processor).__name__
        raise UserError(
            f"{name} changes the text of a conversation: striate cannot locate the answers", see="chat-template"
        )
    offsets = output.pop("offset_mapping")[0]
    return _Written(*_split(output), offsets, pieces)


def _pieces(parts: list[str], mark: int, written: list[str]) -> list[tuple[int, int]] | None:
    """The starts of the parts of a text, in it (`mark` characters apart) and in the tokenized text; None if not found.

    The last part is the end of the tokenized text. Each other part is at its first occurrence after the previous one:
    if there is any way to place them all, this is one.
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
    """The images of a batch with one example, as processors expect them."""
    return [[open_image(image, source) for image in images]] if images else None


def _process(processor: Any, source: str, **inputs: Any) -> dict[str, Any]:
    for text in (*inputs["text"], *inputs.get("suffix", ())):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError(source, "its text has a lone surrogate (invalid Unicode); remove it") from None
    try:
        return dict(processor(**inputs, return_tensors="pt"))
    except NotImplementedError:
        raise UserError(
            "the model's tokenizer has no offsets; a fast tokenizer (tokenizer.json) is required", see="chat-template"
        ) from None
    except (ValueError, ArithmeticError, RuntimeError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise RecordError(source, f"the model's processor rejects the record ({reason})") from error


def _split(output: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split an output into per-token tensors [T] and image tensors."""
    tokens = {key: output.pop(key)[0] for key in TOKEN_KEYS if key in output}
    return tokens, output
