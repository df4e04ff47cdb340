"""A model's answers by greedy generation, choices by likelihood, likelihoods for perplexity; `ask` streams one answer.

Records are processed longest first, so that batches need little padding and a lack of memory shows at once. The result
for a record does not depend on the batch size or on the other records of its batch, up to floating-point rounding.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TextStreamer

from striate.data import IGNORED, Batch, Example, Examples, ImageSource, Record, RecordError, Skipped, collate, encode
from striate.errors import UserError, at_least
from striate.evaluation import prefix
from striate.scores.likelihood import AnswerTokens
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode
from striate.vlm.processors import image_token_id
from striate.vlm.template import THINKING, check_template, end_tokens, final_answer, opens_thinking, turn

Result = TypeVar("Result")
BatchFn = Callable[[Sequence[Record]], list[Result | Skipped]]
"""Maps a batch of records to one result per record; `Skipped` for a record that cannot be used."""

MAX_ROWS = 4096
"""Maximum number of tokens to predict in one forward pass: 2.5 GB of logits with a vocabulary of 150,000."""

# The most likely token at every step; overrides the sampling and penalties of the checkpoint's generation config.
GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "disable_compile": True,  # on a GPU, a static cache in generation_config.json would compile the model
}  # fmt: skip


@dataclass(frozen=True)
class Likelihood:
    """Summed log-probability of the predicted tokens, in nats, <= 0, and their number."""

    log_prob: float
    num_tokens: int

    @classmethod
    def of(cls, name: str, log_prob: float, num_tokens: int) -> Likelihood:
        """Of the record of that name. Raises `UserError` for NaN, which ranks no choice."""
        if math.isnan(log_prob):
            raise UserError(
                f"the likelihood of record {name!r} is NaN: check the checkpoint for NaN, or try --dtype float32"
            )
        return cls(log_prob, num_tokens)


def answer(
    vlm: Vlm, records: Sequence[Record], *, batch: int = 16, max_new_tokens: int = 32, max_length: int = 2048
) -> Iterator[tuple[int, str | Skipped]]:
    """The model's answer to the last question of each record: (index of the record, answer), longest first.

    Greedy, at most `max_new_tokens` tokens, ending before any of `stops`; special tokens, outer white space and
    reasoning before the answer are removed: if the reasoning does not end, the answer is empty. A record that cannot
    be read, or whose prompt has more than `max_length` tokens, is a `Skipped`.
    """
    return _each(vlm, records, answer_fn(vlm, max_new_tokens=max_new_tokens, max_length=max_length), batch)


def answer_fn(vlm: Vlm, *, max_new_tokens: int, max_length: int) -> BatchFn[str]:
    """`answer` for one batch."""
    check_template(vlm.processor)

    def prompts(record: Record) -> list[Example]:
        return [encode(record, vlm.processor, max_length=max_length, generation=True)]

    def answer_batch(records: Sequence[Record]) -> list[str | Skipped]:
        answers = _expand(records, prompts, partial(_generate, vlm, max_new_tokens))
        return [one if isinstance(one, Skipped) else one[0] for one in answers]

    return answer_batch


def choice_fn(vlm: Vlm, *, batch: int, max_length: int) -> BatchFn[str]:
    """The most likely choice of each record of a batch; `batch` is the maximum number of examples per forward pass.

    A choice is scored as the whole answer: the log-probabilities of its tokens and of the end of the turn are summed,
    not divided by length. Of equal ones the first wins. A record that cannot be used is a `Skipped`, as in `answer`.
    """

    def answers(record: Record) -> list[Example]:
        end = max(turn for turn, message in enumerate(record.messages, 1) if message["role"] == "user")
        question = record.messages[:end]
        answered = [replace(record, messages=(*question, turn("assistant", one))) for one in record.choices]
        return [encode(one, vlm.processor, max_length=max_length) for one in answered]

    def best(record: Record, likelihoods: Sequence[Likelihood]) -> str:
        return record.choices[max(range(len(likelihoods)), key=lambda n: likelihoods[n].log_prob)]

    def choose_batch(records: Sequence[Record]) -> list[str | Skipped]:
        likelihoods = _expand(records, answers, partial(_choices, vlm, batch))
        pairs = zip(records, likelihoods, strict=True)
        return [one if isinstance(one, Skipped) else best(record, one) for record, one in pairs]

    return choose_batch


def likelihood_fn(vlm: Vlm, *, batch: int, max_length: int) -> BatchFn[Likelihood]:
    """The likelihood of each record of a batch; `batch` is the maximum number of examples per forward pass.

    In a conversation, the answers are predicted, with their end tokens. In plain text, every token is predicted once:
    longer text is split into windows of at most `max_length` tokens (or the model's maximum), each starting with the
    BOS token if the tokenizer has one, else with the last token of the window before, so that only the very first token
    is not predicted. A record that cannot be used is a `Skipped`, as in `answer`.
    """

    def examples(record: Record) -> list[Example]:
        if record.messages:
            return [encode(record, vlm.processor, max_length=max_length)]
        return _windows(vlm, record, max_length)

    def total(parts: Sequence[Likelihood]) -> Likelihood:
        return Likelihood(sum(one.log_prob for one in parts), sum(one.num_tokens for one in parts))

    def likelihood_batch(records: Sequence[Record]) -> list[Likelihood | Skipped]:
        likelihoods = _expand(records, examples, partial(_likelihoods, vlm, batch))
        return [one if isinstance(one, Skipped) else total(one) for one in likelihoods]

    return likelihood_batch


def batches(vlm: Vlm, records: Sequence[Record], batch: int) -> list[list[int]]:
    """The indices of the records, `batch` at a time, longest first."""
    lengths = Examples(records, vlm.processor, max_length=sys.maxsize, generation=True).lengths
    order = sorted(range(len(records)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def stops(vlm: Vlm) -> list[int]:
    """Tokens that end an answer: those of the generation config, the tokenizer and the chat template."""
    eos = vlm.model.generation_config.eos_token_id
    return sorted({*(eos if isinstance(eos, list) else [eos]), *end_tokens(vlm.processor)} - {None})


def _each(
    vlm: Vlm, records: Sequence[Record], function: BatchFn[Result], batch: int
) -> Iterator[tuple[int, Result | Skipped]]:
    """Apply a function batch by batch, and yield one result per record with the record's index."""
    for indices in batches(vlm, records, batch):
        yield from zip(indices, function([records[index] for index in indices]), strict=True)


def _expand(
    records: Sequence[Record],
    expand: Callable[[Record], list[Example]],
    respond: Callable[[list[list[Example]]], list[list[Result]]],
) -> list[list[Result] | Skipped]:
    """Expand records into examples and respond to all examples at once."""
    expanded: list[list[Example] | Skipped] = []
    for record in records:
        try:
            expanded.append(expand(record))
        except RecordError as error:
            expanded.append(error.skipped)
    examples = [one for one in expanded if not isinstance(one, Skipped)]
    results = iter(respond(examples) if examples else [])
    return [one if isinstance(one, Skipped) else next(results) for one in expanded]


def _collate(vlm: Vlm, examples: Sequence[Example], side: str) -> Batch:
    return collate(examples, pad_id=vlm.pad_token_id, side=side).to(vlm.device, vlm.model.dtype)


@torch.inference_mode()
def generate(
    vlm: Vlm, batch: Batch, *, max_new_tokens: int, without: int | None = None, streamer: Any = None
) -> list[list[int]]:
    """The greedy tokens after each prompt of a batch padded on the left, up to and including the first of `stops`.

    The token `without` is never generated. `streamer` of `transformers` sees each token of a single prompt.
    """
    ends = stops(vlm)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": vlm.pad_token_id}
    if without is not None:
        options["suppress_tokens"] = [without]
    with eval_mode(vlm.model):
        tokens = vlm.model.generate(**batch.inputs, **GREEDY, **options, streamer=streamer)  # type: ignore[operator]
    new = tokens[:, batch.labels.shape[1] :].tolist()
    # A row that ends early is padded, and the padding token may be an ordinary token.
    return [row[: next((at for at, token in enumerate(row, 1) if token in ends), len(row))] for row in new]


def answer_texts(vlm: Vlm, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of generated tokens: without the end token, reasoning and other special tokens."""
    ends, thinking = stops(vlm), opens_thinking(vlm.processor)
    return [_final(vlm.tokenizer, [token for token in row if token not in ends], thinking) for row in rows]


def _generate(vlm: Vlm, max_new_tokens: int, prompts: list[list[Example]]) -> list[list[str]]:
    batch = _collate(vlm, [prompt for (prompt,) in prompts], "left")
    return [[text] for text in answer_texts(vlm, generate(vlm, batch, max_new_tokens=max_new_tokens))]


def _final(tokenizer: Any, row: list[int], thinking: bool) -> str:
    """The text after the reasoning, whose marks are special tokens or text."""
    vocabulary = tokenizer.get_vocab()
    opens, closes = ({vocabulary.get(marks[end]) for marks in THINKING} - {None} for end in (0, 1))
    if ends := [at for at, token in enumerate(row, 1) if token in closes]:
        row, thinking = row[ends[-1] :], False
    thinking |= any(token in opens for token in row)
    return final_answer(tokenizer.decode(row, skip_special_tokens=True), thinking=thinking)


def _likelihoods(vlm: Vlm, batch: int, records: list[list[Example]]) -> list[list[Likelihood]]:
    """Likelihood of the labels of each record's examples."""
    examples = [example for record in records for example in record]
    results = iter([one for part in _split(examples, batch) for one in _forward(vlm, _collate(vlm, part, "right"))])
    return [[next(results) for _ in record] for record in records]


def _split(examples: Sequence[Example], batch: int) -> Iterator[Sequence[Example]]:
    """At most `batch` examples and `MAX_ROWS` labels at a time."""
    while examples:
        rows = accumulate(int((example.labels != IGNORED).sum()) for example in examples[:batch])
        fitting = max(sum(total <= MAX_ROWS for total in rows), 1)
        yield examples[:fitting]
        examples = examples[fitting:]


@torch.inference_mode()
def _forward(vlm: Vlm, batch: Batch) -> list[Likelihood]:
    tokens = AnswerTokens.of(batch)
    losses = tokens.sums(tokens.nll(tokens.logits(vlm, batch))).tolist()
    measured = zip(batch.ids, losses, tokens.counts, strict=True)
    return [Likelihood.of(name, -loss, count) for name, loss, count in measured]


def _choices(vlm: Vlm, batch: int, records: list[list[Example]]) -> list[list[Likelihood]]:
    """Likelihood of each record's choices; their common prompt is prefilled once where model and records allow it."""
    starts = [prefix.shared_length(choices) for choices in records]
    parts = [[prefix.split(one, start) for one in choices] for choices, start in zip(records, starts, strict=True)]
    prompts = prefix.prefill(vlm, [choices[0][0] for choices in parts]) if all(starts) else None
    if prompts is None:
        return _likelihoods(vlm, batch, records)
    rows = [(row, answer) for row, choices in enumerate(parts) for _, answer in choices]
    log_probs: list[torch.Tensor] = []
    for part in _split([answer for _, answer in rows], batch):
        own = [row for row, _ in rows[len(log_probs) : len(log_probs) + len(part)]]
        log_probs += prefix.log_probs(vlm, prompts, own, part)
    pairs = zip(rows, log_probs, strict=True)
    likelihoods = (Likelihood.of(example.id, float(one.sum()), len(one)) for (_, example), one in pairs)
    return [[next(likelihoods) for _ in choices] for choices in records]


def _windows(vlm: Vlm, record: Record, max_length: int) -> list[Example]:
    whole = encode(record, vlm.processor, max_length=sys.maxsize)
    # Without the tokens that the tokenizer adds: each window has its own first token.
    tokens = {key: values[whole.labels != IGNORED] for key, values in whole.inputs.items()}
    num_tokens, bos = len(tokens["input_ids"]), vlm.tokenizer.bos_token_id
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", max_length)
    size, windows = min(max_length, limit) - 1, []
    for start in range(0 if bos is not None else 1, num_tokens, size):
        indices = [max(start - 1, 0), *range(start, min(start + size, num_tokens))]
        inputs = {key: values[indices] for key, values in tokens.items()}
        if bos is not None:
            inputs["input_ids"][0] = bos
        labels = inputs["input_ids"].clone()
        labels[0] = IGNORED
        no_image = torch.zeros_like(labels, dtype=torch.bool)
        windows.append(Example(inputs, labels, no_image, record.id, record.source))
    if not windows:
        raise RecordError(record.source, "the text is too short: it has no token to predict")
    return windows


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


def question_record(question: str, images: ImageSource | str | Iterable[ImageSource | str] = ()) -> Record:
    """A question as a record, with its images, one or several, before it.

    Raises:
        UserError: the question is empty.
    """
    if not question.strip():
        raise UserError("the question is empty: give a text")
    listed = [images] if isinstance(images, str | ImageSource) else images
    sources = tuple(Path(one) if isinstance(one, str) else one for one in listed)
    message = turn("user", question)
    message["content"] = [{"type": "image"} for _ in sources] + message["content"]
    return Record("question", (message,), sources)


def ask(
    vlm: Vlm,
    question: str,
    *,
    images: ImageSource | str | Iterable[ImageSource | str] = (),
    max_new_tokens: int = 256,
    max_length: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> Reply:
    """The model's answer to a question about images, by its chat template, greedy; with its reasoning, if any.

    As in `evaluate`, but without image tokens, which no image would fill. The images, one or several, come before the
    question.
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
