"""The choice of the layers to cut: the least important ones by a score, outside the region."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from striate.data import Batch
from striate.errors import UserError, nearest
from striate.prune.cutting import bypass
from striate.scores.likelihood import AnswerTokens, perplexity
from striate.scores.metrics import METRICS, measures
from striate.scores.sampling import RecordSample, Sampling
from striate.scores.table import Score, Scores, order
from striate.vlm import Vlm
from striate.vlm.modes import eval_mode

MEASURABLE = tuple(name for name, metric in METRICS.items() if "backbone" not in metric.needs)
"""Scores that calibration measures: all that need no backbone."""
BLOCK, RANDOM = "block", "random"
BLOCK_SCORE = "angular_distance"  # the score whose table has blocks
GREEDY = "bypass_perplexity"  # means little for several layers at once: it is measured again after every cut

AMOUNTS = "4 (layers), 10% (of all layers), until:1% (as many as raise perplexity on the data by at most that)"
_AMOUNT = re.compile(r"(until:)?([0-9]{1,9}(?:\.[0-9]{1,9})?)(%?)")


@dataclass(frozen=True)
class Amount:
    """How many layers to cut: a `count`, or as many as raise perplexity by at most `rise` (a fraction: 0.01 is 1 %)."""

    count: int | None = None
    rise: float | None = None

    @classmethod
    def parse(cls, text: str, depth: int) -> Amount:
        """Read `4`, `10%` (`max(1, round(depth * share))`, halves to even) or `until:1%`.

        Raises:
            UserError: the text has another form, or means less than one layer.
        """
        match = _AMOUNT.fullmatch(text.strip())
        until, number, percent = match.groups() if match else (None, "0", "")
        if until and percent:
            return cls(rise=float(number) / 100)
        if until or not 0 < float(number) <= (100 if percent else math.inf) or (not percent and "." in number):
            raise UserError(f"--remove {text} is not a number of layers; accepted: {AMOUNTS}")
        return cls(max(1, round(depth * float(number) / 100)) if percent else int(number))


@dataclass(frozen=True)
class Calibration:
    """The model, and the sample of the user's records to measure its layers on."""

    vlm: Vlm
    sampling: Sampling
    sample: RecordSample
    progress: bool = False

    def score(self, name: str) -> Score:
        """One of the `MEASURABLE` scores, of the model as it is now: with layers bypassed, if any are."""
        ((_, measure),) = measures(self.vlm, (name,))
        with eval_mode(self.vlm.model):
            for batch in self._batches(name):
                measure.add(batch)
        return measure.scores()[0]

    @torch.inference_mode()
    def perplexity(self, without: tuple[int, ...]) -> float:
        """exp(mean answer-token loss) of the model with these layers bypassed, >= 1."""
        losses: list[Tensor] = []
        counts: list[int] = []
        with eval_mode(self.vlm.model), bypass(self.vlm, without):
            for batch in self._batches("perplexity"):
                answers = AnswerTokens.of(batch)
                loss = answers.sums(answers.nll(answers.logits(self.vlm, batch)))
                answers.check(loss)
                losses.append(loss.cpu())
                counts += answers.counts
        return float(perplexity(torch.cat(losses), torch.tensor(counts))[0])

    def _batches(self, title: str) -> Iterable[Batch]:
        return self.sampling.show_batches(self.vlm, self.sample, title, progress=self.progress)


