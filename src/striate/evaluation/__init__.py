"""Evaluate a model on records: its answers, their scores by the field's metrics, and a summary by task."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from striate.data import Record, Records, Skipped
from striate.errors import UserError, at_least, nearest
from striate.evaluation import harness
from striate.evaluation.answers import Likelihood, Reply, answer, ask
from striate.evaluation.prediction import PERPLEXITY, Prediction, by_task, predict, resolve, resolve_all, summary
from striate.vlm import Vlm

__all__ = [
    "Likelihood",
    "Prediction",
    "Reply",
    "Results",
    "answer",
    "ask",
    "evaluate",
    "predict",
    "resolve",
    "resolve_all",
    "sample_tasks",
    "summary",
]


@dataclass(frozen=True)
class Results:
    """The results of an evaluation: one prediction per record, in their order, and the skipped records.

    `tasks` has {"metric", "modality", "value", "stderr", "n"} by task, `visual` and `text` are means over tasks.
    """

    predictions: tuple[Prediction, ...]
    skipped: tuple[Skipped, ...]
    seconds: float
    max_length: int

    @classmethod
    def of(
        cls, answers: Iterable[Prediction | Skipped], unusable: Iterable[Skipped], seconds: float, max_length: int
    ) -> Results:
        """The results of answers in the order of the records, and of records that were `unusable` before.

        Raises:
            UserError: no record could be used.
        """
        answers = list(answers)
        predictions = tuple(one for one in answers if isinstance(one, Prediction))
        skipped = (*unusable, *(one for one in answers if isinstance(one, Skipped)))
        if not predictions:
            reason = f": {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise UserError(f"none of the {len(skipped)} records can be used{reason}", see="bad-records")
        return cls(predictions, skipped, seconds, max_length)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return summary(self.predictions)

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Metric, modality, value in [0, 1], standard error and number of records of each task."""
        return self._summary["tasks"]

    @property
    def visual(self) -> float | None:
        """Mean over the tasks with images; None without any."""
        return self._summary["visual"]

    @property
    def text(self) -> float | None:
        """Mean over the tasks without images; None without any."""
        return self._summary["text"]

    def to_json(self) -> dict[str, Any]:
        """The content of results.json: `summary`, "seconds", the number of "skipped" records, the five most frequent
        reasons ("left_out") with their numbers of records, the number of "empty" answers."""
        return self._summary | {
            "seconds": round(self.seconds, 3),
            "skipped": len(self.skipped),
            "left_out": _reasons(self.skipped, self.max_length),
            "empty": sum(not one.prediction and one.metric != PERPLEXITY for one in self.predictions),
        }


def evaluate(
    vlm: Vlm,
    records: Iterable[Record],
    *,
    tasks: str | Sequence[str] | None = None,
    samples: int | None = None,
    batch: int = 16,
    max_new_tokens: int = 32,
    max_length: int = 2048,
    seed: int = 0,
) -> Results:
    """Evaluate a model on records, task by task; it is left in evaluation mode.

    Args:
        vlm: the model.
        records: records with answers, or plain text for perplexity; a record that cannot be used is skipped.
        tasks: names of tasks in the records, separated by commas; default: all.
        samples: maximum number of records per task, sampled at random; default: all.
        batch: records answered together; the results do not depend on it.
        max_new_tokens: maximum number of tokens of an answer.
        max_length: maximum number of tokens of a record, image tokens included, or of a window of plain text.
        seed: random seed of the sampling.

    Raises:
        UserError: a number is below 1, a task or metric is unknown, or no record can be used.
    """
    at_least(1, samples=samples, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length)
    start = time.monotonic()
    resolved, unusable = resolve_all(Records.of(records))
    chosen = sample_tasks(resolved, tasks=tasks, samples=samples, seed=seed)
    by_index: dict[int, Prediction | Skipped] = {}
    for part in predict(vlm, chosen, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length):
        by_index |= part
    answers = [by_index[index] for index in sorted(by_index)]
    return Results.of(answers, unusable, time.monotonic() - start, max_length)


def sample_tasks(
    records: Sequence[Record],
    *,
    tasks: str | Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """The records of the named tasks, at most `samples` per task, in their order.

    The sample of a task depends only on the seed, the task's name and its number of records, not on the other tasks.
    `records` come from `resolve_all`.

    Raises:
        UserError: no record has a named task, or a task mixes metrics.
    """
    existing = dict.fromkeys(record.task for record in records)
    listed = [tasks] if isinstance(tasks, str) else tasks or ()
    names = [name.strip() for one in listed for name in one.split(",")]
    for name in names:
        if name not in existing:
            if harness.is_task(name):
                raise UserError(f"{name} is a harness's task, with records of its own: leave out the data, or the task")
            raise UserError(f"no task {nearest(name, existing)}")
    groups = by_task(record for record in records if record.task in (names or existing))
    for task, group in groups.items():
        if samples is not None and samples < len(group):
            indices = random.Random(f"{seed} {task}").sample(range(len(group)), samples)
            groups[task] = [group[index] for index in sorted(indices)]
    chosen = {id(record) for group in groups.values() for record in group}
    return [record for record in records if id(record) in chosen]


def _reasons(skipped: Sequence[Skipped], max_length: int) -> dict[str, int]:
    long = f"more than --max-length {max_length:,} tokens"
    return dict(Counter(long if one.too_long else one.reason for one in skipped).most_common(5))
