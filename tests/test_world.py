"""The demo's world: right answers, splits that do not touch, files in both formats, the shipped parts."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from lessons import belongings, describe, label_patches
from PIL import Image

from striate.studies.demo.scene import (
    CELL,
    CHARACTERS,
    GRID,
    KINDS,
    PATCH,
    PLACES,
    SIDE,
    SIGNS,
    WORDS,
    Scene,
    article,
    draw,
    sample_scene,
    split_of,
)
from striate.studies.demo.world import (
    TEXT_TASKS,
    TURNS,
    UNTUNED,
    VISUAL_TASKS,
    arithmetic,
    ask,
    converse,
    fact,
    facts,
    sample_question,
    story,
    write_world,
)

MODELS = Path(inspect.getfile(write_world)).parent / "models"
STILL = ((0, 0),) * 4
CATS = Scene(("cat", None, "cat", "apple"), ("red", "white", "blue", "green"), STILL)
SIGN = Scene((None, None, "cat", None), ("white", "white", "blue", "green"), STILL, "open", 0, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, train=60, test=8, text=6)
    return folder


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def answers(scene: Scene, task: str) -> dict[str, str]:
    asked = (ask(scene, task, Random(seed)) for seed in range(200))
    return {question.text: question.answer for question in asked if question}


def test_answers_follow_from_the_scene():
    assert answers(CATS, "name")["what is in the bottom-left ?"] == "cat"
    assert answers(CATS, "count")["how often is there a cat ?"] == "2"
    assert answers(CATS, "exists")["is there an apple ?"] == "yes"
    assert answers(CATS, "colour")["what colour is behind the apple ?"] == "green"
    assert answers(CATS, "colour")["what colour is the top-right ?"] == "white"
    assert answers(CATS, "position") == {
        "where is the apple ?": "bottom-right",
        "in what place is the apple ?": "bottom-right",
    }
    assert answers(CATS, "read") == {}
    assert answers(CATS, "know")["can you eat the thing in the bottom-right ?"] == "yes"
    assert answers(SIGN, "read")["what does the sign say ?"] == "open"


def test_absent_things_are_counted_as_none():
    for task, nothing in (("count", "0"), ("exists", "no")):
        asked = answers(CATS, task)
        assert {answer == nothing for answer in asked.values()} == {True, False}
        for text, answer in asked.items():
            word = re.search(r"an? (\w+) \?", text)[1]
            assert (answer == nothing) == (word not in CATS.things)


@pytest.mark.parametrize("task", VISUAL_TASKS)
def test_no_answer_is_right_most_of_the_time(task: str):
    rng = Random(0)
    given = [sample_question(rng, task, "validation")[2] for _ in range(400)]
    assert max(given.count(answer) for answer in set(given)) <= 0.55 * len(given)


def test_one_answer_does_not_give_another_away():
    known = set()
    for seed in range(200):
        rng = Random(seed)
        scene = sample_scene(rng, "train")
        asked = converse(scene, rng, turns=TURNS)
        subjects = [question.subject for _, question in asked if question.subject]
        assert 1 <= len(asked) <= TURNS
        assert len(set(subjects)) == len(subjects)
        known |= {question.subject for task, question in asked if task == "know"}
    assert known
    assert not known & {*UNTUNED}


def test_splits_do_not_touch():
    assert split_of("") == "test"  # CRC-32 of nothing is 0
    assert not set(SIGNS["train"]) & set(SIGNS["test"])
    assert all(len(texts) > 10 for texts in SIGNS.values())
    rng = Random(0)
    for split in ("train", "test"):
        scenes = [sample_scene(rng, split) for _ in range(200)]
        assert all(scene.split == split for scene in scenes)
        said = {scene.sign for scene in scenes} - {""}
        assert said <= {*SIGNS["train"], *SIGNS[split]}
        assert bool(said & set(SIGNS["test"])) == (split == "test")


def test_a_shifted_glyph_does_not_change_the_split():
    moved = Scene(CATS.things, CATS.grounds, ((3, 1),) * 4)
    assert moved.split == CATS.split


def test_images_show_what_the_patch_labels_say():
    image, labels = np.asarray(draw(SIGN)).astype(int), label_patches(SIGN)
    assert image.shape == (SIDE, SIDE, 3)
    for index in range(GRID * GRID):
        row, column = PATCH * (index // GRID), PATCH * (index % GRID)
        patch = image[row : row + PATCH, column : column + PATCH]
        inked = patch.max(2).min() < 110
        if row < CELL:
            assert inked == (labels.character[index] > 0)
    spelled = "".join(CHARACTERS[code - 1] for code in labels.character if code)
    assert spelled == "open"
    assert set(labels.kind[labels.place == 2]) == {1 + WORDS.index("cat")}
    assert labels.kind[labels.place != 2].sum() == 0


def test_every_kind_has_its_own_style():
    looks = {draw(Scene((word, None, None, None), ("white",) * 4, STILL)).tobytes() for word in WORDS}
    assert len(looks) == len(WORDS) >= 139


def test_sums_are_right_and_facts_agree_with_the_lexicon():
    rng = Random(0)
    for _ in range(300):
        text, answer = arithmetic(rng, "train")
        first, sign, second = re.fullmatch(r"what is (\d+) (plus|minus) (\d) \?", text).groups()
        assert int(answer) == int(first) + (1 if sign == "plus" else -1) * int(second)
        assert len(answer) == 2
    assert dict(facts("apple", article("apple")))["what sort of thing is an apple ?"] == "fruit"
    assert all(10 <= int(kind.price) <= 99 for kind in KINDS.values())
    text = describe(CATS, Random(1))
    assert all(
        f"{place} {ground} {word or 'nothing'} ." in text
        for place, ground, word in zip(PLACES, CATS.grounds, CATS.things, strict=True)
    )


def test_belongings_are_asked_in_both_directions():
    for seed in range(50):
        text, asked = belongings(Random(seed), 10)
        pairs = dict(re.findall(r"(\w+) has (\w+) \.", text))
        assert len(asked) == 10
        for question, answer in asked:
            direction, word = re.fullmatch(r"(what|who) has (\w+) \?", question).groups()
            owner, thing = (word, answer) if direction == "what" else (answer, word)
            assert pairs[owner] == thing


def test_the_training_file_is_in_the_llava_format(world: Path):
    records = read(world / "train.json")
    assert len(records) == 60 == len({record["id"] for record in records})
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert "<image>" not in json.dumps(turns[1:])
        assert 1 <= len(turns) // 2 <= TURNS
        with Image.open(world / "images" / record["image"]) as image:
            assert image.size == (SIDE, SIDE)


def test_the_test_files_are_in_the_messages_format(world: Path):
    records = read(world / "test.json")
    assert [record["task"] for record in records] == [task for task in VISUAL_TASKS for _ in range(8)]
    for record in records:
        (message,) = record["messages"]
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert len(record["answers"]) == 1
        assert record["metric"] == "exact_match"
        assert (world / "images" / record["images"][0]).is_file()
    texts = read(world / "text.json")
    assert [record["task"] for record in texts] == [task for task in TEXT_TASKS for _ in range(6)]
    assert all(("text" in record) == (record["metric"] == "perplexity") for record in texts)
    assert not any("images" in record for record in texts)


def test_the_same_seed_makes_the_same_bytes(world: Path, tmp_path: Path):
    write_world(tmp_path / "again", seed=3, train=60, test=8, text=6)
    write_world(tmp_path / "other", seed=4, train=60, test=8, text=6)
    names = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(names) == 3 + 60 + 8 * len(VISUAL_TASKS)
    assert all((world / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert (world / "train.json").read_bytes() != (tmp_path / "other" / "train.json").read_bytes()


def test_shipped_parts_fit_each_other_and_the_limit():
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoImageProcessor

    tower, backbone = (
        AutoConfig.from_pretrained(MODELS / "tower"),
        AutoConfig.from_pretrained(MODELS / "backbone"),
    )
    projector = load_file(MODELS / "projector" / "projector.safetensors")
    width = backbone.hidden_size
    assert {name: tuple(weight.shape) for name, weight in projector.items()} == {
        "linear_1.weight": (width, tower.hidden_size),
        "linear_1.bias": (width,),
        "linear_2.weight": (width, width),
        "linear_2.bias": (width,),
    }
    assert (tower.image_size, tower.patch_size, backbone.num_hidden_layers) == (SIDE, PATCH, 12)
    processor = AutoImageProcessor.from_pretrained(MODELS / "tower")
    pixels = processor(draw(CATS), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 20e6


def test_the_tokenizer_knows_every_word_and_spells_signs():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "backbone")
    rng, unknown = Random(0), tokenizer.unk_token_id
    for _ in range(200):
        scene = sample_scene(rng, "test")
        text = f"{describe(scene, rng)} {story(rng, 'test')} {fact(rng)[0]}"
        assert unknown not in tokenizer(text)["input_ids"]
    for text in (*SIGNS["train"], *SIGNS["test"]):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 1 + len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<image>") != unknown
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is in the top-left ?"}],
        },
        {"role": "assistant", "content": "cat"},
    ]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:4] == ["<s>", "<user>", "<image>", "▁what"]
    assert tokens[-3:] == ["<assistant>", "▁cat", "</s>"]
