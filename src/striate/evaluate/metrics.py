"""How good an answer is: the field's metrics as pure functions, and their means with standard errors.

A metric takes what the model said and the answers that count as right, and gives a score from 0 (wrong) to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from statistics import fmean, stdev

ARTICLES = frozenset(("a", "an", "the"))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction equals one of the answers, both normalised, else 0.

    Normalised as in SQuAD (Rajpurkar et al. 2016, section 6.1): case, ASCII punctuation, articles (a, an,
    the) and the amount of white space do not count. Two departures, since answers here are often short: a
    point or minus sign that belongs to a number stays ("1.5" is not "15"), and an answer that is nothing but
    articles or punctuation ("A", "+") stays as it is.
    """
    return float(_plain(prediction) in map(_plain, answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when one of the answers occurs in the prediction as whole words, else 0.

    Both are normalised as in `exact_match`. For models that answer in sentences. It rewards naming many
    things, so read it beside `exact_match`.
    """
    said = f" {_plain(prediction)} "
    return float(any(f" {_plain(answer)} " in said for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean over leave-one-out subsets of the people's answers of min(1, matches / 3), in [0, 1].

    Source: Antol et al. 2015, as VQA v2 evaluates it: with 10 answers of which m match, m = 0, 1,
    2, 3 gives 0, 0.3, 0.6, 0.9, and from 4 on 1. Both sides are normalised as the benchmark describes (lower
    case, punctuation, number words to digits, articles, missing apostrophes). The released VQA v2 script
    leaves that out where all ten people agree; TextVQA's does not, nor does this. Needs at least 4 answers to
    be able to reach 1.
    """
    said = _vqa_plain(prediction)
    matches = sum(_vqa_plain(answer) == said for answer in answers)
    # Leaving out a matching answer leaves m - 1 matches, and there are m such subsets; the others keep all m.
    without, kept = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (len(answers) - matches) * kept) / len(answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity: the best 1 - NL over the answers, 0 where that is below one half.

    The mean over questions is ANLS. NL is the edit distance over the length of the longer string, case and
    the amount of white space ignored. Source: Biten et al. 2019, equation 1, threshold 0.5. A similarity of
    exactly one half counts, as in the released scorer (in the equation it does not).
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is a number within 5 % of an answer, or equals one that is no number, else 0.

    "12 %" is 0.12 and "1,200" is 1200; anything else that is no number is compared with case ignored. Source:
    Methani et al. 2020 (PlotQA), as ChartQA uses it (Masry et al. 2022, section 5.1). The distance is exact
    (decimal), so 1.05 is within 5 % of 1; an answer of 0 is met by 0 alone.
    """
    return float(any(_within(prediction, answer) for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 when the choice that the model finds likeliest is a right one, else 0.

    `prediction` is the choice whose tokens (with the end of the turn) have the highest summed log-probability
    as the answer, not divided by length: `acc` of lm-evaluation-harness (Gao et al. 2021). Choices are
    compared as they are.
    """
    return float(prediction in answers)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric for metric in (exact_match, contains, vqa_accuracy, anls, relaxed_accuracy, multiple_choice)
}


def mean(scores: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error: sample standard deviation / sqrt(n), None for fewer than two."""
    return fmean(scores), stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> tuple[float, float | None]:
    """exp(mean negative log-likelihood per token) over all records, and its standard error; lower is better.

    `nll`: summed negative log-likelihood of each record, in nats; `num_tokens`: its predicted tokens, > 0.
    The mean is over tokens, so long records weigh more. Standard error: records are the sample, the mean per
    token is a ratio of two sums, and the delta method carries it through ratio and exp (None for fewer than
    two records).
    """
    total = sum(num_tokens)
    per_token = sum(nll) / total
    value, n = math.exp(per_token), len(nll)
    if n < 2:
        return value, None
    # The residuals sum to zero, so their squares over n - 1 are already a sample variance.
    residuals = [loss - per_token * tokens for loss, tokens in zip(nll, num_tokens, strict=True)]
    variance = sum(residual**2 for residual in residuals) / (n - 1)
    return value, value * math.sqrt(n * variance) / total


_MARK = re.compile(r"(?!(?<=\d)\.(?=\d)|-(?=\.?\d))[!-/:-@\[-`{-~]")


def _plain(text: str) -> str:
    text = text.casefold()
    words = (_MARK.sub("", text) or text).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_COUNTS = "zero one two three four five six seven eight nine ten"
_VQA_NUMBERS = {word: str(n) for n, word in enumerate(_VQA_COUNTS.split())} | {"none": "0"}
# The benchmark's list without what never applies after lower-casing (I'm) or restores nothing (let's).
_VQA_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
you'll you're you've
"""
_VQA_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _VQA_APOSTROPHES.split() for at, mark in enumerate(word) if mark == "'"
}


def _vqa_plain(text: str) -> str:
    """Marks go if they stand beside a space or the text has a grouped number (1,000), else become a space."""
    text = " ".join(text.split())
    grouped, bare = re.search(r"\d,\d", text), text
    for mark in _VQA_MARKS:
        bare = bare.replace(mark, "" if grouped or f"{mark} " in text or f" {mark}" in text else " ")
    words = re.sub(r"\.(?!\d)", "", bare).lower().split()
    words = [number for word in words if (number := _VQA_NUMBERS.get(word, word)) not in ARTICLES]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words)


def _similarity(one: str, other: str) -> float:
    one, other = (" ".join(text.lower().split()) for text in (one, other))
    return 1 - _edits(one, other) / max(len(one), len(other), 1)


def _edits(one: str, other: str) -> int:
    """Levenshtein distance, one row of the table at a time."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        corner, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def _within(prediction: str, answer: str) -> bool:
    said, truth = _number(prediction), _number(answer)
    if said is None or truth is None:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(said - truth) <= abs(truth) * Decimal("0.05")


def _number(text: str) -> Decimal | None:
    digits = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    try:
        number = Decimal(digits.removesuffix("%").rstrip())
    except InvalidOperation:
        return None
    if not number.is_finite():  # "nan" and "inf" are words
        return None
    return number / 100 if digits.endswith("%") else number
