"""Metrics against values worked by hand from their published definitions."""

from __future__ import annotations

import math

import pytest

from striate.evaluate import metrics
from striate.evaluate.metrics import (
    anls,
    contains,
    exact_match,
    mean,
    perplexity,
    relaxed_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("A red  Cat.", "the red cat", 1),
        ("it's", "its", 1),
        ("1,000", "1000", 1),
        ("STRASSE", "straße", 1),
        ("1.5", "15", 0),
        ("-3", "3", 0),
        ("-3", "-3.", 1),
        ("the", "a", 0),  # normalising both away would make them equal
        ("A.", "a", 1),
        ("+", "-", 0),
        ("", "cat", 0),
        ("red cat", "cat", 0),
    ],
)
def test_exact_match(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, [answer]) == score
    assert exact_match(prediction, ["zebra", answer]) == score


def test_contains_wants_whole_words() -> None:
    assert contains("It is the big, red cat.", ["dog", "A red cat"]) == 1
    assert contains("concatenate", ["cat"]) == 0
    assert contains("-3.5 degrees", ["3.5"]) == 0


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_ten_leave_one_out_subsets(matches: int, score: float) -> None:
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("yes", answers) == pytest.approx(score)
    subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
    assert score == pytest.approx(sum(min(1, nine.count("yes") / 3) for nine in subsets) / 10)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("an apple, and a pear", "apple and pear"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("black/white", "black white"),  # no space beside the mark: it becomes one
        ("t-shirt", "t shirt"),
        ("red -blue", "red blue"),  # a space beside the mark: it goes
        ("1,000", "1000"),
        ("$1,000 (left)", "$1000 left"),
        ("3.5", "3.5"),
        ("10:30", "10:30"),
        ("yes\n", "yes"),
    ],
)
def test_vqa_normalisation(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, [answer] * 10) == 1


@pytest.mark.parametrize(
    ("prediction", "answer"), [("3.5", "35"), ("10:30", "1030"), ("lets", "let's"), ("well", "we'll")]
)
def test_vqa_normalisation_leaves_alone(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, [answer] * 10) == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Coca  Cola", ["coca cola"], 1),
        ("cola", ["colas"], 1 - 1 / 5),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("abcd", ["ab"], 0.5),
        ("abcde", ["ab"], 0),
        ("", ["ab"], 0),
        ("ab", [""], 0),
        ("", [""], 1),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("1.05", "1", 1),  # 0.05000000000000004 apart in binary
        ("105.01", "100", 0),
        ("-10", "10", 0),
        ("-10.5", "-10", 1),
        ("12%", "0.12", 1),
        ("12 %", "12.5%", 1),
        ("12%", "12", 0),
        ("1,200", "1200", 1),
        ("1,2", "12", 0),  # no thousands separator
        ("1,234,567.0", "1234567", 1),
        ("0", "0.0", 1),
        ("0.001", "0", 0),
        ("Blue ", "blue", 1),
        ("blue", "blues", 0),
        ("nan", "NaN", 1),
        ("inf", "1", 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score


def test_every_metric_is_found_by_its_name() -> None:
    assert list(metrics.METRICS) == [
        "exact_match",
        "contains",
        "vqa_accuracy",
        "anls",
        "relaxed_accuracy",
        "multiple_choice",
    ]
    assert metrics.METRICS["multiple_choice"]("a cat", ["a cat"]) == 1


def test_mean_and_its_standard_error() -> None:
    value, stderr = mean([1, 0, 1, 1])
    assert value == 0.75
    assert stderr == pytest.approx(0.25)  # deviations squared sum to 3/4; sqrt(3/4 / 3) / sqrt(4)
    assert mean([0.5]) == (0.5, None)


def test_perplexity_weighs_tokens_and_carries_the_error_through_exp() -> None:
    value, stderr = perplexity([2.0, 12.0, 6.0], [2, 4, 4])
    assert value == pytest.approx(math.exp(2))
    # Residuals L - 2 T: -2, 4, -2; sample variance 24 / 2 = 12; mean length 10 / 3.
    assert stderr == pytest.approx(math.exp(2) * math.sqrt(12 / 3) / (10 / 3))
    assert perplexity([3.0], [3]) == (pytest.approx(math.e), None)
    # Equal lengths reduce to the plain standard error of the mean, times the value.
    value, stderr = perplexity([1.0, 2.0, 4.0], [1, 1, 1])
    assert stderr == pytest.approx(value * mean([1.0, 2.0, 4.0])[1])
