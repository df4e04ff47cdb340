"""What a model says: answers by greedy generation, choices and perplexity by likelihood.

Records are taken longest first, so that batches need little padding and memory that will not do fails at
once. What is said about a record does not depend on the batch size or on its neighbours, up to floating-point
rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch

from striate.data import IGNORED, Batch, Example, Examples, Record, RecordError, Skipped, collate, encode
from striate.evaluate import prefix
from striate.train import answer_nll
from striate.vlm import Vlm

Found = TypeVar("Found")
Asking = Callable[[Sequence[Record]], list[Found | Skipped]]
"""Asks a batch of records, and says of each what was found or why it cannot be used."""

MAX_ROWS = 4096
"""Tokens to predict in one forward pass: their logits take 2.5 GB with a vocabulary of 150,000."""

# The likeliest token at every step, whatever sampling and penalties the checkpoint asks for.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Likelihood:
    """Summed log-probability of the predicted tokens, in nats, <= 0, and their number."""

    log_prob: float
    num_tokens: int


def answer(
    vlm: Vlm, records: Sequence[Record], *, batch: int = 16, max_new_tokens: int = 32, max_length: int = 2048
) -> Iterator[tuple[int, str | Skipped]]:
    """The model's answer to the last question of each record: (index of the record, answer), longest first.

    Greedy, at most `max_new_tokens` tokens, ending before any of `end_tokens`; special tokens and outer white
    space are left out. A record that cannot be read, or whose prompt has more than `max_length` tokens, is a
    `Skipped`.
    """
    return _each(vlm, records, answering(vlm, max_new_tokens=max_new_tokens, max_length=max_length), batch)


def choose(
    vlm: Vlm, records: Sequence[Record], *, batch: int = 16, max_length: int = 2048
) -> Iterator[tuple[int, str | Skipped]]:
    """The likeliest of each record's choices: (index of the record, choice), longest first.

    A choice counts as the whole answer: the log-probabilities of its tokens and of the end of the turn are
    summed, not divided by length. The earlier of two equal ones wins. Records that cannot be used are as in
    `answer`.
    """
    return _each(vlm, records, choosing(vlm, batch=batch, max_length=max_length), batch)


def likelihood(
    vlm: Vlm, records: Sequence[Record], *, batch: int = 16, max_length: int = 2048
) -> Iterator[tuple[int, Likelihood | Skipped]]:
    """How likely each record is: (index of the record, likelihood), longest first.

    Of a conversation, the answers count, with their end tokens. Of plain text, every token counts once:
    longer text is read in windows of at most `max_length` tokens (or of what the model was made for), each
    starting with the BOS token when the tokenizer has one, else with the last token of the window before,
    which makes the very first token the only one that is not predicted. Records that cannot be used are as in
    `answer`.
    """
    return _each(vlm, records, reading(vlm, batch=batch, max_length=max_length), batch)


def answering(vlm: Vlm, *, max_new_tokens: int, max_length: int) -> Asking[str]:
    """`answer`, of one batch."""
    ends = end_tokens(vlm)

    def prompts(record: Record) -> list[Example]:
        return [encode(record, vlm.processor, max_length=max_length, generation=True)]

    def ask(records: Sequence[Record]) -> list[str | Skipped]:
        found = _together(records, prompts, partial(_generate, vlm, ends, max_new_tokens))
        return [one if isinstance(one, Skipped) else one[0] for one in found]

    return ask


def choosing(vlm: Vlm, *, batch: int, max_length: int) -> Asking[str]:
    """`choose`, of one batch of records; `batch` bounds the examples of a forward pass."""

    def answers(record: Record) -> list[Example]:
        end = max(turn for turn, message in enumerate(record.messages, 1) if message["role"] == "user")
        asked = record.messages[:end]
        answered = [replace(record, messages=(*asked, _turn("assistant", one))) for one in record.choices]
        return [encode(one, vlm.processor, max_length=max_length) for one in answered]

    def best(record: Record, found: Sequence[Likelihood]) -> str:
        return record.choices[max(range(len(found)), key=lambda n: found[n].log_prob)]

    def ask(records: Sequence[Record]) -> list[str | Skipped]:
        found = _together(records, answers, partial(_choices, vlm, batch))
        pairs = zip(records, found, strict=True)
        return [one if isinstance(one, Skipped) else best(record, one) for record, one in pairs]

    return ask


def reading(vlm: Vlm, *, batch: int, max_length: int) -> Asking[Likelihood]:
    """`likelihood`, of one batch of records; `batch` bounds the examples of a forward pass."""

    def read(record: Record) -> list[Example]:
        if record.messages:
            return [encode(record, vlm.processor, max_length=max_length)]
        return _windows(vlm, record, max_length)

    def total(found: Sequence[Likelihood]) -> Likelihood:
        return Likelihood(sum(one.log_prob for one in found), sum(one.num_tokens for one in found))

    def ask(records: Sequence[Record]) -> list[Likelihood | Skipped]:
        found = _together(records, read, partial(_likelihoods, vlm, batch))
        return [one if isinstance(one, Skipped) else total(one) for one in found]

    return ask


def batches(vlm: Vlm, records: Sequence[Record], batch: int) -> list[list[int]]:
    """The indices of the records, `batch` at a time, longest first."""
    lengths = Examples(records, vlm.processor).lengths
    order = sorted(range(len(records)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def end_tokens(vlm: Vlm) -> list[int]:
    """Tokens that end an answer: those of the generation config, the tokenizer and the chat template."""
    listed = vlm.model.generation_config.eos_token_id
    ends = {vlm.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    try:
        talk = Record("", (_turn("user", "yes"), _turn("assistant", "yes")))
        last = int(encode(talk, vlm.processor).labels[-1])
    except RecordError:  # PaliGemma has no chat template, and takes nothing without an image
        last = None
    if last in vlm.tokenizer.added_tokens_decoder:  # some templates end a turn with plain text
        ends.add(last)
    return sorted(ends - {None})


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _each(vlm: Vlm, records: Sequence[Record], ask: Asking[Found], batch: int) -> Iterator[tuple[int, Found | Skipped]]:
    """Ask batch by batch, hand out one by one."""
    for indices in batches(vlm, records, batch):
        yield from zip(indices, ask([records[index] for index in indices]), strict=True)


def _together(
    records: Sequence[Record],
    expand: Callable[[Record], list[Example]],
    respond: Callable[[list[list[Example]]], list[list[Found]]],
) -> list[list[Found] | Skipped]:
    """Expand records into examples and respond to all of these at once."""
    expanded: list[list[Example] | Skipped] = []
    for record in records:
        try:
            expanded.append(expand(record))
        except RecordError as error:
            expanded.append(error.skipped)
    examples = [one for one in expanded if not isinstance(one, Skipped)]
    found = iter(respond(examples) if examples else [])
    return [one if isinstance(one, Skipped) else next(found) for one in expanded]


def _collate(vlm: Vlm, examples: Sequence[Example], side: str) -> Batch:
    return collate(examples, pad_id=vlm.pad_token_id, side=side).to(vlm.device, vlm.model.dtype)


@torch.inference_mode()
def _generate(vlm: Vlm, ends: list[int], max_new_tokens: int, prompts: list[list[Example]]) -> list[list[str]]:
    batch = _collate(vlm, [prompt for (prompt,) in prompts], "left")
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": vlm.pad_token_id}
    tokens = vlm.model.generate(**batch.inputs, **GREEDY, **options)  # type: ignore[operator]
    new = tokens[:, batch.labels.shape[1] :].tolist()
    # A row that ends early is padded, and padding need not be a special token.
    said = [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in new]
    return [[text.strip()] for text in vlm.tokenizer.batch_decode(said, skip_special_tokens=True)]


def _likelihoods(vlm: Vlm, batch: int, records: list[list[Example]]) -> list[list[Likelihood]]:
    """Likelihood of the labels of each record's examples."""
    examples = [example for record in records for example in record]
    found = iter([one for part in _fitting(examples, batch) for one in _forward(vlm, _collate(vlm, part, "right"))])
    return [[next(found) for _ in record] for record in records]


