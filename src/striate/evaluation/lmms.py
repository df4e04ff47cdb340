"""An lmms-eval model class for any vision-language model: conversations become records for `evaluation.answers`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from striate.data import Record, RecordError, Skipped
from striate.errors import UserError
from striate.evaluation.answers import answer
from striate.vlm import Vlm

MAX_NEW_TOKENS = 1024
"""Maximum number of tokens of an answer in tasks without a limit: the default of lmms-eval's classes for LLaVA."""


def lmms_model(vlm: Vlm, batch: int) -> tuple[Any, set[str]]:
    """The model for lmms-eval, and the set of tasks whose questions have images, filled while it answers."""
    from lmms_eval.api.model import lmms

    visual: set[str] = set()

    class Model(lmms):
        is_simple = False  # requests are conversations

        def __init__(self) -> None:
            super().__init__()
            self.accelerator = None  # one process

        def generate_until(self, requests: list[Any]) -> list[str]:
            questions = [_question(*one.args, documents=self.task_dict) for one in requests]
            return _answers(vlm, questions, batch, visual)

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise _unsupported(requests[0].task_name, "compares likelihoods")

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            raise _unsupported(requests[0].task_name, "has several rounds per question")

    return Model(), visual


def _unsupported(task: str, reason: str) -> UserError:
    return UserError(
        f"lmms-eval's task {task} {reason}; striate supports one greedy answer per question, with images and text only"
    )


@dataclass(frozen=True)
class _Question:
    """A question of lmms-eval; `record` opens its images."""

    task: str
    max_new_tokens: int
    until: tuple[str, ...]
    record: Callable[[], Record]


def _question(
    context: str,
    doc_to_messages: Callable[[Any], list[dict[str, Any]]],
    options: dict[str, Any],
    number: int,
    task: str,
    split: str,
    *,
    documents: dict[str, Any],
) -> _Question:
    """One request; `context` repeats the conversation and is not used."""
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise _unsupported(task, "needs sampled answers or beams")
    until = options.get("until") or ()
    return _Question(
        task,
        options.get("max_new_tokens") or options.get("max_gen_toks") or MAX_NEW_TOKENS,
        (until,) if isinstance(until, str) else tuple(until),
        lambda: _record(doc_to_messages(documents[task][split][number]), task, f"{task}:{number + 1}"),
    )


def _record(messages: list[dict[str, Any]], task: str, source: str) -> Record:
    turns, images = [], []
    for message in messages:
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                image = part["url"]
                if isinstance(image, str) and image.startswith(("http://", "https://")):
                    raise _unsupported(task, "has images on the web, which striate does not download")
                images.append(Path(image) if isinstance(image, str) else image)
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise _unsupported(task, f"contains {part['type']}")
        turns.append({"role": message["role"], "content": parts})
    return Record(source, tuple(turns), tuple(images), source, task=task)


def _answers(vlm: Vlm, questions: Sequence[_Question], batch: int, visual: set[str]) -> list[str]:
    """The model's answer to each question, in their order. The images of a few batches are in memory at a time."""
    answers = [""] * len(questions)
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    order = sorted(range(len(questions)), key=lambda index: questions[index].max_new_tokens)
    for num_tokens, group in groupby(order, key=lambda index: questions[index].max_new_tokens):
        indices = list(group)
        for start in range(0, len(indices), 8 * batch):
            part = indices[start : start + 8 * batch]
            records = [questions[index].record() for index in part]
            visual |= {record.task for record in records if record.images}
            for index, text in answer(vlm, records, batch=batch, max_new_tokens=num_tokens, max_length=limit):
                if isinstance(text, Skipped):
                    raise RecordError(text.source, text.reason)
                answers[part[index]] = _before(text, questions[part[index]].until)
    return answers


def _before(text: str, ends: Sequence[str]) -> str:
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]
