"""How good an answer is: the field's metrics as pure functions, and their means with standard errors.

A metric takes what the model said and the answers that count as right, and gives a score from 0 (wrong) to 1.
Those that look for a choice in what was said take the question's choices as well, in the order of their letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from statistics import fmean, stdev
from string import ascii_uppercase

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
    exactly one half counts, as in the released scorer (in the equation it does not). That scorer takes the length
    before white space is put in order, which tells only where there is more of it than single spaces.
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is a number within 5 % of an answer, or equals one that is no number, else 0.

    "12 %" is 0.12 and "1,200" is 1200; anything else that is no number is compared with case ignored. Source:
    Methani et al. 2020 (PlotQA), as ChartQA uses it (Masry et al. 2022, section 5.1). The distance is exact
    (decimal), so 1.05 is within 5 % of 1; an answer of 0 is met by 0 alone. Two departures from the scorers in
    use, which compare "1,200" and an answer of 0 as texts: here they are numbers.
    """
    return float(any(_within(prediction, answer) for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 when the choice that the model finds likeliest is a right one, else 0.

    `prediction` is the choice whose tokens (with the end of the turn) have the highest summed log-probability
    as the answer, not divided by length: `acc` of lm-evaluation-harness (Gao et al. 2021). Choices are
    compared as they are.
    """
    return float(prediction in answers)


def mmmu_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 when a generated answer, read as MMMU's scorer reads it, names a right choice or a right value, else 0.

    With `choices`, which the question has to list with their letters: the last "(A)"; else the last " A "; else,
    of more than five words, the last choice that is quoted. An answer that names none is wrong; the released
    scorer draws a choice at random, which on average gives 1 / number of choices more for each of these.

    Without: what follows the last "is ", "answer ", "so " and the like in each line, or else all that was said,
    and every number therein. A number is right when it equals an answer to two decimals, "1,200" being 1200; a
    text when an answer occurs in it, case ignored. Source: Yue et al. 2024 (MMMU), and its released eval_utils.py.
    """
    if choices:
        return float(_mmmu_choice(prediction, choices) in answers)
    right = {value for answer in answers for value in _mmmu_values(answer)}
    texts = [value for value in right if isinstance(value, str)]
    said = _mmmu_said(prediction)
    return float(any(any(text in one for text in texts) if isinstance(one, str) else one in right for one in said))


def scienceqa_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """1 when a generated answer names the letter of a right choice in a form that ScienceQA's scorers read, else 0.

    The forms: "B" alone, "B. " with anything behind it, or "The answer is B." once, in which any character will
    do for the full stop but none will not. All else is wrong, "B." and "(B)" too. Source: Lu et al. 2022, as
    LLaVA's released eval_science_qa.py scores it (the data set's own draws a choice at random where this finds none).
    """
    letters = ascii_uppercase[: max(5, len(choices))]  # the scorer looks for A to E, however few choices there are
    stated = re.findall("The answer is ([A-Z]).", prediction)
    letter = stated[0] if len(stated) == 1 else ""
    if prediction in tuple(letters) or (prediction[:1] in tuple(letters) and prediction[1:3] == ". "):
        letter = prediction[0]
    return float(dict(zip(letters, choices, strict=False)).get(letter) in answers)


def _of_answers(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda prediction, answers, choices=(): metric(prediction, answers)


Metric = Callable[..., float]
METRICS: dict[str, Metric] = {
    metric.__name__: _of_answers(metric)
    for metric in (exact_match, contains, vqa_accuracy, anls, relaxed_accuracy, multiple_choice)
} | {metric.__name__: metric for metric in (mmmu_accuracy, scienceqa_accuracy)}
"""Every metric by its name, to be called with what was said, the answers and the choices."""


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


def _mmmu_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that is mentioned last in the first of three ways in which any is."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[: len(choices)]
    ways = [(text, [f"({letter})" for letter in letters]), (text, [f" {letter} " for letter in letters])]
    if len(text.split()) > 5:
        ways.append((text.lower(), [choice.lower() for choice in choices]))
    for said, mentions in ways:
        places = [said.rfind(mention) for mention in mentions]
        if max(places) >= 0:
            return choices[places.index(max(places))]
    return None


_MMMU_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,200
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1200.0
)


def _mmmu_said(prediction: str) -> set[str | float]:
    """What the parts of an open answer that state a result come to."""
    whole = prediction.strip().strip(".").lower()
    lines, stated = whole.split("\n"), []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for cue in (*_MMMU_CUES, *(("=",) if number == len(lines) else ())):
            tail = line.rpartition(cue)[2].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in tuple(",.!?;:'"):
            stated.append(shortest)
    stated = stated or [whole]
    numbers = [number for part in stated for form in _MMMU_NUMBERS for number in form.findall(part)]
    return {value for part in (*stated, *numbers) for value in _mmmu_values(part)}


def _mmmu_values(text: str) -> list[str | float]:
    """A number to two decimals; else the text in lower case, a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
