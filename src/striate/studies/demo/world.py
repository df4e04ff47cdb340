"""The demo's generated world as files: images and records to tune on, visual and text tasks to test on.

The images are made of OpenMoji glyphs (https://openmoji.org), by the HfG Schwäbisch Gmünd and contributors,
license CC BY-SA 4.0; images that are passed on carry the same license and this credit. Everything is a
function of a seed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from striate.studies.demo.scene import KINDS, PLACES, WORDS, Scene, article, draw, sample_scene, split_of

__all__ = ["TEXT_TASKS", "VISUAL_TASKS", "write_world"]

TEXT_TASKS = ("facts", "arithmetic", "stories")
TURNS = 5  # questions about one training image, at most

Json = dict[str, Any]


VISUAL_TASKS = ("name", "count", "exists", "colour", "position", "read", "know")
UNTUNED = frozenset(word for word in WORDS if split_of(word) != "train")
"""The kinds that no *know* question of the training split is about."""
ANIMALS = tuple(word for word in WORDS if KINDS[word].sort in ("animal", "bird", "insect"))
OBJECTS = tuple(word for word in WORDS if word not in ANIMALS)


def write_world(folder: Path, *, seed: int, train: int, test: int, text: int) -> None:
    """Write the world to `folder`: `images/`, `train.json`, `test.json` and `text.json`.

    `train` is the number of training records (an image with up to five questions, LLaVA format), `test` the
    questions per visual task (an image each, messages format), `text` the records per text task. The test's
    scenes and half of what its signs say are never in the training split, whatever the seed.
    """
    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    _write(folder / "train.json", [_train_record(folder, index, seed) for index in range(train)])
    tasks = [task for task in VISUAL_TASKS for _ in range(test)]
    _write(folder / "test.json", [_test_record(folder, index, task, seed) for index, task in enumerate(tasks)])
    _write(folder / "text.json", text_records(seed, text))


def sample_question(rng: Random, task: str, split: str) -> tuple[Scene, str, str]:
    """A scene of `split` with a question of `task` about it and the answer."""
    while True:
        scene = sample_scene(rng, split, sign=True if task == "read" else None)
        if question := ask(scene, task, rng):
            return scene, question.text, question.answer


def text_records(seed: int, number: int, *, split: str = "test") -> list[Json]:
    """`number` records for each text task: facts that were taught, sums and stories that were held out."""
    rng = Random(f"text {split} {seed}")
    records = []
    for index in range(number):
        records.append(_question(f"facts-{index:05d}", "facts", *fact(rng)))
        records.append(_question(f"arithmetic-{index:05d}", "arithmetic", *arithmetic(rng, split)))
        text = story(rng, split)
        records.append({"id": f"stories-{index:05d}", "text": text, "task": "stories", "metric": "perplexity"})
    return sorted(records, key=lambda record: TEXT_TASKS.index(record["task"]))


def _train_record(folder: Path, index: int, seed: int) -> Json:
    rng = Random(f"train {seed} {index}")
    scene, name = sample_scene(rng, "train"), f"train/{index:05d}.png"
    _save(scene, folder / "images" / name)
    conversations = []
    for turn, (_, question) in enumerate(converse(scene, rng, turns=TURNS)):
        mark = "<image>\n" if turn == 0 else ""
        conversations.append({"from": "human", "value": f"{mark}{question.text}"})
        conversations.append({"from": "gpt", "value": question.answer})
    return {"id": f"train-{index:05d}", "image": name, "conversations": conversations}


def _test_record(folder: Path, index: int, task: str, seed: int) -> Json:
    name = f"test/{index:05d}.png"
    scene, text, answer = sample_question(Random(f"test {seed} {index}"), task, "test")
    _save(scene, folder / "images" / name)
    return _question(f"{task}-{index:05d}", task, text, answer, images=[name])


def _question(name: str, task: str, text: str, answer: str, *, images: list[str] | None = None) -> Json:
    """A test record in the messages format."""
    content = [*({"type": "image"} for _ in images or ()), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    shown = {"images": images} if images else {}
    return {
        "id": name,
        **shown,
        "messages": messages,
        "task": task,
        "answers": [answer],
        "metric": "exact_match",
    }


def _save(scene: Scene, path: Path) -> None:
    draw(scene).save(path, compress_level=1)


def _write(path: Path, records: list[Json]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


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


def converse(scene: Scene, rng: Random, *, turns: int) -> list[tuple[str, Question]]:
    """Up to `turns` questions with their tasks, each about another thing: else one answer gives another away.

    *Know* leaves a fifth of the kinds out; tests on those show knowledge that was not tuned.
    """
    questions: list[tuple[str, Question]] = []
    tasks = rng.sample(VISUAL_TASKS, len(VISUAL_TASKS))
    if scene.sign:  # the rarer scenes, and the only ones that can be read
        tasks.remove("read")
        tasks.insert(rng.randrange(turns), "read")
    for task in tasks:
        avoid = frozenset(question.subject for _, question in questions if question.subject)
        if task == "know":
            avoid |= UNTUNED
        if len(questions) < turns and (question := ask(scene, task, rng, avoid=avoid)):
            questions.append((task, question))
    return questions


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
