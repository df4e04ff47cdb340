"""What tuning on pictures should not make a language model forget: questions of general knowledge, and prose.

The questions come from the tables below, one form of question for each. `KEPT` are the forms of which the untouched
SmolLM2-135M-Instruct answers more than chance would (`python examples/thirty_layers/facts.py MODEL` asks all and prints
the shares); whole forms are kept or left out, so that no question is chosen by the luck of its answer.
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics
from random import Random
from typing import Any

Json = dict[str, Any]
PAGES = 30  # of prose
LETTERS = 1200  # of a page, at most

# form: question with the first word of a pair in it; the pairs.
TABLES = {
    "capital": (
        "What is the capital of {}?",
        """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Japan Tokyo, China Beijing, Russia
        Moscow, Egypt Cairo, Greece Athens, Austria Vienna, Poland Warsaw, Norway Oslo, Sweden Stockholm,
        Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Turkey Ankara, Canada Ottawa, Cuba Havana,
        Peru Lima, Chile Santiago, Kenya Nairobi, Iran Tehran, Iraq Baghdad, Thailand Bangkok, Hungary
        Budapest, Belgium Brussels, Australia Canberra, Ukraine Kyiv, Syria Damascus, Nepal Kathmandu,
        Jamaica Kingston, Cambodia Penh""",
    ),
    "continent": (
        "On which continent is {}?",
        """France Europe, Japan Asia, Kenya Africa, Brazil America, India Asia, Egypt Africa, Spain Europe, China Asia,
        Nigeria Africa, Germany Europe, Thailand Asia, Ghana Africa, Italy Europe, Vietnam Asia, Morocco
        Africa, Poland Europe, Ethiopia Africa, Norway Europe, Mongolia Asia, Peru America""",
    ),
    "opposite": (
        "What is the opposite of '{}'?",
        """hot cold, big small, up down, left right, day night, black white, happy sad, fast slow, old young, rich
        poor, open closed, hard soft, high low, light dark, love hate, north south, east west, true false,
        early late, good bad, empty full, strong weak, wet dry, win lose, buy sell, start stop, push pull,
        long short, inside outside, above below, thick thin, clean dirty, loud quiet, sweet sour, tall
        short, friend enemy, begin end, give take""",
    ),
    "plural": (
        "What is the plural of '{}'?",
        """child children, man men, woman women, foot feet, tooth teeth, mouse mice, goose geese, person people, leaf
        leaves, knife knives, wolf wolves, city cities, box boxes, baby babies, sheep sheep, fish fish, cat
        cats, dog dogs, house houses, tree trees, bus buses, church churches, hero heroes, life lives, wife
        wives, party parties""",
    ),
    "past": (
        "What is the past tense of '{}'?",
        """go went, eat ate, run ran, see saw, take took, give gave, write wrote, speak spoke, come came, drink drank,
        sing sang, swim swam, buy bought, think thought, teach taught, catch caught, bring brought, fly
        flew, grow grew, know knew, sleep slept, keep kept, leave left, find found, make made, sit sat, win
        won, lose lost, tell told, feel felt, meet met, hold held""",
    ),
    "symbol": (
        "What is the chemical symbol of {}?",
        """hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, iron Fe, gold Au, silver Ag, copper Cu,
        lead Pb, calcium Ca, potassium K, chlorine Cl, sulfur S, zinc Zn, neon Ne, silicon Si, uranium U,
        aluminum Al, magnesium Mg, phosphorus P, mercury Hg, tin Sn, lithium Li""",
    ),
    "young": (
        "What is a young {} called?",
        """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, duck duckling, goose gosling, lion cub,
        bear cub, deer fawn, frog tadpole, chicken chick, goat kid, kangaroo joey, swan cygnet""",
    ),
    "language": (
        "Which language do people speak in {}?",
        """France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Japan Japanese, China
        Chinese, Russia Russian, Greece Greek, Poland Polish, Norway Norwegian, Sweden Swedish, Brazil
        Portuguese, Mexico Spanish, Turkey Turkish, Hungary Hungarian, England English, Egypt Arabic, Iran
        Persian, Thailand Thai, Korea Korean""",
    ),
    "next": (
        "What comes after {}?",
        """Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday,
        Sunday Monday, January February, February March, March April, April May, May June, June July, July
        August, August September, September October, October November, November December, spring summer,
        summer autumn""",
    ),
    "made": (
        "Which animal makes {}?",
        """honey bee, milk cow, eggs chicken, wool sheep, silk silkworm, webs spider, pearls oyster, pork pig""",
    ),
    "tool": (
        "Who works with {}? Name the job.",
        """bread baker, patients doctor, students teacher, meat butcher, fish fisherman, planes pilot, paintings
        painter, plants gardener, animals veterinarian, songs singer, crimes detective, fires firefighter,
        teeth dentist""",
    ),
}
SUMS = [(one, other) for one in range(2, 10) for other in range(2, 10) if one <= other]
FORMS = (*TABLES, "sum")
KEPT = ("capital", "continent", "opposite", "plural", "past", "symbol", "language")


def questions(forms: tuple[str, ...] = FORMS) -> list[tuple[str, str, str]]:
    """All questions of these forms: form, question, answer."""
    found = []
    for form in forms:
        if form == "sum":
            found += [(form, f"What is {one} plus {other}?", str(one + other)) for one, other in SUMS]
            continue
        asked, table = TABLES[form]
        pairs = (pair.split() for pair in table.split(","))
        found += [(form, asked.format(word), answer) for word, answer in pairs]
    return found


def text_records() -> list[Json]:
    """The questions that are kept, one task, and pages of the language reference that ships with Python."""
    records = [_question(index, *one) for index, one in enumerate(questions(KEPT))]
    pages = Random("thirty pages").sample(sorted(page for page in topics if len(topics[page]) > LETTERS), PAGES)
    return records + [
        {"id": page, "text": topics[page][:LETTERS], "task": "prose", "metric": "perplexity"} for page in pages
    ]


def _question(index: int, form: str, question: str, answer: str) -> Json:
    message = {"role": "user", "content": [{"type": "text", "text": question}]}
    return {
        "id": f"{form}-{index:03d}", "messages": [message], "task": "facts", "answers": [answer], "metric": "contains"
    }  # fmt: skip


def ask_all(model: str) -> None:
    """Print, for each form, the share that `model` answers."""
    from striate.data import Record
    from striate.evaluation import predict
    from striate.vlm import load

    records = [
        Record(id=form, messages=({"role": "user", "content": [{"type": "text", "text": text}]},), source=form,
               task=form, metric="contains", answers=(answer,))
        for form, text, answer in questions()
    ]  # fmt: skip
    vlm = load(model, dtype="bfloat16", device="cpu")
    said = [one for batch in predict(vlm, records, batch=64, max_new_tokens=16) for one in batch.values()]
    for form in FORMS:
        scores = [one.score for one in said if one.task == form]
        print(
            f"{form:10} {sum(scores) / len(scores):6.1%} of {len(scores)}",
            *[(one.question, one.prediction) for one in said if one.task == form][:3],
        )


if __name__ == "__main__":
    ask_all(sys.argv[1])
