"""A record as a question, and the model's own answer to it as the tokens that are looked at."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from striate.data import IGNORED, TOKEN_KEYS, Batch, Example, Record, Records, Skipped, collate, encode
from striate.errors import UserError
from striate.evaluation.answers import answer_texts, generate, stops
from striate.scores.likelihood import AnswerTokens
from striate.vlm import Vlm
from striate.vlm.processors import image_token_id

MAX_NEW_TOKENS = 32
"""Maximum number of tokens of an answer."""


def draw(records: Iterable[Record], samples: int | None, seed: int) -> tuple[list[Record], list[Skipped]]:
    """Questions sampled at random, in their order, from the records with an image, or from all if none has one.

    Raises:
        UserError: no record has a question.
    """
    records, questions = Records.of(records), list[Record]()
    skipped = list(records.skipped)
    for record in records:
        if question := _question(record):
            questions.append(question)
        else:
            skipped.append(Skipped(record.source, "has no question"))
    chosen = [question for question in questions if question.images] or questions
    if not chosen:
        raise UserError(f"none of the {len(records)} records has a question", see="bad-records")
    if samples is not None and samples < len(chosen):
        chosen = [chosen[index] for index in sorted(random.Random(int(seed)).sample(range(len(chosen)), samples))]
    return chosen, skipped


def _question(record: Record) -> Record | None:
    """The conversation up to its last question, with the images in it, and the answer among `answers`."""
    turns = [number for number, message in enumerate(record.messages) if message["role"] == "user"]
    if not turns:
        return None
    messages, after = record.messages[: turns[-1] + 1], record.messages[turns[-1] + 1 :]
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    answers = record.answers or tuple(message["content"][0]["text"] for message in after[:1])
    return replace(record, messages=messages, images=record.images[:num_images], answers=answers)


@dataclass(frozen=True)
class Asked:
    """A question with the model's greedy answer: the prompt, and the prompt with the answer, as batches of one.

    `tokens` are those of the answer, at most `MAX_NEW_TOKENS`, with the end token if it ends. `targets` are the
    answer's tokens and the positions that predict them.
    """

    example: Example
    prompt: Batch
    batch: Batch
    tokens: tuple[int, ...]
    text: str
    targets: AnswerTokens


@torch.no_grad()
def ask(vlm: Vlm, question: Record, *, max_length: int, tokens: Sequence[int] | None = None) -> Asked:
    """Generate the answer to a question, unless its `tokens` are given, and append them to the prompt.

    Raises:
        RecordError: the record cannot be used.
    """
    example = encode(question, vlm.processor, max_length=max_length, generation=True)
    prompt = _batch(vlm, example)
    tokens = answer_tokens(vlm, prompt) if tokens is None else tokens[:MAX_NEW_TOKENS]
    batch = _batch(vlm, _append(example, tokens, prefix=vlm.model.config.model_type == "paligemma"))
    (text,) = answer_texts(vlm, [tokens])
    return Asked(example, prompt, batch, tuple(tokens), text, AnswerTokens.of(batch))


def answer_tokens(vlm: Vlm, prompt: Batch) -> list[int]:
    """The greedy answer to one prompt, as in evaluation; without image tokens, which would ask for one more image."""
    (tokens,) = generate(vlm, prompt, max_new_tokens=MAX_NEW_TOKENS, without=image_token_id(vlm.processor))
    return tokens


def answers_alike(vlm: Vlm, asked: Asked, logits: Tensor) -> bool:
    """Whether a model with these logits [N, V] at the answer's positions would generate the same answer.

    It does if each token is the most likely one after those before it, and the last one any that ends an answer.
    """
    possible = logits.index_fill(1, torch.tensor([image_token_id(vlm.processor)], device=logits.device), -torch.inf)
    best, ends = possible.argmax(dim=-1).tolist(), stops(vlm)
    *others, last = zip(best, asked.tokens, strict=True)
    return all(one == other for one, other in others) and (last[0] == last[1] or {*last} <= {*ends})


def _batch(vlm: Vlm, example: Example) -> Batch:
    return collate([example], pad_id=vlm.pad_token_id, side="left").to(vlm.device, vlm.model.dtype)


def _append(prompt: Example, tokens: Sequence[int], *, prefix: bool) -> Example:
    """An example with an answer behind its prompt; with `prefix` (PaliGemma) type 1 tells it from the prompt."""
    new = torch.tensor(tokens)
    values: dict[str, Any] = {"input_ids": new, "attention_mask": torch.ones_like(new)}

    def longer(key: str, value: Tensor) -> Tensor:
        if key == "cross_attention_mask":
            more = value[-1:].expand(len(new), *value.shape[1:])
        else:
            more = values.get(key, torch.full_like(new, int(prefix and key == "token_type_ids")))
        return torch.cat([value, more.to(value.dtype)])

    inputs = {key: longer(key, v) if key in TOKEN_KEYS else v for key, v in prompt.inputs.items()}
    return replace(
        prompt,
        inputs=inputs,
        labels=torch.cat([torch.full_like(prompt.labels, IGNORED), new]),
        image_mask=torch.cat([prompt.image_mask, torch.zeros(len(new), dtype=torch.bool)]),
    )
