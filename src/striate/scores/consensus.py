"""What several layer scores say together: a common ranking, how far they agree, how much the sample decides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch

from striate.region import Region, region_by_score
from striate.scores.table import Score, order, rank_correlation

CHOOSING = ("block_influence", "layer_contribution", "gradient")
"""The scores that choose layers before any tuning."""
AGREE, STABLE = 0.3, 0.5
"""Least mean rank correlation of the scores, and share of layers chosen again, for scores to choose layers: our own,
not fitted. Below them `uniform` stays."""
DRAWS = 200
"""Bootstrap samples: the standard error of a share of 0.5 is then 0.035."""


@dataclass(frozen=True)
class Sureness:
    """Mean rank correlation of the scores; share of the layers chosen again from another sample; both may be NaN."""

    agreement: float
    stability: float

    @property
    def trusted(self) -> bool:
        """Whether both are high enough for scores to choose layers."""
        return self.agreement >= AGREE and self.stability >= STABLE

    @property
    def numbers(self) -> str:
        """Both, in words."""
        agreed, stable = (
            "unknown" if math.isnan(value) else f"{value:.2f}" for value in (self.agreement, self.stability)
        )
        return f"rank correlation of the scores {agreed}, {stable} of the layers chosen again from another sample"

    def __str__(self) -> str:
        chosen = "chosen by scores" if self.trusted else "uniform, as the scores do not agree"
        return f"{chosen} ({self.numbers})"


def choose_region(scores: Sequence[Score], size: int | str, *, seed: int = 0) -> tuple[Region, Sureness]:
    """The region of `size` layers (8, 25%) that scores of one model choose, and how sure they are.

    From each of `size` equal stretches of the depth it takes the layer with the best mean rank, where the scores agree
    and another sample of records would choose most layers again; else `uniform`.

    Raises:
        UserError: `size` is not a number of layers of this model.
    """
    depth, choose = len(scores[0].values), partial(_spread, size)
    found = choose(consensus(scores))
    sureness = Sureness(agreement(scores), stability(scores, choose, seed=seed))
    return (found if sureness.trusted else Region.parse(f"uniform:{size}", depth)), sureness


def _spread(size: int | str, ranked: Sequence[int]) -> Region:
    return region_by_score("spread", size, ranked, "consensus")


def consensus(scores: Sequence[Score]) -> list[int]:
    """All layers by their mean rank over the scores, the most important first (Borda count); ties go to the lower
    index."""
    ranks = [{layer: rank for rank, layer in enumerate(order(score))} for score in scores]
    return sorted(range(len(ranks[0])), key=lambda layer: (sum(one[layer] for one in ranks), layer))


def agreement(scores: Sequence[Score]) -> float:
    """Mean rank correlation over all pairs of scores, in [-1, 1]; NaN for a single score, or constant ones."""
    pairs = [rank_correlation(one, other) for one, other in combinations(scores, 2)]
    known = [pair for pair in pairs if not math.isnan(pair)]
    return sum(known) / len(known) if known else math.nan


def stability(scores: Sequence[Score], choose: Callable[[Sequence[int]], Iterable[int]], *, seed: int = 0) -> float:
    """Share of the chosen layers that are chosen again from another sample, in [0, 1]; NaN for fewer than two samples.

    `choose` takes the layers that count from all layers by importance. A bootstrap over records: each draw takes as
    many of them as there are, with replacement, the same for all scores, which have measured them in one order.
    """
    samples = [torch.tensor(score.samples, dtype=torch.float64) for score in scores if score.samples]  # N L each
    number = len(samples[0]) if samples else 0
    if number < 2 or len(samples) < len(scores):
        return math.nan
    chosen = {*choose(consensus(scores))}
    draw = torch.Generator().manual_seed(seed)
    kept = 0
    for _ in range(DRAWS):
        rows = torch.randint(number, (number,), generator=draw)
        resampled = [
            Score(score.name, tuple(values[rows].nanmean(0).tolist()), direction=score.direction)
            for score, values in zip(scores, samples, strict=True)
        ]
        kept += len(chosen & {*choose(consensus(resampled))})
    return kept / (DRAWS * len(chosen))
