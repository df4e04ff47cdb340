"""Metrics against values worked by hand from their published definitions."""

from __future__ import annotations

import math

import pytest

from striate.evaluation import metrics
from striate.evaluation.metrics import (
    anls,
    contains,
    exact_match,
    mean,
    mmmu_accuracy,
    perplexity,
    relaxed_accuracy,
    rouge_l,
    scienceqa_accuracy,
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
        ("the", "a", 0),  # normalizing both away would make them equal
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


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The cat sat.", "the CAT sat", 1),
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("a red cat", "a big red cat on a mat", 2 * 3 / (3 + 7)),
        ("no", "a cat", 0),
        ("", "a cat", 0),
        ("...", "...", 0),
    ],
)
def test_rouge_l(prediction: str, answer: str, score: float) -> None:
    assert rouge_l(prediction, [answer]) == pytest.approx(score)
    assert rouge_l(prediction, ["zebra", answer]) == pytest.approx(score)
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert scorer.score(answer, prediction)["rougeL"].fmeasure == pytest.approx(score)


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
        ("The U.S.", "us"),
        ("isnt a dog's", "isn't dog's"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("it's 1.5.", "it's 1.5"),
    ],
)
def test_vqa_normalization(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, [answer] * 10) == 1


@pytest.mark.parametrize(
    ("prediction", "answer"), [("3.5", "35"), ("10:30", "1030"), ("lets", "let's"), ("well", "we'll"), ("50%", "50")]
)
def test_vqa_normalization_leaves_alone(prediction: str, answer: str) -> None:
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
        ("Straße", ["straße"], 1),
        ("12:30 pm", ["12.30 PM"], 1 - 1 / 8),
        ("the total is 12", ["12"], 0),
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
        (" 7 ", "7.2", 1),
        ("about 100", "100", 0),  # a number, not a sentence with one
        ("1e2", "100", 1),
        ("-12%", "-0.12", 1),
        ("$5", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score


CHOICES = ("a red cat", "a dog", "the blue bird", "dog")


# Worked by hand along the path of the released scorer: marks stripped from the ends, then three kinds of mentions.
@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B.", "B"),
        ("The answer is B", "B"),
        ("The answer is (D), not (A) or E", "A"),  # brackets first, and the last of them
        ("A or maybe B ?", "B"),
        ("C because (A", "C"),  # no closing bracket
        ("A. a red cat", None),  # "A." is neither " A " nor brackets, and four words are too few to quote
        ("It must be a red cat I think", "A"),
        ("Not a dog but A RED CAT, surely", "A"),  # case ignored, the last mention
        ("I think I can see a dog there", "D"),  # "dog" begins behind "a dog", and where a mention begins counts
        ("the blue bird", None),  # five words or fewer are not searched for choices
        ("b", None),
        ("E", None),
        ("", None),
        ("'C'", "C"),
    ],
)
def test_mmmu_choice(prediction: str, chosen: str | None) -> None:
    right = [mmmu_accuracy(prediction, [choice], CHOICES) for choice in CHOICES]
    assert right == [float(letter == chosen) for letter in "ABCD"]


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("12", "12", 1),
        ("12.004", "12", 1),  # two decimals
        ("12.006", "12", 0),
        ("1,200", "1200", 1),
        ("The answer is 1,200 dollars.", "1200", 1),
        ("so it is -3.5 degrees", "-3.5", 1),
        ("-3.5", "3.5", 0),
        ("1.2e3", "1200", 1),
        ("x = 4, so y = 7", "7", 1),
        ("x = 4, so y = 7", "4", 0),  # "= 7" is the shortest ending
        ("x = 4\nI do not know", "4", 1),  # "=" is not a cue in the first line: all is taken, with the number in it
        ("the result is 5\nthus 6", "5", 1),  # every line counts
        ("24/7", "7", 1),
        ("The capital is Paris", "paris", 1),
        ("Paris", "The capital is Paris", 0),
        ("Parisian cafes", "paris", 1),  # within a word
        ("a", "a", 1),
        ("cat", "a", 0),  # a single letter has to stand beside a space
        ("it is x y", "x", 1),
        ("12", "about 12", 0),
        ("the answer is ?", "the answer is ?", 1),  # nothing but a mark behind the cue: all that was said
        ("", "cat", 0),
    ],
)
def test_mmmu_open_answer(prediction: str, answer: str, score: float) -> None:
    assert mmmu_accuracy(prediction, ["zebra", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("B.", None),
        ("(B)", None),
        ("b", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),  # a character has to follow
        ("The answer is C, of course", "C"),
        ("The answer is A. No. The answer is B.", None),  # once
        ("A. The answer is B.", "A"),  # what it begins with comes first
        ("1. The answer is B.", "B"),
        ("E. The answer is B.", None),  # E is a letter, of no choice
        ("the answer is B.", None),
        ("a dog", None),
        ("", None),
    ],
)
def test_scienceqa(prediction: str, chosen: str | None) -> None:
    right = [scienceqa_accuracy(prediction, [choice], CHOICES) for choice in CHOICES]
    assert right == [float(letter == chosen) for letter in "ABCD"]


def test_every_metric_is_found_by_its_name() -> None:
    assert list(metrics.METRICS) == [
        "exact_match",
        "contains",
        "share_named",
        "rouge_l",
        "vqa_accuracy",
        "anls",
        "relaxed_accuracy",
        "multiple_choice",
        "mmmu_accuracy",
        "scienceqa_accuracy",
    ]
    for name, metric in metrics.METRICS.items():
        said = "B" if name in ("mmmu_accuracy", "scienceqa_accuracy") else "a cat"
        assert metric(said, ["a cat"] * 4, ["a dog", "a cat"]) == 1
    assert metrics.METRICS["mmmu_accuracy"]("a cat", ["cat"]) == 1


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
