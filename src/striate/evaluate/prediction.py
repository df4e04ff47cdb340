"""Predictions: what a model said about records, scored one by one and summed up by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, Protocol, TypeVar

from striate.data import Record, RecordError, Skipped
from striate.errors import UserError, nearest
from striate.evaluate import metrics
from striate.evaluate.answers import Asking, Likelihood, answering, batches, choosing, reading
from striate.evaluate.metrics import METRICS
from striate.vlm import Vlm

MULTIPLE_CHOICE, PERPLEXITY = "multiple_choice", "perplexity"


@dataclass(frozen=True)
class Prediction:
    """What a model said about one record: a line of predictions.jsonl.

    `score` is the metric's, from 0 to 1; with perplexity it is the record's own, over its `num_tokens`.
    `modality` is "visual" for a record with images, else "text"; `images` lists those that are files or URLs.
    """

    id: str
    task: str
    metric: str
    modality: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    score: float
    images: tuple[str, ...]
    num_tokens: int = 0


def resolve(record: Record) -> Record:
    """The record with task, metric and answers filled in, ready to be asked and scored.

    Task: its own, else the name of its file. Metric: its own, else `perplexity` for plain text,
    `multiple_choice` when there are choices, `vqa_accuracy` when there are ten answers, else `exact_match`.
    Answers: its own, else what the assistant says last. Where there are choices to answer with, they may be
    letters (A, B, ...) that are not choices themselves.

    Raises:
        UserError: unknown metric.
        RecordError: the record lacks what its metric needs.
    """
    answers = record.answers
    if not answers and record.messages and record.messages[-1]["role"] == "assistant":
        answers = (record.messages[-1]["content"][0]["text"],)
    metric = record.metric or _usual_metric(record, answers)
    if metric not in (*METRICS, PERPLEXITY):
        raise UserError(f"{record.source}: no metric {nearest(metric, (*METRICS, PERPLEXITY))}")
    if metric != PERPLEXITY:
        answers = _checked(record, metric, answers)
    task = record.task or Path(record.source.rpartition(":")[0]).stem or metric
    return replace(record, task=task, metric=metric, answers=answers)


def predict(
    vlm: Vlm,
    records: Sequence[Record],
    *,
    batch: int = 16,
    max_new_tokens: int = 32,
    max_length: int = 2048,
    known: Container[int] = (),
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[int, Prediction | Skipped]]:
    """Ask about every record and score what the model says: predictions by index of the record, batch by batch.

    `records` are as `resolve` gives them. One that cannot be used is a `Skipped`. Batches whose records are all
    `known` are left out, and no other batch changes by that. With a `share` (n, of) only every of-th batch is
    asked, from the n-th on, and each share yields as often as the others, nothing at last. The model is left in
    evaluation mode.
    """
    vlm.model.eval()
    groups = _groups(vlm, records, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length)
    wanted = [(group, ask) for group, ask in groups if not all(index in known for index in group)]
    number, of = share
    for start in range(number, len(wanted) + number, of):
        said: dict[int, Any] = {}
        for group, ask in wanted[start : start + 1]:  # none, where the last round has too few
            said |= zip(group, ask([records[index] for index in group]), strict=True)
        yield {index: one if isinstance(one, Skipped) else _scored(records[index], one) for index, one in said.items()}


def summary(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Results by task, and the mean over the visual tasks and over the text tasks.

    `{"tasks": {name: {"metric", "modality", "value", "stderr", "n"}}, "visual", "text"}`. A task is visual
    when any of its records has an image. Perplexities are listed but not averaged; a mean over no task is
    None, as is the standard error of a single record.
    """
    tasks = {task: _result(group) for task, group in by_task(predictions).items()}

    def average(modality: str) -> float | None:
        alike = (task for task in tasks.values() if task["modality"] == modality)
        values = [task["value"] for task in alike if task["metric"] != PERPLEXITY]
        return fmean(values) if values else None

    return {"tasks": tasks, "visual": average("visual"), "text": average("text")}


class _Tasked(Protocol):
    @property
    def task(self) -> str: ...
    @property
    def metric(self) -> str: ...


Tasked = TypeVar("Tasked", bound=_Tasked)


