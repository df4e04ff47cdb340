"""Questions about a scene, one function per visual task, and conversations made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from striate.studies.demo.lexicon import KINDS, PLACES, WORDS, article, split_of
from striate.studies.demo.scene import Scene

VISUAL_TASKS = ("name", "count", "exists", "colour", "position", "read", "know")


@dataclass(frozen=True)
class Question:
    """A question with its short answer; `subject` is the word of the thing asked about, or empty."""

    text: str
    answer: str
    subject: str = ""


def ask(scene: Scene, task: str, rng: Random, *, avoid: frozenset[str] = frozenset()) -> Question | None:
    """A question of `task` about `scene`, or None if the scene has no subject for it outside `avoid`."""
    question = _ASK[task](scene, rng, avoid)
    return None if question is None or question.subject in avoid else question


def converse(scene: Scene, rng: Random, *, turns: int, train: bool = True) -> list[tuple[str, Question]]:
    """Up to `turns` questions with their tasks, each about another thing: else one answer gives another away.

    With `train`, *know* leaves a fifth of the kinds out; tests on those show knowledge that was not tuned.
    """
    questions: list[tuple[str, Question]] = []
    tasks = rng.sample(VISUAL_TASKS, len(VISUAL_TASKS))
    if scene.sign:  # the rarer scenes, and the only ones that can be read
        tasks.remove("read")
        tasks.insert(rng.randrange(turns), "read")
    for task in tasks:
        avoid = frozenset(question.subject for _, question in questions if question.subject)
        if task == "know" and train:
            avoid |= UNTUNED
        if len(questions) < turns and (question := ask(scene, task, rng, avoid=avoid)):
            questions.append((task, question))
    return questions


UNTUNED = frozenset(word for word in WORDS if split_of(word) != "train")
"""The kinds that no *know* question of the training split is about."""


def _pick(scene: Scene, rng: Random, avoid: frozenset[str], *, once: bool) -> tuple[str, str, str] | None:
    """Word, place and ground of a thing outside `avoid`; with `once`, of one that is there only once."""
    often = Counter(scene.things)
    fit = [
        (word, PLACES[index], scene.grounds[index])
        for index, word in enumerate(scene.things)
        if word and word not in avoid and not (once and often[word] > 1)
    ]
    return rng.choice(fit) if fit else None


def _absent(scene: Scene, rng: Random, avoid: frozenset[str]) -> str:
    return rng.choice([word for word in rng.sample(WORDS, 16) if word not in scene.things and word not in avoid])


def _name(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    if not (thing := _pick(scene, rng, avoid, once=False)):
        return None
    word, place, _ = thing
    return Question(rng.choice(["what is in the {} ?", "what do you see in the {} ?"]).format(place), word, word)


def _count(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    present = Counter(word for word in scene.things if word and word not in avoid)
    if rng.random() < 0.15:
        word = _absent(scene, rng, avoid)
    elif present:
        word = max(present, key=lambda word: (present[word], word))
    else:
        return None
    form = rng.choice(["how many times do you see {} ?", "how often is there {} ?"])
    return Question(form.format(article(word)), str(scene.things.count(word)), word)


def _exists(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    form = rng.choice(["is there {} ?", "do you see {} ?"])
    if rng.random() < 0.5:
        return Question(form.format(article(_absent(scene, rng, avoid))), "no")
    if not (thing := _pick(scene, rng, avoid, once=False)):
        return None
    return Question(form.format(article(thing[0])), "yes", thing[0])


def _color(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    if rng.random() < 0.3:
        place = rng.randrange(4)
        return Question(f"what colour is the {PLACES[place]} ?", scene.grounds[place])
    if not (thing := _pick(scene, rng, avoid, once=True)):
        return None
    word, _, ground = thing
    form = rng.choice(["what colour is behind the {} ?", "on what colour is the {} ?"])
    return Question(form.format(word), ground, word)


def _position(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    if not (thing := _pick(scene, rng, avoid, once=True)):
        return None
    word, place, _ = thing
    return Question(rng.choice(["where is the {} ?", "in what place is the {} ?"]).format(word), place, word)


def _read(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    if not scene.sign:
        return None
    return Question(rng.choice(["what does the sign say ?", "what is on the sign ?"]), scene.sign)


def _know(scene: Scene, rng: Random, avoid: frozenset[str]) -> Question | None:
    if not (thing := _pick(scene, rng, avoid, once=False)):
        return None
    word, place, _ = thing
    text, answer = rng.choice(facts(word, f"the thing in the {place}"))
    return Question(text, answer, word)


_ASK = {
    "name": _name,
    "count": _count,
    "exists": _exists,
    "colour": _color,
    "position": _position,
    "read": _read,
    "know": _know,
}


def facts(word: str, noun: str) -> list[tuple[str, str]]:
    """Questions about a kind beyond its looks, with answers; `noun` is how the question speaks of it."""
    kind = KINDS[word]
    return [
        (f"can you eat {noun} ?", "yes" if kind.edible else "no"),
        (f"is {noun} alive ?", "yes" if kind.alive else "no"),
        (f"what sort of thing is {noun} ?", kind.sort),
        (f"where does {noun} belong ?", kind.home),
    ]
