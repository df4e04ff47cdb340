"""Differences between runs against values worked by hand, against scipy, and against what chance really does."""

from __future__ import annotations

from math import comb, inf
from typing import Any

import numpy as np
import pytest

from striate.errors import UserError
from striate.evaluation.statistics import Interval, difference, mcnemar, retention, within_noise

GENERATOR_SEED = 7


def skilled(generator: np.random.Generator, num: int, *, share: float = 0.7, other: float = 0.7) -> tuple[Any, Any]:
    """0/1 scores of two runs on records of one difficulty each: what one finds hard, the other does too.

    The shares that they get right are expected to be `share` and `other`, to 0.0001: difficulties are uniform.
    """
    hard = generator.random(num)
    noise = generator.normal(0, 0.1, (2, num))
    return (hard + noise[0] < share).astype(float), (hard + noise[1] < other).astype(float)


def test_the_value_is_the_mean_of_the_tasks_means() -> None:
    scores = {"a": [1, 1, 0, 0], "b": [1]}  # 0.5 and 1, however many records
    others = {"b": [0.5], "a": [1, 0, 0, 0]}  # 0.25 and 0.5
    assert difference(scores, others).value == pytest.approx(0.75 - 0.375)
    assert retention(scores, others).value == pytest.approx(2)


def test_every_possible_draw_of_two_records_by_hand() -> None:
    # Draws of (1, 0) against (0, 0): both first 1/4, mixed 1/2, both second 1/4: a mean of 1, 1/2 or 0.
    scores, others = {"a": [1, 0]}, {"a": [0, 0]}
    assert difference(scores, others, level=0.9) == Interval(0.5, 0.0, 1.0)
    assert difference(scores, others, level=0.4) == Interval(0.5, 0.5, 0.5)  # 0.3 on either side lie in the half


def test_records_are_sampled_for_both_runs_at_once() -> None:
    scores = {"a": [0.9, 0.1, 0.5, 0.3] * 10}
    shifted = {"a": [score + 0.05 for score in scores["a"]]}
    found = difference(shifted, scores)
    assert (found.low, found.high) == (pytest.approx(0.05), pytest.approx(0.05))
    assert not within_noise(found)
    assert retention(scores, scores) == Interval(1, 1, 1)


@pytest.mark.parametrize("graded", [False, True])
def test_neither_order_nor_call_matters(graded: bool) -> None:
    generator = np.random.default_rng(GENERATOR_SEED)
    draw = (lambda n: generator.random(n)) if graded else (lambda n: generator.integers(2, size=n))
    scores, others = ({"a": draw(50), "b": draw(90)} for _ in range(2))
    place = generator.permutation(50)
    turned = [{"b": one["b"].tolist(), "a": one["a"][place].tolist()} for one in (scores, others)]
    for statistic in (difference, retention):
        assert statistic(scores, others) == statistic(scores, others) == statistic(*turned)
        assert statistic(scores, others) != statistic(scores, others, seed=1)


