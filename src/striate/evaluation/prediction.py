"""Predictions: a model's answers to records, each with its score, and their summary by task."""

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
from striate.evaluation import metrics
from striate.evaluation.answers import BatchFn, Likelihood, answer_fn, batches, choice_fn, likelihood_fn
from striate.evaluation.metrics import METRICS
from striate.vlm import Vlm
from striate.vlm.template import final_answer

MULTIPLE_CHOICE, PERPLEXITY = "multiple_choice", "perplexity"


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one record: a line of predictions.jsonl.

    `score` is the metric's, from 0 to 1, or the record's perplexity over its `num_tokens`. `modality` is "visual" for a
    record with images, else "text"; `images` lists those that are files.
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
    """The record with task, metric and answers filled in, ready for `predict`.

    Task: its own, else the name of its file. Metric: its own, else `perplexity` for plain text, `multiple_choice` with
    choices, `vqa_accuracy` with ten answers, else `exact_match`. Answers: its own, else the assistant's last turn. With
    choices, answers may be letters (A, B, ...) that are not choices themselves.

    Raises:
        UserError: the metric is unknown.
        RecordError: the record lacks an input of its metric.
    """
    answers = record.answers
    if not answers and record.messages and record.messages[-1]["role"] == "assistant":
        text = record.messages[-1]["content"][0]["text"]
        answers = (final_answer(text) or text,)  # without its reasoning
    metric = record.metric or _default_metric(record, answers)
    if metric not in (*METRICS, PERPLEXITY):
        raise UserError(f"{record.source}: no metric {nearest(metric, (*METRICS, PERPLEXITY))}")
    if metric != PERPLEXITY:
        answers = _check_answers(record, metric, answers)
    task = record.task or Path(record.source.rpartition(":")[0]).stem or metric
    return replace(record, task=task, metric=metric, answers=answers)


def resolve_all(records: Iterable[Record], *, stop: bool = False) -> tuple[list[Record], list[Skipped]]:
    """The records as `resolve` returns them, and the skipped ones.

    Raises:
        UserError: a metric is unknown.
        RecordError: with `stop`, a record lacks an input of its metric.
    """
    resolved: list[Record] = []
    skipped: list[Skipped] = []
    for record in records:
        try:
            resolved.append(resolve(record))
        except RecordError as error:
            if stop:
                raise
            skipped.append(error.skipped)
    return resolved, skipped


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
    """Answer every record and score the answers: predictions by index of the record, batch by batch.

    `records` come from `resolve`. A record that cannot be used is a `Skipped`. Batches whose records are all `known`
    are left out; the other batches stay the same. With a `share` (n, of) only every of-th batch is answered, from the
    n-th on; all shares yield equally often, at the end possibly an empty mapping. The model is left in evaluation mode.
    """
    vlm.model.eval()
    groups = _groups(vlm, records, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length)
    missing = [(group, function) for group, function in groups if not all(index in known for index in group)]
    number, of = share
    missing += [([], list)] * (-len(missing) % of)  # empty batches, so that all shares have as many
    for group, function in missing[number::of]:
        results = zip(group, function([records[index] for index in group]), strict=True)
        yield {i: one if isinstance(one, Skipped) else _predict(records[i], one) for i, one in results}


def summary(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Results by task, and the mean over the visual tasks and over the text tasks.

    `{"tasks": {name: {"metric", "modality", "value", "stderr", "n"}}, "visual", "text"}`. A task is visual
    when any of its records has an image. Perplexities are listed but not averaged; a mean over no task is
    None, as is the standard error of a single record.
    """
    tasks = {task: _result(group) for task, group in by_task(predictions).items()}

    def average(modality: str) -> float | None:
        own = (task for task in tasks.values() if task["modality"] == modality)
        values = [task["value"] for task in own if task["metric"] != PERPLEXITY]
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
        UserError: a task mixes metrics, so that its mean is meaningless.
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
) -> Iterator[tuple[list[int], BatchFn[Any]]]:
    """Batches of indices of records, each with the function for their metric."""
    functions: dict[str, Callable[[], BatchFn[Any]]] = {
        "": partial(answer_fn, vlm, max_new_tokens=max_new_tokens, max_length=max_length),
        MULTIPLE_CHOICE: partial(choice_fn, vlm, batch=batch, max_length=max_length),
        PERPLEXITY: partial(likelihood_fn, vlm, batch=batch, max_length=max_length),
    }
    for key, make in functions.items():
        keys = (record.metric if record.metric in functions else "" for record in records)
        indices = [index for index, own in enumerate(keys) if own == key]
        if not indices:  # a text-only model may lack the chat template that answers need
            continue
        function = make()
        for part in batches(vlm, [records[index] for index in indices], batch):
            yield [indices[index] for index in part], function


def _default_metric(record: Record, answers: Sequence[str]) -> str:
    if not record.messages:
        return PERPLEXITY
    if record.choices:
        return MULTIPLE_CHOICE
    return "vqa_accuracy" if len(answers) == 10 else "exact_match"


def _check_answers(record: Record, metric: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """The answers, with letters replaced by their choices."""
    missing = ""
    if not record.messages:
        missing = "a question, found plain text"
    elif not answers:
        missing = "'answers', found none"
    elif metric == "vqa_accuracy" and len(answers) < 4:
        missing = f"at least 4 people's answers, found {len(answers)}"
    elif metric in (MULTIPLE_CHOICE, "scienceqa_accuracy") or (metric == "mmmu_accuracy" and record.choices):
        letters = dict(zip(ascii_uppercase, record.choices, strict=False))
        answers = tuple(one if one in record.choices else letters.get(one, "") for one in answers)
        if not set(answers) <= {*record.choices}:
            missing = f"answers that are among the {len(record.choices)} 'choices', found {record.answers}"
    if missing:
        raise RecordError(record.source, f"{metric} needs {missing}")
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


def _predict(record: Record, result: str | Likelihood) -> Prediction:
    if isinstance(result, Likelihood):
        text, score, num_tokens = "", math.exp(-result.log_prob / result.num_tokens), result.num_tokens
    else:
        text, score, num_tokens = result, METRICS[record.metric](result, record.answers, record.choices), 0
    last_turn = [message["content"] for message in record.messages if message["role"] == "user"][-1:]
    question = " ".join(part["text"].strip() for content in last_turn for part in content if "text" in part)
    return Prediction(
        id=record.id,
        task=record.task,
        metric=record.metric,
        modality="visual" if record.images else "text",
        question=question,
        answers=record.answers,
        prediction=text,
        score=score,
        images=tuple(str(image) for image in record.images if isinstance(image, Path)),
        num_tokens=num_tokens,
    )
