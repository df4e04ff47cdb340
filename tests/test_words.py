"""The words of the project are the words of the field: no private terms, American spelling.

python tests/test_words.py src      # every place as file:line: word -> what the field says
python tests/test_words.py          # the same for all of `CHECKED`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHECKED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "src")
SUFFIXES = {".py", ".md", ".css", ".js", ".jinja", ".html"}

# What is not to be said, and what the field says. Case does not count; a letter on either side makes it another word,
# an underscore does not, so that `put_back` is found and `input_background` is not.
PRIVATE = {
    r"(is|are|as|was) no numbers?|numbers that are none": "NaN or Inf; non-finite",
    r"computed[ _]again": "recomputed; activation checkpointing",
    r"short[ _]?cuts?": "fast path; optimization",
    r"in[ _]full": "full fine-tuning",
    r"bad[ _]days?": "fault tolerance; fault injection",
    r"strangers?": "untrusted checkpoint",
    r"spoil(s|t|ed|ing)?": "corrupted",
    r"foret(old|ells?|elling)": "predicted, predicts",
    r"sketch(ed|es)?|without numbers": "meta model, meta tensors",
    r"units for (bfloat16|bf16|it|them)": "native bfloat16 support",
    r"(matrix|large|big) products?": "matmuls, GEMMs",
    r"eyes?|sight": "vision-language model; visual accuracy",
    r"turns? (the )?(hidden )?states?": "cosine distance between a layer's input and output",
    r"pulls? at": "gradient norm",
    r"puts?[ _]back|putting[ _]back": "revert, reverted",
    r"can(not)? be had": "is (not) supported",
    r"hoped[ _]for": "target",
    r"inexact": "approximate; approximation",
    r"pictures?": "image",
    r"(?<!american )spellings?": "format",
    r"(?<![.])(?<!heat )strips?(?![(\w])": "heat strip",
    r"goes?[ _]along|stand-ins?": "dummy batch; padding batch",
    r"content of .{1,30} is another": "the data has changed",
    r"(same|one|of a) launch": "process group",
    r"half a surrogate": "lone surrogate (invalid Unicode)",
    r"(?<!there )(is|are|was) no (?!longer|more|less|fewer|other|better|worse|different|use|need|way|effect)[a-z]+":
        "is not a ...",
    r"mend(s|ed|ing)?": "fix",
    r"comes? of (it|this)|came of (it|this)": "the result",
    r"(where to|on what|of what|is that)\?": "state the fact and the fix, do not ask",
    r"told": "log, logged; say what happened",
    r"drawn": "sampled (records); plotted (figures)",
    r"def _?(told|said|asked|found|drawn|proven|settled|gathered|planned|healed|seen|kept|given|shown|spelt)":
        "a function is a verb: log, sample, verify, gather, plan",
    r"(numbers?|lines?|values?|files?|folders?|records?|tokens?|bytes|samples?|layers?|GPUs?|pass|passes|TFLOPs?|FLOPs|"
    r"[MG]i?B|ms|s) an? (layer|step|record|sample|second|pass|batch|cell|seed|token|task|kind|GPU|process|parameter|"
    r"image|question|page|verb)": "per: one value per layer, seconds per step",
}  # fmt: skip
BRITISH = {
    r"(optim|quant|normal|initial|serial|token|general|regular|summar|recogn|organ|visual|parameter|minim|maxim|material|"
    r"special|util|synchron|prior|categor|vector|custom|emphas|factor|standard|modern|character|local|final)is"
    r"(e|ed|er|ers|es|ing|ation|ations)": "-ize",
    r"colour\w*|behaviours?|neighbours?\w*|favour\w*|flavour\w*|honour\w*|labour": "-or",
    r"centred?|metres?|fibres?|grey|licence|defence|artefacts?|catalogues?|programmes?|analys(e|ed|es|er|ing)|judgement":
        "center, meter, gray, license, artifact, analyze",
    r"(label|model|travel|level|total|signal)l(ed|ing|er)": "labeled, modeling",
    r"learnt|spelt|burnt|whilst|amongst": "learned, spelled, while, among",
}  # fmt: skip
SAYS = PRIVATE | BRITISH
WORDS = [
    (re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE), says) for pattern, says in SAYS.items()
]
# The models of the demo were trained on questions with this word.
TRAINED = ("src/striate/studies/demo/world.py", "src/striate/studies/demo/models/README.md"), "colour"
# Tables that programs write are checked where their text comes from.
GENERATED = re.compile(r"<!-- table.*?<!-- end of table -->", re.DOTALL)


def places(name: str) -> Iterator[tuple[Path, int, str, str]]:
    """Every place under a file or folder of the project: the file, the line, what it says, what the field says."""
    top = ROOT / name
    for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
        if file.suffix in SUFFIXES:
            text = GENERATED.sub(lambda table: "\n" * table.group().count("\n"), file.read_text(encoding="utf-8"))
            for number, line in enumerate(text.splitlines(), 1):
                for word, says in WORDS:
                    for found in word.finditer(line):
                        if found.group() == TRAINED[1] and str(file.relative_to(ROOT)) in TRAINED[0]:
                            continue
                        yield file.relative_to(ROOT), number, found.group(), says


@pytest.mark.parametrize("name", CHECKED)
def test_words(name: str) -> None:
    found = [f"{file}:{line}: {word!r} -> {says}" for file, line, word, says in places(name)]
    assert not found, "\n" + "\n".join(found)


def test_words_in_the_names_of_tests() -> None:
    found = [f"{file}:{line}: {word!r} -> {says}" for file, line, word, says in places("tests") if _is_name(file, line)]
    assert not found, "\n" + "\n".join(found)


def _is_name(file: Path, line: int) -> bool:
    return (ROOT / file).read_text(encoding="utf-8").splitlines()[line - 1].startswith("def test_")


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("the loss is no number", True),
        ("there is no GPU", False),
        ("this is no longer so", False),
        ("def put_back(layer):", True),
        ("name.strip() and text.rstrip('s')", False),
        ("a strip per score", True),
        ("one line a step", True),
        ("one line per step", False),
        ("the optimiser's colours", True),
        ("the optimizer's colors, revised and advised", False),
        ("the epicenter of mending", True),
        ("recommended; foundation; input_background", False),
    ],
)
def test_the_words_that_are_found(text: str, is_found: bool) -> None:
    assert any(word.search(text) for word, _ in WORDS) == is_found


if __name__ == "__main__":
    counted = [
        print(f"{file}:{line}: {word!r} -> {says}")
        for name in sys.argv[1:] or CHECKED
        for file, line, word, says in places(name)
    ]
    print(f"{len(counted)} places")