@pytest.mark.parametrize("graded", [False, True])  # few distinct pairs are sampled by number, others one by one
@pytest.mark.parametrize("statistic", [difference, retention])
def test_the_interval_is_scipys(statistic: Any, graded: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(GENERATOR_SEED)
    scores, others = skilled(generator, 300, other=0.6)
    if graded:
        scores, others = scores * 0.9 + 0.1 * generator.random(300), others * 0.9
    ours = statistic({"a": scores}, {"a": others}, draws=20_000)

    def whole(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        means = one.mean(axis=axis), other.mean(axis=axis)
        return means[0] - means[1] if statistic is difference else means[0] / means[1]

    theirs = stats.bootstrap(
        (scores, others), whole, paired=True, vectorized=True, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(1), batch=1000,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    # An end of 20,000 draws has a Monte-Carlo error of about 0.5 % of the width.
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_an_interval_of_95_percent_covers_the_truth_95_times_in_100() -> None:
    generator = np.random.default_rng(GENERATOR_SEED)
    difference_hits, retention_hits, trials = 0, 0, 600
    for _ in range(trials):
        pairs = [skilled(generator, 150, other=0.65) for _ in range(2)]
        scores, others = ({str(n): pair[run] for n, pair in enumerate(pairs)} for run in range(2))
        found, kept = (statistic(scores, others, draws=400) for statistic in (difference, retention))
        difference_hits += found.low <= 0.7 - 0.65 <= found.high
        retention_hits += kept.low <= 0.7 / 0.65 <= kept.high
    # Three standard errors of a share of 0.95 in 600 trials are 0.027.
    assert difference_hits / trials == pytest.approx(0.95, abs=0.027)
    assert retention_hits / trials == pytest.approx(0.95, abs=0.027)


def test_equal_runs_differ_significantly_about_one_time_in_twenty() -> None:
    generator = np.random.default_rng(GENERATOR_SEED)
    found = [skilled(generator, 300) for _ in range(400)]
    noise = [within_noise(difference({"a": one}, {"a": other}, draws=400)) for one, other in found]
    assert np.mean(noise) == pytest.approx(0.95, abs=0.033)
    exact = [mcnemar({"a": one}, {"a": other}) > 0.05 for one, other in found]
    assert np.mean(exact) >= 0.95 - 0.033  # a discrete test errs on the cautious side


def test_retention_of_a_reference_that_is_almost_always_wrong() -> None:
    found = retention({"a": [1, 1, 0]}, {"a": [1, 0, 0]})
    assert (found.value, found.high) == (2, inf)  # 8 of 27 draws miss the record that the reference gets right
    assert retention({"a": [0, 0]}, {"a": [1, 1]}) == Interval(0, 0, 0)
    with pytest.raises(UserError, match="a reference with a value above 0, found 0"):
        retention({"a": [1]}, {"a": [0]})


@pytest.mark.parametrize(
    ("interval", "noise"),
    [(Interval(0.1, -0.1, 0.3), True), (Interval(0, 0, 0), True), (Interval(0.1, 0, 0.3), True),
     (Interval(0.1, 0.01, 0.3), False), (Interval(-0.1, -0.2, -0.01), False)],
)  # fmt: skip
def test_within_noise(interval: Interval, noise: bool) -> None:
    assert within_noise(interval) is noise


def discordant(better: int, worse: int, same: int = 5) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Scores that differ on `better + worse` records, spread over two tasks."""
    scores, others = [1.0] * better + [0.0] * (worse + same), [0.0] * better + [1.0] * worse + [0.0] * same
    return {"a": scores[::2], "b": scores[1::2]}, {"a": others[::2], "b": others[1::2]}


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),  # 2 * 1/2
        (3, 3, 1),
        (5, 0, 1 / 16),  # 2 * 1/32
        (1, 7, 2 * (1 + 8) / 256),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    assert mcnemar(*discordant(better, worse)) == pytest.approx(p)


def test_mcnemar_is_the_binomial_test() -> None:
    test = pytest.importorskip("scipy.stats").binomtest
    for better, worse in [(4, 9), (120, 90), (2600, 2400), (0, 1200)]:
        assert mcnemar(*discordant(better, worse)) == pytest.approx(test(better, better + worse).pvalue, rel=1e-9)


def test_mcnemar_of_thousands_of_records_does_not_underflow() -> None:
    tail = sum(comb(3000, k) for k in range(1401))
    assert mcnemar(*discordant(1400, 1600)) == pytest.approx(2 * tail / 2**3000)


def test_graded_scores_count_by_the_sign_of_their_difference() -> None:
    assert mcnemar({"a": [0.9, 0.6, 0.3, 1]}, {"a": [0.8, 0.1, 0.2, 1]}) == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("scores", "others", "message"),
    [
        ({}, {}, "found a run without tasks"),
        ({"a": [1, 0]}, {"a": [1]}, "task 'a' has 2 records in one run and 1 in the other: evaluate both on the same"),
        ({"a": [1], "b": [1]}, {"a": [1]}, "task 'b' has 1 records in one run and 0 in the other"),
        ({"a": []}, {"a": []}, "task 'a' has 0 records"),
    ],
)
def test_runs_with_different_questions(scores: Any, others: Any, message: str) -> None:
    for statistic in (difference, retention, mcnemar):
        with pytest.raises(UserError, match=message):
            statistic(scores, others)
