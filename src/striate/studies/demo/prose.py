"""The text world: facts, sums, stories, and scenes described in words; what the tiny language model has read."""

from __future__ import annotations

from random import Random

from striate.studies.demo.lexicon import KINDS, WORDS, article, split_of
from striate.studies.demo.questions import facts

ANIMALS = tuple(word for word in WORDS if KINDS[word].sort in ("animal", "bird", "insect"))
OBJECTS = tuple(word for word in WORDS if word not in ANIMALS)


def fact(rng: Random) -> tuple[str, str]:
    """A question about a kind, and its answer: a fact that questions about images ask for, too, or the price."""
    word = rng.choice(WORDS)
    noun = article(word)
    return rng.choice([*facts(word, noun), (f"what does {noun} cost ?", KINDS[word].price)])


def arithmetic(rng: Random, split: str) -> tuple[str, str]:
    """A two-digit number plus or minus a one-digit one, result 10-99; no problem is in two splits."""
    while True:
        first, second, plus = rng.randint(10, 99), rng.randint(1, 9), rng.random() < 0.5
        result = first + second if plus else first - second
        text = f"what is {first} {'plus' if plus else 'minus'} {second} ?"
        if 10 <= result <= 99 and split_of(text) == split:
            return text, str(result)


def story(rng: Random, split: str) -> str:
    """Six to eight sentences about an animal that looks for something, where such a thing belongs."""
    while True:
        hero, friend = rng.sample(ANIMALS, 2)
        thing, gift, cover = rng.sample(OBJECTS, 3)
        if split_of(f"{hero} {friend} {thing}") == split:
            break
    home, away = KINDS[hero].home, KINDS[thing].home
    sentences = [
        [f"one {when} the {hero} left the {home} ." for when in ("day", "morning", "evening")],
        [f"it was looking for {article(thing)} .", f"it wanted to have {article(thing)} ."],
        [f"on the way it met the {friend} .", f"soon it saw the {friend} from the {KINDS[friend].home} ."],
        [f"the {hero} asked the {friend} about the {thing} ."],
        [
            f"the {friend} said that there was one in the {away} .",
            f"the {friend} had seen one in the {away} .",
        ],
        [
            f"so the {hero} and the {friend} went to the {away} together .",
            f"so they both went to the {away} .",
        ],
        [
            f"there they found the {thing} behind {article(cover)} .",
            f"the {thing} was under {article(cover)} .",
        ],
        [f"the {hero} was happy and gave {article(gift)} to the {friend} ."],
        [f"then the {hero} took the {thing} back to the {home} .", f"in the end the {hero} went home ."],
    ]
    return " ".join(rng.choice(forms) for forms in sentences)
