"""Comparison of two runs on the same records: difference, retention, and their statistical significance.

Scores are given as task -> score of every record, from 0 to 1, higher is better (unlike perplexity), with the same
records in the same order for both runs. A run's value is the mean over tasks of the tasks' means.

Intervals are paired percentile bootstraps: records are resampled with replacement within each task, the same ones for
both runs, so that records that are hard for both do not widen the interval of the difference (Efron and Tibshirani
1993, chapters 8 and 13). Percentile and not BCa: with several tens of records, means of bounded scores have little bias
or skew to correct, and BCa is undefined for runs that differ on no record. With n records per task the interval is
narrower than Student's by about 1 / (2 n) for the divisor, and more below about 20 records, too few for an interval.
Where both runs are correct on every record, the interval has width zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from striate.errors import UserError

TaskScores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """An observed value, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def difference(
    scores: TaskScores, others: TaskScores, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The first run's value minus the other's, as a fraction, with its interval at the confidence `level`.

    The same seed gives the same interval, whatever the order of the tasks and of the records in them.

    Raises:
        UserError: a run has no tasks, or the tasks or their numbers of records differ.
    """
    (value, other), (values, other_values) = _bootstrap(_pair(scores, others), draws, seed)
    return _interval(value - other, values - other_values, level)


def retention(
    scores: TaskScores, reference: TaskScores, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The run's value divided by the reference's, with its interval at the confidence `level`.

    Otherwise as `difference`. The ratio is infinite in a resample in which the reference's value is 0, so the interval
    of a reference that is almost always wrong can be unbounded above.

    Raises:
        UserError: as `difference`, or the reference's value is 0.
    """
    (value, whole), (values, wholes) = _bootstrap(_pair(scores, reference), draws, seed)
    if whole == 0:
        raise UserError("retention needs a reference with a value above 0, found 0")
    ratios = np.divide(values, wholes, out=np.full(draws, np.inf), where=wholes > 0)
    return _interval(value / whole, ratios, level)


def within_noise(interval: Interval) -> bool:
    """Whether the interval of a `difference` contains 0."""
    return interval.low <= 0 <= interval.high


def mcnemar(scores: TaskScores, others: TaskScores) -> float:
    """The p-value, in (0, 1], under the null hypothesis that both runs are equally good.

    McNemar's exact test: each record that only one run gets right is equally likely to be right in either; two-sided,
    twice the smaller tail of Binomial(n, 1/2), 1 when no record differs. Records of all tasks are pooled, so large
    tasks weigh more than in `difference`. For graded scores only the sign of a record's difference counts, which makes
    it the sign test. Source: McNemar 1947; Dietterich 1998, section 3.1.

    Raises:
        UserError: as `difference`.
    """
    signs = np.concatenate([np.sign(one - other) for one, other in _pair(scores, others).values()])
    num_differing = int(np.count_nonzero(signs))
    fewer = min(int((signs > 0).sum()), int((signs < 0).sum()))
    term = tail = 1  # binomial coefficients as integers: no underflow with thousands of records
    for k in range(fewer):
        term = term * (num_differing - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**num_differing)


def _pair(scores: TaskScores, others: TaskScores) -> dict[str, np.ndarray]:
    """The scores of both runs by task [2, N], with the records sorted: sums of floats depend on their order."""
    if not scores or not others:
        raise UserError("runs are compared on their common tasks, found a run without tasks")
    for task in sorted({*scores, *others}):
        numbers = len(scores.get(task, ())), len(others.get(task, ()))
        if numbers[0] != numbers[1] or not numbers[0]:
            counts = f"task {task!r} has {numbers[0]} records in one run and {numbers[1]} in the other"
            raise UserError(f"{counts}: evaluate both on the same records")
    pairs = {task: np.array([scores[task], others[task]], dtype=float) for task in sorted(scores)}
    return {task: pair.take(np.lexsort(pair[::-1]), axis=1) for task, pair in pairs.items()}


def _bootstrap(pairs: Mapping[str, np.ndarray], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of both runs, observed [2] and in every resample [2, draws]."""
    generator = np.random.default_rng(seed)
    means = [_means(task, draws, generator) for task in pairs.values()]
    return np.mean([task.mean(axis=1) for task in pairs.values()], axis=0), np.mean(means, axis=0)


def _means(pairs: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """The means of both runs on one task in every resample [2, draws].

    With few distinct pairs (four, of scores 0 and 1) it is faster to sample the count of each, which is multinomial;
    with more than about one distinct pair per twelve records, to sample the records.
    """
    kinds, counts = np.unique(pairs, axis=1, return_counts=True)
    num = pairs.shape[1]
    if 12 * len(counts) <= num:
        return kinds @ generator.multinomial(num, counts / num, size=draws).T / num
    return np.array([pairs.take(generator.integers(num, size=num), axis=1).mean(axis=1) for _ in range(draws)]).T


def _interval(value: float, resampled: np.ndarray, level: float) -> Interval:
    """Percentile interval, with (1 - level) / 2 of the values on either side; not interpolated, as some may be Inf."""
    ranked, outside = np.sort(resampled), int(len(resampled) * (1 - level) / 2)
    return Interval(float(value), float(ranked[outside]), float(ranked[-1 - outside]))
