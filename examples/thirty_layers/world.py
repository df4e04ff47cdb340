"""The study's world: the demo's pictures, asked about in plain English, and described in whole sentences.

Scenes, questions and splits are those of the demo; kinds whose name is more than one token for SmolLM2 are left out,
and a task is added whose answers hold several facts: `describe`. Pictures are made of OpenMoji glyphs
(https://openmoji.org), by the HfG Schwäbisch Gmünd and contributors, licence CC BY-SA 4.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from facts import text_records

from striate.studies.demo.scene import PLACES, Scene, article, draw, sample_scene
from striate.studies.demo.world import VISUAL_TASKS, ask, converse

Json = dict[str, Any]

# More than one token in the vocabulary of SmolLM2: a projector can then say no name in one image token.
_LONG = "hedgehog koala rooster swan flamingo peacock ladybug scorpion melon burger taco donut tulip scooter scarf"
LONG = frozenset(_LONG.split())
TASKS = (*("color" if task == "colour" else task for task in VISUAL_TASKS), "describe")
DESCRIBE = ("Describe the picture.", "What does the picture show?", "What do you see in the picture?")
TURNS = 4  # short questions about one training picture, at most


def write_world(folder: Path, *, train: int, test: int, split: str = "test", seed: int = 0) -> None:
    """Write `train.json`, `test.json`, `text.json` and the images to `folder`.

    Args:
        folder: where to write.
        train: training pictures: of every third a description, of the others up to four short questions.
        test: questions per visual task, a picture each, of scenes and half of the time signs that training never shows.
        split: of the questions: test, or validation to choose settings on.
        seed: of everything.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write(folder / "train.json", [_train_record(folder, index, seed) for index in range(train)])
    asked = [(task, index) for task in TASKS for index in range(test)]
    _write(folder / "test.json", [_test_record(folder, task, index, split, seed) for task, index in asked])
    _write(folder / "text.json", text_records())


def scene_of(rng: Random, split: str, *, sign: bool | None = None, signs: tuple[str, ...] = ()) -> Scene:
    """A scene as `sample_scene` draws it, without the kinds in `LONG`."""
    while True:
        scene = sample_scene(rng, split, sign=sign, signs=signs)
        if LONG.isdisjoint(word for word in scene.things if word):
            return scene


def question_of(rng: Random, task: str, split: str) -> tuple[Scene, str, list[str]]:
    """A scene of `split`, a question of `task` about it, and the answer, or the facts of a description."""
    while True:
        scene = scene_of(rng, split, sign=True if task == "read" else None)
        if task == "describe":
            return scene, DESCRIBE[0], facts_of(scene)
        if found := ask(scene, "colour" if task == "color" else task, rng, avoid=LONG):
            return scene, english(found.text), [plain(found.answer)]


def english(question: str) -> str:
    """A question of the demo's world as people write it: for 'what is in the top-left ?' 'What is in the top left?'."""
    text = plain(question).replace(" ?", "?").replace("colour", "color")
    return text[0].upper() + text[1:]


def plain(text: str) -> str:
    """A place in two words."""
    return text.replace("-", " ")


def describe(scene: Scene) -> str:
    """All that is to be seen, place by place."""
    parts = [f"{article(word)} on {ground} in the {plain(place)}" for word, ground, place in _shown(scene)]
    said = ", ".join(parts)
    text = f"There is {said}." if said else "There is nothing."
    return f'{text} The sign says "{scene.sign}".' if scene.sign else text


def facts_of(scene: Scene) -> list[str]:
    """What a description is scored by: each thing, its ground and its place, and the sign."""
    facts = []
    for word, ground, place in _shown(scene):
        facts += [f"{word}", f"{word} on {ground}", f"{word} on {ground} in the {plain(place)}"]
    return [*dict.fromkeys(facts), *([f"sign says {scene.sign}"] if scene.sign else [])]


def _shown(scene: Scene) -> list[tuple[str, str, str]]:
    things = zip(scene.things, scene.grounds, PLACES, strict=True)
    return [(word, ground, place) for word, ground, place in things if word]


def _train_record(folder: Path, index: int, seed: int) -> Json:
    rng = Random(f"thirty train {seed} {index}")
    scene = scene_of(rng, "train")
    turns = [(english(one.text), plain(one.answer)) for _, one in converse(scene, rng, turns=TURNS)]
    if index % 3 == 0:  # not after questions: it gives their answers away
        turns = [(rng.choice(DESCRIBE), describe(scene))]
    conversations = []
    for number, (question, answer) in enumerate(turns):
        mark = "" if number else "<image>\n"
        conversations.append({"from": "human", "value": f"{mark}{question}"})
        conversations.append({"from": "gpt", "value": answer})
    image = _save(scene, folder, f"train-{index:05d}")
    return {"id": f"train-{index:05d}", "image": image, "conversations": conversations}


def _test_record(folder: Path, task: str, index: int, split: str, seed: int) -> Json:
    scene, text, answers = question_of(Random(f"thirty {split} {seed} {task} {index}"), task, split)
    image = _save(scene, folder, f"{task}-{index:04d}")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {
        "id": f"{task}-{index:04d}", "images": [image], "messages": [{"role": "user", "content": content}],
        "task": task, "answers": answers, "metric": "share_named" if task == "describe" else "exact_match",
    }  # fmt: skip


def _save(scene: Scene, folder: Path, name: str) -> str:
    draw(scene).save(folder / "images" / f"{name}.png", compress_level=1)
    return f"{name}.png"


def _write(path: Path, records: list[Json]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
