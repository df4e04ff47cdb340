"""The demo's generated world as files: images and records to tune on, visual and text tasks to test on.

The images are made of OpenMoji glyphs (https://openmoji.org), by the HfG Schwäbisch Gmünd and contributors,
license CC BY-SA 4.0; images that are passed on carry the same license and this credit. Everything is a
function of a seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from striate.studies.demo import prose
from striate.studies.demo.questions import VISUAL_TASKS, ask, converse
from striate.studies.demo.scene import Scene, draw, sample_scene

__all__ = ["TEXT_TASKS", "VISUAL_TASKS", "write_world"]

TEXT_TASKS = ("facts", "arithmetic", "stories")
TURNS = 5  # questions about one training image, at most

Json = dict[str, Any]


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
        records.append(_question(f"facts-{index:05d}", "facts", *prose.fact(rng)))
        records.append(_question(f"arithmetic-{index:05d}", "arithmetic", *prose.arithmetic(rng, split)))
        story = prose.story(rng, split)
        records.append({"id": f"stories-{index:05d}", "text": story, "task": "stories", "metric": "perplexity"})
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