def _fitting(examples: Sequence[Example], batch: int) -> Iterator[Sequence[Example]]:
    """At most `batch` examples and `MAX_ROWS` labels at a time."""
    while examples:
        rows = accumulate(int((example.labels != IGNORED).sum()) for example in examples[:batch])
        fitting = max(sum(total <= MAX_ROWS for total in rows), 1)
        yield examples[:fitting]
        examples = examples[fitting:]


@torch.inference_mode()
def _forward(vlm: Vlm, batch: Batch) -> list[Likelihood]:
    log_probs = -answer_nll(vlm, vlm.model, batch).double()  # N
    counts = (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist()
    return [Likelihood(float(part.sum()), len(part)) for part in log_probs.split(counts)]


def _choices(vlm: Vlm, batch: int, records: list[list[Example]]) -> list[list[Likelihood]]:
    """Likelihood of each record's choices, their common prompt read once where model and records allow it."""
    starts = [prefix.shared(choices) for choices in records]
    parts = [[prefix.split(one, start) for one in choices] for choices, start in zip(records, starts, strict=True)]
    read = prefix.read(vlm, [choices[0][0] for choices in parts]) if all(starts) else None
    if read is None:
        return _likelihoods(vlm, batch, records)
    rows = [(row, answer) for row, choices in enumerate(parts) for _, answer in choices]
    log_probs: list[torch.Tensor] = []
    for part in _fitting([answer for _, answer in rows], batch):
        own = [row for row, _ in rows[len(log_probs) : len(log_probs) + len(part)]]
        log_probs += prefix.follow(vlm, read, own, part)
    found = iter(log_probs)
    likelihoods = [[next(found) for _ in choices] for choices in records]
    return [[Likelihood(float(one.sum()), len(one)) for one in choices] for choices in likelihoods]


def _windows(vlm: Vlm, record: Record, max_length: int) -> list[Example]:
    whole = encode(record, vlm.processor, max_length=sys.maxsize)
    # Without what the tokenizer adds: the windows have their own first token.
    tokens = {key: values[whole.labels != IGNORED] for key, values in whole.inputs.items()}
    num_tokens, bos = len(tokens["input_ids"]), vlm.tokenizer.bos_token_id
    made_for = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", max_length)
    size, windows = min(max_length, made_for) - 1, []
    for start in range(0 if bos is not None else 1, num_tokens, size):
        places = [max(start - 1, 0), *range(start, min(start + size, num_tokens))]
        inputs = {key: values[places] for key, values in tokens.items()}
        if bos is not None:
            inputs["input_ids"][0] = bos
        labels = inputs["input_ids"].clone()
        labels[0] = IGNORED
        no_image = torch.zeros_like(labels, dtype=torch.bool)
        windows.append(Example(inputs, labels, no_image, record.id, record.source))
    if not windows:
        raise RecordError(record.source, "the text is too short: it has no token to predict")
    return windows
