"""The field's metrics of an answer as pure functions, and their means with standard errors.

A metric maps a prediction and the correct answers to a score from 0 (wrong) to 1. Metrics that look for a choice in the
prediction also take the question's choices, in the order of their letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from statistics import fmean, stdev
from string import ascii_uppercase

import torch

from striate.scores import likelihood

ARTICLES = frozenset(("a", "an", "the"))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction equals one of the answers, both normalized, else 0.

    Normalized as in SQuAD (Rajpurkar et al. 2016, section 6.1): case, ASCII punctuation, articles (a, an, the) and the
    amount of white space are ignored. Two departures, since answers here are often short: a point or minus sign that
    belongs to a number stays ("1.5" is not "15"), and an answer of only articles or punctuation ("A", "+") is
    unchanged.
    """
    return float(_normalize(prediction) in map(_normalize, answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when one of the answers occurs in the prediction as whole words, else 0.

    Both are normalized as in `exact_match`. For models that answer in sentences. It rewards long lists, so compare it
    with `exact_match`.
    """
    text = f" {_normalize(prediction)} "
    return float(any(f" {_normalize(answer)} " in text for answer in answers))


def share_named(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in the prediction as whole words, in [0, 1].

    For descriptions: each answer is a fact that one should name, normalized as in `exact_match`.
    """
    return fmean(contains(prediction, [answer]) for answer in answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L: the best F1 over the answers of the longest common subsequence of words, in [0, 1].

    For long answers, which single words do not judge: with l words in common, in order, precision is l over the words
    of the prediction and recall l over those of the answer. Case and punctuation are ignored, words are not stemmed.
    Source: Lin 2004, section 3.1, with beta = 1 as the rouge-score package has it.
    """
    return max(_rouge_l(_words(prediction), _words(answer)) for answer in answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean over leave-one-out subsets of the people's answers of min(1, matches / 3), in [0, 1].

    Source: Antol et al. 2015, as VQA v2 evaluates it: with 10 answers of which m match, m = 0, 1,
    2, 3 gives 0, 0.3, 0.6, 0.9, and from 4 on 1. Both sides are normalized as the benchmark describes (lower
    case, punctuation, number words to digits, articles, missing apostrophes). The released VQA v2 script skips the
    normalization where all ten people agree; TextVQA's does not, nor does this. The maximum of 1 needs at least 4
    answers.
    """
    text = _vqa_normalize(prediction)
    matches = sum(_vqa_normalize(answer) == text for answer in answers)
    # Leaving out a matching answer leaves m - 1 matches, and there are m such subsets; the others have all m.
    without, whole = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (len(answers) - matches) * whole) / len(answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalized Levenshtein similarity: the best 1 - NL over the answers, 0 where that is below one half.

    The mean over questions is ANLS. NL is the edit distance over the length of the longer string, case and
    the amount of white space ignored. Source: Biten et al. 2019, equation 1, threshold 0.5. A similarity of
    exactly one half counts, as in the released scorer (in the equation it does not). That scorer takes the length
    before white space is normalized, which differs only for text with more than single spaces.
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is a number within 5 % of an answer, or equals a non-numeric answer, else 0.

    "12 %" is 0.12 and "1,200" is 1200; other texts are compared with case ignored. Source: Methani et al. 2020
    (PlotQA), as ChartQA uses it (Masry et al. 2022, section 5.1). The distance is exact (decimal), so 1.05 is within
    5 % of 1; only 0 matches an answer of 0. Two departures from common scorers, which compare "1,200" and an answer of
    0 as texts: here they are numbers.
    """
    return float(any(_within(prediction, answer) for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 when the model's most likely choice is a correct one, else 0.

    `prediction` is the choice whose tokens (with the end of the turn) have the highest summed log-probability
    as the answer, not divided by length: `acc` of lm-evaluation-harness (Gao et al. 2021). Choices are compared
    without normalization.
    """
    return float(prediction in answers)


def mmmu_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 when a generated answer, parsed like MMMU's scorer does, names a correct choice or value, else 0.

    With `choices`, which the question has to list with their letters: the last "(A)"; else the last " A "; else,
    in more than five words, the last choice that occurs. An answer that names none is wrong; the released scorer
    chooses one at random, which on average scores 1 / number of choices higher for each of these.

    Without choices: the text after the last "is ", "answer ", "so " and similar in each line, else the whole answer,
    and every number in these. A number is correct when it equals an answer to two decimals, with "1,200" as 1200; a
    text when an answer occurs in it, case ignored. Source: Yue et al. 2024 (MMMU), and its released eval_utils.py.
    """
    if choices:
        return float(_mmmu_choice(prediction, choices) in answers)
    correct = {value for answer in answers for value in _mmmu_values(answer)}
    texts = [value for value in correct if isinstance(value, str)]
    parsed = _mmmu_parse(prediction)
    return float(any(any(text in one for text in texts) if isinstance(one, str) else one in correct for one in parsed))


def scienceqa_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """1 when a generated answer names the letter of a correct choice in a form that ScienceQA's scorers accept, else 0.

    The forms: "B" alone, "B. " followed by any text, or "The answer is B." exactly once, with any character in place
    of the period. All else is wrong, also "B." and "(B)". Source: Lu et al. 2022, as LLaVA's released
    eval_science_qa.py scores it (the data set's own scorer chooses at random where this finds no letter).
    """
    letters = ascii_uppercase[: max(5, len(choices))]  # the scorer looks for A to E, however few choices there are
    matches = re.findall("The answer is ([A-Z]).", prediction)
    letter = matches[0] if len(matches) == 1 else ""
    if prediction in tuple(letters) or (prediction[:1] in tuple(letters) and prediction[1:3] == ". "):
        letter = prediction[0]
    return float(dict(zip(letters, choices, strict=False)).get(letter) in answers)


def _ignore_choices(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda prediction, answers, choices=(): metric(prediction, answers)


Metric = Callable[..., float]
METRICS: dict[str, Metric] = {
    metric.__name__: _ignore_choices(metric)
    for metric in (exact_match, contains, share_named, rouge_l, vqa_accuracy, anls, relaxed_accuracy, multiple_choice)
} | {metric.__name__: metric for metric in (mmmu_accuracy, scienceqa_accuracy)}
"""Every metric by its name, as a function of the prediction, the answers and the choices."""


def mean(scores: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error: sample standard deviation / sqrt(n), None for fewer than two."""
    return fmean(scores), stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> tuple[float, float | None]:
    """exp(mean negative log-likelihood per token) over all records, and its standard error; lower is better.

    `nll`: summed negative log-likelihood of each record, in nats; `num_tokens`: its predicted tokens, > 0. The standard
    error is None for fewer than two records; see `scores.likelihood.perplexity`.
    """
    value, stderr = likelihood.perplexity(torch.tensor(nll, dtype=torch.float64), torch.tensor(num_tokens))
    return float(value), float(stderr) if len(nll) > 1 else None


_MARK = re.compile(r"(?!(?<=\d)\.(?=\d)|-(?=\.?\d))[!-/:-@\[-`{-~]")


def _normalize(text: str) -> str:
    text = text.casefold()
    words = (_MARK.sub("", text) or text).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _rouge_l(words: Sequence[str], others: Sequence[str]) -> float:
    """2 l / (m + n), which is the F1 of l / m and l / n."""
    lengths = [0] * (len(others) + 1)  # of the common subsequence with the words so far, by prefix of the others
    for word in words:
        before = 0  # the length one word and one prefix earlier
        for place, other in enumerate(others, start=1):
            longest = before + 1 if word == other else max(lengths[place - 1], lengths[place])
            before, lengths[place] = lengths[place], longest
    return 2 * lengths[-1] / (len(words) + len(others)) if lengths[-1] else 0.0


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


def _vqa_normalize(text: str) -> str:
    """Remove marks next to a space, or in a text with a grouped number (1,000); replace others by a space."""
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
    number, truth = _number(prediction), _number(answer)
    if number is None or truth is None:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(number - truth) <= abs(truth) * Decimal("0.05")


def _number(text: str) -> Decimal | None:
    digits = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    try:
        number = Decimal(digits.removesuffix("%").rstrip())
    except InvalidOperation:
        return None
    if not number.is_finite():  # "nan" and "inf" are words
        return None
    return number / 100 if digits.endswith("%") else number


def _mmmu_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice mentioned last, in the first of three forms in which any choice is mentioned."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[: len(choices)]
    forms = [(text, [f"({letter})" for letter in letters]), (text, [f" {letter} " for letter in letters])]
    if len(text.split()) > 5:
        forms.append((text.lower(), [choice.lower() for choice in choices]))
    for searched, mentions in forms:
        positions = [searched.rfind(mention) for mention in mentions]
        if max(positions) >= 0:
            return choices[positions.index(max(positions))]
    return None


_MMMU_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,200
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1200.0
)


def _mmmu_parse(prediction: str) -> set[str | float]:
    """The values of the parts of an open answer that state a result."""
    whole = prediction.strip().strip(".").lower()
    lines, results = whole.split("\n"), []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for cue in (*_MMMU_CUES, *(("=",) if number == len(lines) else ())):
            tail = line.rpartition(cue)[2].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in tuple(",.!?;:'"):
            results.append(shortest)
    results = results or [whole]
    numbers = [number for part in results for form in _MMMU_NUMBERS for number in form.findall(part)]
    return {value for part in (*results, *numbers) for value in _mmmu_values(part)}


def _mmmu_values(text: str) -> list[str | float]:
    """A number to two decimals; else the text in lower case, or a single letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
