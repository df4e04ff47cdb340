"""All scores, the choice of those whose inputs are given, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from striate.data import Batch
from striate.distributed import Rank
from striate.errors import UserError, nearest
from striate.scores import causal, gradient, states, weights
from striate.scores.causal import Causal
from striate.scores.gradient import Gradient
from striate.scores.states import States
from striate.scores.table import NO_TASK, Metric, Score
from striate.vlm import Vlm

METRICS: dict[str, Metric] = {**states.METRICS, **causal.METRICS, **gradient.METRICS, **weights.METRICS}


class Measure(Protocol):
    """Measures batches one by one; `scores` are those of the batches so far, from the `results` of each batch, over all
    their samples or those that are true in `keep`, [B] per batch."""

    results: list[Any]

    def add(self, batch: Batch) -> None: ...
    def scores(self, keep: Sequence[Tensor] | None = None) -> list[Score]: ...


MEASURES: tuple[tuple[str, Mapping[str, Metric], Callable[..., Measure]], ...] = (
    ("one pass", states.METRICS, States),
    ("layer by layer", causal.METRICS, Causal),
    ("gradients", gradient.METRICS, Gradient),
)
"""The classes that measure scores: title of the progress bar, the scores, the class."""


def choose(metrics: str | Sequence[str], *, backbone: bool, data: bool, images: bool) -> list[str]:
    """Names of scores, in the order of `METRICS`: the listed ones, or for "all" every score whose inputs are given,
    but for those that take minutes on a large model (`Metric.in_all`).

    `backbone`: a backbone is given. `data`: records are given. `images`: at least one record has an image.

    Raises:
        UserError: a name is unknown (with the nearest one), or an input of a score is missing.
    """
    listed = [metrics] if isinstance(metrics, str) else metrics
    requested = [name.strip() for one in listed for name in one.split(",") if name.strip()]
    if requested == ["all"]:
        available = (name for name in METRICS if not _missing(name, backbone=backbone, data=data, images=images))
        chosen = [name for name in available if METRICS[name].in_all]
        if not chosen:
            raise UserError("nothing can be measured without records (--data) or a backbone (--backbone)", see="scores")
        return chosen
    for name in requested:
        if name not in METRICS:
            raise UserError(f"no score {nearest(name, METRICS)}", see="scores")
        if missing := _missing(name, backbone=backbone, data=data, images=images):
            raise UserError(f"{name} needs {missing}", see="scores")
    if not requested:
        raise UserError(f"no score is named; there are: {', '.join(METRICS)}, or all")
    return [name for name in METRICS if name in requested]


def measure(
    vlm: Vlm,
    names: Sequence[str],
    batches: Callable[[str], Generator[Batch]],
    *,
    backbone: str | None = None,
    by_task: bool = False,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
) -> Iterator[list[Score]]:
    """The named scores, one list per entry of `MEASURES`: those of one forward pass, of many, and of gradients.

    `batches(title)` yields all batches, once per list, and is closed afterwards. `by_task`: each score also over the
    samples of every task alone. With several processes each
    measures its share of the batches and has all scores. On a keyboard interrupt in a single process, the scores of the
    batches so far are yielded before it is raised again.

    Raises:
        UserError: a measure cannot be taken; see `States`, `Causal` and `Gradient`.
    """
    for title, measuring in measures(vlm, names, backbone):
        tasks: list[tuple[str, ...]] = []
        try:
            with closing(batches(title)) as stream:  # removes its progress bar from the screen, also on errors
                for batch in rank.share(stream):
                    measuring.add(batch)
                    tasks.append(batch.tasks)
        except KeyboardInterrupt:
            if rank.world_size > 1:
                raise
            yield [score for score in measuring.scores() if score.n]
            raise
        measuring.results = rank.interleave(measuring.results)
        yield _split_by_task(measuring, rank.interleave(tasks)) if by_task else measuring.scores()


def _split_by_task(measuring: Measure, tasks: Sequence[tuple[str, ...]]) -> list[Score]:
    """The scores, with those over the samples of every task; `tasks` has one name per sample, by batch."""
    by_task: dict[str, dict[str, Score]] = {}
    for task in sorted({task for batch in tasks for task in batch}):
        keep = [torch.tensor([one == task for one in batch]) for batch in tasks]
        by_task[task or NO_TASK] = {score.name: score for score in measuring.scores(keep)}
    return [
        replace(score, tasks={task: found[score.name] for task, found in by_task.items()})
        for score in measuring.scores()
    ]


def measures(vlm: Vlm, names: Sequence[str], backbone: str | None = None) -> Iterator[tuple[str, Measure]]:
    """The measures that the named scores need, with their titles; scores of weights need none."""
    for title, metrics, measure in MEASURES:
        if own := [name for name in names if name in metrics]:
            yield title, measure(vlm, own, **({"backbone": backbone} if measure is Causal else {}))


def _missing(name: str, *, backbone: bool, data: bool, images: bool) -> str:
    """Description of the first input of a score that is not given; empty when all are."""
    given = {"backbone": backbone, "records": data, "images": images}
    inputs = {
        "backbone": "the language model before visual training: --backbone",
        "records": "records to be measured on: --data",
        "images": "images, and none of the records has one",
    }
    needs = METRICS[name].needs
    return next((description for what, description in inputs.items() if what in needs and not given[what]), "")
