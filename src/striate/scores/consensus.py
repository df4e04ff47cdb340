"""What several layer scores say together: a common ranking, how far they agree, how much the sample decides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import torch

from striate.scores.table import Score, order, rank_correlation

DRAWS = 200
"""Bootstrap samples: the standard error of a share of 0.5 is then 0.035."""


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