@dataclass(frozen=True)
class Criterion:
    """The criterion by which layers are chosen.

    `by`: a score, `block` or `random`. `saved`: scores to use instead of measuring them.
    """

    by: str
    saved: Scores | None = None
    seed: int = 0
    measured: list[Score] = field(default_factory=list, compare=False)
    """Filled while layers are chosen: the scores of the whole model."""

    def check(self, *, data: bool) -> None:
        """Refuse impossible criteria before a model is loaded.

        Raises:
            UserError: the score is unknown, or lacks data or saved scores.
        """
        name = BLOCK_SCORE if self.by == BLOCK else self.by
        if self.saved is not None and name != RANDOM:
            self.saved[name]  # raises an error with the nearest name
        elif name not in (*MEASURABLE, RANDOM):
            raise UserError(
                f"--by: no score {nearest(self.by, (*MEASURABLE, BLOCK, RANDOM))} (others: with --scores)", see="scores"
            )
        elif not data and name != RANDOM:
            raise UserError(
                f"{self.by} is measured on records: give them with --data, or scores with --scores", see="scores"
            )

    def proposals(
        self, vlm: Vlm, candidates: Sequence[int], calibration: Calibration | None
    ) -> Iterator[tuple[int, ...]]:
        """The layers to cut for a number of one, two and so on, in the order of cutting where it matters."""
        if self.by == RANDOM:
            ranked = random.Random(self.seed).sample(candidates, len(candidates))
        elif self.by == BLOCK:
            table = self._score(BLOCK_SCORE, vlm.depth, calibration).table
            if table is None:
                raise UserError(f"the saved {BLOCK_SCORE} has no table of blocks: measure it again")
            yield from (blocks(table, candidates, count) for count in range(1, len(candidates) + 1))
            return
        elif calibration is not None and self.saved is None and self.by == GREEDY:
            yield from self._one_by_one(vlm, candidates, calibration)
            return
        else:
            ranked = least_important(self._score(self.by, vlm.depth, calibration), candidates)
        yield from (tuple(ranked[:count]) for count in range(1, len(ranked) + 1))

    def _score(self, name: str, depth: int, calibration: Calibration | None) -> Score:
        """The saved score, or the measured one."""
        if self.saved is None:
            assert calibration is not None
            self.measured.append(calibration.score(name))
            return self.measured[0]
        if self.saved.depth != depth:
            raise UserError(f"the saved scores are for {self.saved.depth} decoder layers, this model has {depth}")
        return self.saved[name]

    def _one_by_one(self, vlm: Vlm, candidates: Sequence[int], calibration: Calibration) -> Iterator[tuple[int, ...]]:
        cut: tuple[int, ...] = ()
        while left := [layer for layer in candidates if layer not in cut]:
            with bypass(vlm, cut):
                score = calibration.score(self.by)
            if not cut:
                self.measured.append(score)
            cut = (*cut, least_important(score, left)[0])
            yield cut


def least_important(score: Score, candidates: Collection[int]) -> list[int]:
    """The candidates in the order of a score, the least important first.

    Raises:
        UserError: a candidate has no value.
    """
    if unknown := [layer for layer in candidates if not math.isfinite(score.values[layer])]:
        raise UserError(
            f"{score.name} has no value for layer {unknown[0]}, so layers cannot be chosen by it", see="scores"
        )
    return [layer for layer in reversed(order(score)) if layer in candidates]


def blocks(table: Sequence[Sequence[float]], candidates: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the candidates in as few blocks of adjacent layers as possible, with the smallest sum of distances.

    `table` [start][length - 1] is the angular distance over a block, in [0, 1]. Where one block is enough, it is the
    one of Gromov et al. 2024 (arXiv 2403.17887), section 3.
    """
    ends: dict[int, int] = {}  # layer -> end of the run of candidates that contains it
    for _, group in groupby(enumerate(sorted(candidates)), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        ends |= dict.fromkeys(run, run[-1] + 1)

    @cache
    def best(start: int, left: int) -> tuple[int, float, tuple[int, ...]]:
        """Number of blocks, their distance, and the layers, of `left` layers from `start` on."""
        if not left:
            return 0, 0.0, ()
        if start >= len(table):
            return len(table), math.inf, ()
        options = [best(start + 1, left)]
        for length in range(1, min(left, ends.get(start, start) - start) + 1):
            # The block ends before a layer that stays.
            number, distance, layers = best(start + length + 1, left - length)
            cut = tuple(range(start, start + length))
            options.append((number + 1, distance + table[start][length - 1], cut + layers))
        return min(options)

    return best(0, count)[2]


def choose(
    proposals: Iterator[tuple[int, ...]], amount: Amount, perplexity: Callable[[tuple[int, ...]], float] | None
) -> tuple[int, ...]:
    """The layers to cut; `perplexity` is that of the model without some layers.

    Raises:
        UserError: the amount is a rise of perplexity and data is missing, or the first layer exceeds it already.
    """
    if amount.count is not None:
        return next(layers for number, layers in enumerate(proposals, start=1) if number == amount.count)
    assert amount.rise is not None
    if perplexity is None:
        raise UserError("--remove until:... measures perplexity on records: give them with --data")
    chosen: tuple[int, ...] = ()
    whole = perplexity(())
    for layers in proposals:
        rise = perplexity(layers) / whole - 1
        if not rise <= amount.rise:
            if not chosen:
                named = ", ".join(map(str, layers))
                raise UserError(f"no layer can be cut: without layer {named} perplexity rises by {rise:.1%} already")
            break
        chosen = layers
    return chosen
