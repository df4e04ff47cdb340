"""All the scores there are, which of them can be measured on what is given, and the measuring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

from striate.data import Batch
from striate.errors import UserError, nearest
from striate.processes import Rank
from striate.score import causal, gradient, states, weights
from striate.score.table import Metric, Score
from striate.vlm import Vlm

METRICS: dict[str, Metric] = {**states.METRICS, **causal.METRICS, **gradient.METRICS, **weights.METRICS}


class Measure(Protocol):
    """What takes batches and at any time has the scores of those until then, from what it keeps of each batch."""

    kept: list[Any]

    def add(self, batch: Batch) -> None: ...
    def scores(self) -> list[Score]: ...


def choose(metrics: str | Sequence[str], *, backbone: bool, data: bool, images: bool) -> list[str]:
    """Names of scores, in the order of `METRICS`: those asked for, or with "all" those that can be had.

    `backbone`, `data` and `images` say whether there is a backbone, whether there are records, and whether any has
    an image.

    Raises:
        UserError: an unknown name, with the nearest, or a score that lacks what it is made from.
    """
    listed = [metrics] if isinstance(metrics, str) else metrics
    asked = [name.strip() for one in listed for name in one.split(",") if name.strip()]
    if asked == ["all"]:
        chosen = [name for name in METRICS if not _lacking(name, backbone=backbone, data=data, images=images)]
        if not chosen:
            raise UserError("nothing can be measured without records (--data) or a backbone (--backbone)")
        return chosen
    for name in asked:
        if name not in METRICS:
            raise UserError(f"no score {nearest(name, METRICS)}")
        if lacking := _lacking(name, backbone=backbone, data=data, images=images):
            raise UserError(f"{name} needs {lacking}")
    if not asked:
        raise UserError(f"no score is named; there are: {', '.join(METRICS)}, or all")
    return [name for name in METRICS if name in asked]


def measure(
    vlm: Vlm,
    names: Sequence[str],
    batches: Callable[[str], Generator[Batch]],
    *,
    backbone: str | None = None,
    rank: Rank = Rank(),  # noqa: B008 (frozen)
) -> Iterator[list[Score]]:
    """The named scores, some at a time: first those of one forward pass, then those of many, then gradients.

    `batches(title)` gives the batches once more for every kind of measuring, and is closed after it. Of several
    processes each takes its share of them, and has all scores. A keyboard interrupt of one that is alone first gives
    the scores of the batches until then, and goes on when the next ones are asked for.

    Raises:
        UserError: what the measures raise; see `States`, `Causal` and `Gradient`.
    """
    for title, taken in _measures(vlm, names, backbone):
        try:
            with closing(batches(title)) as stream:  # takes its progress bar off the screen, whatever happens
                for batch in rank.share(stream):
                    taken.add(batch)
        except KeyboardInterrupt:
            if rank.of > 1:
                raise
            yield [score for score in taken.scores() if score.n]
            raise
        taken.kept = rank.in_turn(taken.kept)
        yield taken.scores()


def _measures(vlm: Vlm, names: Sequence[str], backbone: str | None) -> Iterator[tuple[str, Measure]]:
    if found := [name for name in names if name in states.METRICS]:
        yield "one pass", states.States(vlm, found)
    if found := [name for name in names if name in causal.METRICS]:
        yield "layer by layer", causal.Causal(vlm, found, backbone=backbone)
    if found := [name for name in names if name in gradient.METRICS]:
        yield "gradients", gradient.Gradient(vlm, found)


def _lacking(name: str, *, backbone: bool, data: bool, images: bool) -> str:
    """What a score is made from and is not there; empty when all is."""
    given = {"backbone": backbone, "records": data, "images": images}
    asked = {
        "backbone": "the language model before visual training: --backbone",
        "records": "records to be measured on: --data",
        "images": "images, and none of the records has one",
    }
    needs = METRICS[name].needs
    return next((words for what, words in asked.items() if what in needs and not given[what]), "")
