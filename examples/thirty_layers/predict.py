"""Which score of the start, measured before any tuning, says how well a region will see once it is tuned?

Each region of a quarter of the layers gets one number a score: the mean rank of its layers by that score (a score's own
values will not do: layer 0 is often ten times the rest). Beside the scores stands the longest gap, the most layers in a
row that are not tuned, which needs no measurement. Compared with what the regions see by Spearman's rank correlation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from striate.scores.table import Score, Scores, order, rank_correlation

SCORES = Path(__file__).parents[2] / "research" / "results" / "thirty_scores.json"  # of the start, by `study.py`
DRAWS = 2000
HEAD = ("of the start", "seed", "regions", "rank correlation with visual (95 %)")


def rows(regions: Sequence[dict[str, Any]], scores: Scores) -> list[list[str]]:
    """A row for each score, and one for the longest gap, the best predictor first; `regions` are runs of one seed."""
    seen = [run["visual"] for run in regions]
    predictions = {"longest gap": [-longest_gap(run["layers"], scores.depth) for run in regions]}
    for name, score in scores.scores.items():
        ranks = {layer: -rank for rank, layer in enumerate(order(score))}
        predictions[name] = [sum(ranks[layer] for layer in run["layers"]) for run in regions]
    found = {name: correlation(predicted, seen) for name, predicted in predictions.items()}
    seed = str(regions[0]["options"]["seed"])
    return [
        [name, seed, str(len(regions)), f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"]
        for name, (value, low, high) in sorted(found.items(), key=lambda one: -one[1][0])
    ]


def longest_gap(layers: Iterable[int], depth: int) -> int:
    """The most layers in a row that are not among these."""
    ends = [-1, *sorted(layers), depth]
    return max(after - before - 1 for before, after in pairwise(ends))


def correlation(predicted: Sequence[float], seen: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's rank correlation and its 95 % interval, by a bootstrap over the regions (percentiles)."""
    generator, number, drawn = np.random.default_rng(0), len(seen), []
    for _ in range(DRAWS):
        rows = generator.integers(number, size=number)
        drawn.append(_spearman([predicted[row] for row in rows], [seen[row] for row in rows]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return _spearman(predicted, seen), float(low), float(high)


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """NaN where all are equal."""
    return rank_correlation(Score("predicted", tuple(one)), Score("seen", tuple(other)))
