"""Two runs on the same records: how far apart they are, how much one keeps of the other, and what chance does.

Scores come as task -> score of every record, from 0 to 1, higher is better (perplexity is no such score), the
same records in the same order for both runs. A run's value is the mean over tasks of the tasks' means.

Intervals are paired percentile bootstraps: records are drawn with replacement within each task, the same ones
for both runs, so that what is hard for both takes no part in the difference (Efron and Tibshirani 1993,
chapters 8 and 13). Percentile and not BCa: means of bounded scores have little bias or skew left to correct
from some tens of records on, and BCa has no value for runs that differ on no record. With n records a task the
interval is narrower than Student's by about 1 / (2 n) for the divisor, and more below some 20 records, which
deserve no interval. What no record shows, no draw shows: where both runs are right about everything, the
interval has no width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from striate.errors import UserError

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """An observed value, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def difference(scores: Scores, others: Scores, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """By how much the first run's value is above the other's, in shares of 1, with the interval of that.

    The same seed gives the same interval, whatever the order of the tasks and of the records in them.

    Raises:
        UserError: no task, or the two do not have the same tasks with as many records.
    """
    observed, drawn = _bootstrap(_paired(scores, others), draws, seed)
    return _interval(observed.real - observed.imag, drawn.real - drawn.imag, level)


def retention(scores: Scores, reference: Scores, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """How much of the reference's value the run keeps: their ratio, 1 for all of it, with the interval of that.

    Otherwise as `difference`. In a draw in which the reference gets nothing right the ratio counts as infinite,
    so the interval of a reference that is almost always wrong is open above.

    Raises:
        UserError: as `difference`, or the reference's value is 0, of which nothing can be kept.
    """
    observed, drawn = _bootstrap(_paired(scores, reference), draws, seed)
    if observed.imag == 0:
        raise UserError("retention needs a reference that is right at least once, found a value of 0")
    ratios = np.full(draws, np.inf)
    np.divide(drawn.real, drawn.imag, out=ratios, where=drawn.imag > 0)
    return _interval(observed.real / observed.imag, ratios, level)


def within_noise(interval: Interval) -> bool:
    """Whether a `difference` may be chance: its interval contains 0."""
    return interval.low <= 0 <= interval.high


def mcnemar(scores: Scores, others: Scores) -> float:
    """The p value, in (0, 1], of a difference like that of these runs when both are equally good.

    McNemar's test in its exact form: of the records that one run gets right and the other wrong, each is as
    likely to favour either; two-sided, twice the smaller tail of Binomial(n, 1/2), 1 when no record differs.
    Records of all tasks are pooled, so large tasks weigh more than they do in `difference`. Graded scores count
    by the sign of their difference alone, which makes it the sign test: a record on which one run is a little
    better weighs as much as one on which it is much better. Source: McNemar 1947; Dietterich 1998, section 3.1.

    Raises:
        UserError: as `difference`.
    """
    signs = np.concatenate([np.sign(pairs.real - pairs.imag) for pairs in _paired(scores, others).values()])
    num_differing = int(np.count_nonzero(signs))
    fewer = min(int((signs > 0).sum()), int((signs < 0).sum()))
    term = tail = 1  # binomial coefficients as whole numbers: no underflow with thousands of records
    for k in range(fewer):
        term = term * (num_differing - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**num_differing)


def _paired(scores: Scores, others: Scores) -> dict[str, np.ndarray]:
    """The scores by task, one complex number a record: the first run's real, the other's imaginary.

    Complex numbers are averaged and sorted like single ones, and pairs cannot come apart. Sorted, since sums of
    floating-point numbers depend on their order.
    """
    if not scores or not others:
        raise UserError("runs are compared by the tasks that both were asked, found a run without any")
    for task in sorted({*scores, *others}):
        numbers = len(scores.get(task, ())), len(others.get(task, ()))
        if numbers[0] != numbers[1] or not numbers[0]:
            found = f"task {task!r} has {numbers[0]} records in one run and {numbers[1]} in the other"
            raise UserError(f"{found}: evaluate both on the same records")
    return {task: np.sort(np.asarray(scores[task]) + 1j * np.asarray(others[task])) for task in sorted(scores)}


def _bootstrap(pairs: Mapping[str, np.ndarray], draws: int, seed: int) -> tuple[complex, np.ndarray]:
    """The values of both runs, as observed and in every draw."""
    generator = np.random.default_rng(seed)
    means = [_means(task, draws, generator) for task in pairs.values()]
    return complex(np.mean([task.mean() for task in pairs.values()])), np.mean(means, axis=0)


def _means(pairs: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """The mean of one task in every draw.

    With few distinct pairs (four, of scores 0 and 1) it is quicker to draw how often each of them occurs, which
    follows a multinomial law. From about one in twelve on, drawing the records themselves is.
    """
    kinds, counts = np.unique(pairs, return_counts=True)
    num = len(pairs)
    if 12 * len(kinds) <= num:
        return generator.multinomial(num, counts / num, size=draws) @ kinds / num
    return np.array([pairs[generator.integers(num, size=num)].mean() for _ in range(draws)])


def _interval(value: float, drawn: np.ndarray, level: float) -> Interval:
    """Between the draws that leave (1 - level) / 2 of all on either side; not interpolated, draws may be infinite."""
    ranked, outside = np.sort(drawn), int(len(drawn) * (1 - level) / 2)
    return Interval(value, float(ranked[outside]), float(ranked[-1 - outside]))