def by_task(items: Iterable[Tasked]) -> dict[str, list[Tasked]]:
    """Records or predictions by task, in the order of their first.

    Raises:
        UserError: a task mixes metrics, whose mean would mean nothing.
    """
    tasks: dict[str, list[Tasked]] = {}
    for item in items:
        group = tasks.setdefault(item.task, [])
        if group and group[0].metric != item.metric:
            mixed = f"task {item.task!r} mixes {group[0].metric} and {item.metric}"
            raise UserError(f"{mixed}: give its records one 'metric', or two names of a 'task'")
        group.append(item)
    return tasks


def _groups(
    vlm: Vlm, records: Sequence[Record], *, batch: int, max_new_tokens: int, max_length: int
) -> Iterator[tuple[list[int], Asking[Any]]]:
    """Batches of indices, each of records that are asked in the same way, and that way."""
    ways: dict[str, Callable[[], Asking[Any]]] = {
        "": partial(answering, vlm, max_new_tokens=max_new_tokens, max_length=max_length),
        MULTIPLE_CHOICE: partial(choosing, vlm, batch=batch, max_length=max_length),
        PERPLEXITY: partial(reading, vlm, batch=batch, max_length=max_length),
    }
    for way, make in ways.items():
        indices = [n for n, record in enumerate(records) if way == (record.metric if record.metric in ways else "")]
        if not indices:  # a model of plain text alone may lack the chat template that answers need
            continue
        ask = make()
        for places in batches(vlm, [records[index] for index in indices], batch):
            yield [indices[place] for place in places], ask


def _usual_metric(record: Record, answers: Sequence[str]) -> str:
    if not record.messages:
        return PERPLEXITY
    if record.choices:
        return MULTIPLE_CHOICE
    return "vqa_accuracy" if len(answers) == 10 else "exact_match"


def _checked(record: Record, metric: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """The answers, letters of choices as choices."""
    wanting = ""
    if not record.messages:
        wanting = "a question, found plain text"
    elif not answers:
        wanting = "'answers', found none"
    elif metric == "vqa_accuracy" and len(answers) < 4:
        wanting = f"the answers of 4 people or more, found {len(answers)}"
    elif metric in (MULTIPLE_CHOICE, "scienceqa_accuracy") or (metric == "mmmu_accuracy" and record.choices):
        letters = dict(zip(ascii_uppercase, record.choices, strict=False))
        answers = tuple(one if one in record.choices else letters.get(one, "") for one in answers)
        if not set(answers) <= {*record.choices}:
            wanting = f"answers that are among the {len(record.choices)} 'choices', found {record.answers}"
    if wanting:
        raise RecordError(record.source, f"{metric} needs {wanting}")
    return answers


def _result(group: Sequence[Prediction]) -> dict[str, Any]:
    metric, scores = group[0].metric, [one.score for one in group]
    if metric == PERPLEXITY:
        num_tokens = [one.num_tokens for one in group]
        nll = [math.log(score) * num for score, num in zip(scores, num_tokens, strict=True)]
        value, stderr = metrics.perplexity(nll, num_tokens)
    else:
        value, stderr = metrics.mean(scores)
    modality = "visual" if any(one.modality == "visual" for one in group) else "text"
    return {"metric": metric, "modality": modality, "value": value, "stderr": stderr, "n": len(group)}


def _scored(record: Record, said: str | Likelihood) -> Prediction:
    if isinstance(said, Likelihood):
        text, score, num_tokens = "", math.exp(-said.log_prob / said.num_tokens), said.num_tokens
    else:
        text, score, num_tokens = said, METRICS[record.metric](said, record.answers, record.choices), 0
    asked = [message["content"] for message in record.messages if message["role"] == "user"][-1:]
    question = " ".join(part["text"].strip() for content in asked for part in content if "text" in part)
    return Prediction(
        id=record.id,
        task=record.task,
        metric=record.metric,
        modality="visual" if record.images else "text",
        question=question,
        answers=record.answers,
        prediction=text,
        score=score,
        images=tuple(str(image) for image in record.images if isinstance(image, str | Path)),
        num_tokens=num_tokens,
    )
