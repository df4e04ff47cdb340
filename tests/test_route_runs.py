"""Route in the verbs: training, scores, evaluation and pruning equal those of the slow way, image tokens reverted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import loud
from test_route import reverted
from training import OPTIONS, changed, power_cut, weights, write_data
from transformers import AutoModelForImageTextToText

import striate
from striate import routing
from striate.data import read
from striate.evaluation import Prediction
from striate.region import Region
from striate.roundtrip import probes
from striate.routing import ENTRY, read_route
from striate.runs import training
from striate.runs.cli import main
from striate.runs.pruning import prune
from striate.runs.run import Run
from striate.scores.replay import Replay
from striate.train import Trained, TrainOptions
from striate.vlm import Vlm, load

ROUTE = "0,2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with one image, with two and with none."""
    file = write_data(tmp_path_factory.mktemp("data"))
    rows = json.loads(file.read_text())
    for row, image in zip(rows[::4], ([], ["0.png", "1.png"]), strict=True):
        row["image"] = image
        row["conversations"][0]["value"] = "<image>\n" * len(image) + "what is this ?"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def routed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a route, of a model with large weights, so that a wrong route shows."""
    folder, vlm = tmp_path_factory.mktemp("routed"), loud(load(model, device="cpu"))
    vlm.model.save_pretrained(folder / "loud")
    vlm.processor.save_pretrained(folder / "loud")
    options = replace(OPTIONS, steps=1)
    return training.tune(
        folder / "loud", data=data, out=folder / "run", region="2,3", route="same", method="full", options=options
    )


@contextmanager
def slow_way(vlm: Vlm, route: str) -> Iterator[None]:
    assert vlm.image_token_id is not None
    with reverted(vlm, Region.parse(route, vlm.depth), vlm.image_token_id):
        yield


def trained(model: Path | Vlm, data: Path, options: TrainOptions, **settings: Any) -> Trained:
    vlm = model if isinstance(model, Vlm) else load(model, device="cpu")
    return striate.tune(vlm, read(data), options=options, **{"region": "1,3", "rank": 4, "dropout": 0.0, **settings})


SETTINGS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "lora"},
    {"method": "full", "region": "all", "packing": "on", "checkpointing": "all"},
    {"method": "full", "packing": "off", "checkpointing": "all"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_is_that_of_the_slow_way(model: Path, data: Path, settings: dict[str, Any]) -> None:
    ways = {key: value for key, value in settings.items() if key in ("packing", "checkpointing")}
    others = {key: value for key, value in settings.items() if key not in ways}
    vlm = load(model, device="cpu")
    with slow_way(vlm, ROUTE):
        slow = trained(vlm, data, replace(OPTIONS, packing="off"), **others)
    found = trained(model, data, replace(OPTIONS, **ways), route=ROUTE, **others)
    plain = trained(model, data, replace(OPTIONS, **ways), **others)
    losses = [[step["loss"] for step in one.log.history] for one in (found, slow, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)
    expected = slow.vlm.model.state_dict()
    for name, weight in found.vlm.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert found.route == Region.parse(ROUTE, 4)
    assert read_route(found.vlm.model.config) == found.route


def test_a_routed_checkpoint_is_plain_and_says_its_route(routed: Run) -> None:
    for file in (routed.path / "region.json", routed.checkpoint / "region.json"):
        assert json.loads(file.read_text())["route"] == [0, 2, 3]
    assert "pass only through layers `0,2,3`" in (routed.checkpoint / "README.md").read_text()
    assert json.loads((routed.checkpoint / "config.json").read_text())[ENTRY]["layers"] == [0, 2, 3]
    loaded, vlm = AutoModelForImageTextToText.from_pretrained(routed.checkpoint), striate.load(routed.path)
    prompts = probes(vlm)
    with torch.no_grad():
        plain, found = (model(**prompts["image"]).logits for model in (loaded, vlm.model))
        with striate.route(loaded):
            assert torch.equal(loaded(**prompts["image"]).logits, found)
        assert torch.equal(loaded(**prompts["image"]).logits, plain)
        assert torch.equal(loaded(**prompts["text"]).logits, vlm.model(**prompts["text"]).logits)
    assert (plain - found)[0, -1].abs().max() > 1e-3


def test_align_is_routed(model: Path, data: Path, tmp_path: Path) -> None:
    vlm = load(model, device="cpu")
    with slow_way(vlm, ROUTE):
        slow = striate.align(vlm, read(data), options=OPTIONS)
    run = training.align(model, data=data, out=tmp_path / "run", route=ROUTE, options=OPTIONS)
    assert [step["loss"] for step in run.history()] == pytest.approx([s["loss"] for s in slow.log.history], rel=1e-5)
    assert json.loads((run.path / "checkpoint" / "region.json").read_text())["route"] == [0, 2]


def test_auto_routes_through_layer_0_and_those_that_contribute_most(routed: Run, data: Path, tmp_path: Path) -> None:
    # A checkpoint with a route of its own, under which other layers would contribute nothing.
    vlm, settings = load(routed.path, device="cpu"), replace(OPTIONS, steps=1)
    values = striate.score(
        vlm, read(data), metrics="layer_contribution", batch=settings.micro_batch, max_length=settings.max_length
    )["layer_contribution"].values
    best = max(range(1, vlm.depth), key=values.__getitem__)
    run = training.tune(
        routed.checkpoint, data=data, out=tmp_path / "run", region="3", route="auto:2", method="full", options=settings
    )
    route = Region((0, best), vlm.depth)
    assert best != 2  # its own route was 0,2
    assert read_route(load(run.path).model.config) == route
    assert json.loads((run.path / "region.json").read_text())["route"] == list(route)
    assert striate.tune(vlm, read(data), region="3", route="auto:50%", method="full", options=settings).route == route
    with pytest.raises(striate.UserError, match="auto:2: tune and align measure it"):
        routing.resolve("auto:2", Region((3,), vlm.depth))
    with pytest.raises(striate.UserError, match="asks for 9 layers"):
        striate.tune(vlm, read(data), region="3", route="auto:9", options=settings)


def test_training_a_routed_checkpoint_without_a_route_makes_it_plain(routed: Run, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    run = training.tune(routed.path, data=data, out=tmp_path / "run", region="1", options=options)
    assert (
        "the checkpoint was routed through 0,2,3 and is not any more: --route 0,2,3 keeps its route"
        in (run.info["warnings"])
    )
    assert read_route(striate.load(run.path).model.config) is None
    whole = striate.tune(striate.load(routed.path, device="cpu"), read(data), region="1", options=options)
    assert changed(whole.vlm.model.state_dict(), weights(run.path)) == set()


def test_healing_keeps_the_route(routed: Run, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    prune(routed.path, out=tmp_path / "run", region="2", layers="0", heal=data, options=options)
    run = Run.open(tmp_path / "run")
    assert read_route(load(run.path).model.config) == Region((1, 2), 3)
    assert json.loads((run.checkpoint / "region.json").read_text())["route"] == [1, 2]
    assert run.info["warnings"] == ["layer 0, which images need most, is not in the route 1,2"]


def test_a_resumed_run_keeps_its_route(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=4, save_steps=2)
    settings: dict[str, Any] = {"region": "1,3", "route": ROUTE, "method": "full", "options": options}
    whole = training.tune(model, data=data, out=tmp_path / "whole", **settings)

    with power_cut(3):
        training.tune(model, data=data, out=tmp_path / "cut", **settings)
    with pytest.raises(striate.UserError, match="route was 0,2, now it is same"):
        training.tune(model, data=data, out=tmp_path / "cut", resume=True, **settings | {"route": "same"})
    resumed = training.tune(model, data=data, out=tmp_path / "cut", resume=True, **settings)
    assert changed(weights(whole.path), weights(resumed.path)) == set()


@pytest.mark.parametrize(("verb", "settings"), [
    ("tune", {"region": "auto:2", "route": "auto:2", "method": "full"}),
    ("tune", {"region": "auto:2", "route": "same", "method": "lora", "rank": 4}),
    ("align", {"route": "auto:2"}),
])  # fmt: skip
def test_a_resumed_run_does_not_measure_its_layers_again(
    model: Path, data: Path, tmp_path: Path, verb: str, settings: dict[str, Any]
) -> None:
    run = partial(getattr(training, verb), model, data=data, options=replace(OPTIONS, steps=4, save_steps=2))
    whole = run(out=tmp_path / "whole", **settings)

    def measure(*_: Any, **__: Any) -> None:
        raise ValueError("measured")

    with power_cut(3):
        run(out=tmp_path / "cut", **settings)
    assert Run.open(tmp_path / "cut").route == whole.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.train.measured.score", measure)
        with pytest.raises(ValueError, match="measured"):
            run(out=tmp_path / "cut", resume="changed", **settings | {"route": "auto:3"})
        resumed = run(out=tmp_path / "cut", resume=True, **settings)
    assert resumed.route == whole.route is not None
    assert changed(weights(whole.path), weights(resumed.path)) == set()
    for file in ("region.json", "checkpoint/region.json", "checkpoint/config.json"):
        assert (resumed.path / file).read_bytes() == (whole.path / file).read_bytes(), file


def test_answers_are_those_of_the_slow_way(routed: Run, data: Path) -> None:
    records = list(read(data))
    chosen = [replace(one, task="choice", choices=("a red cat", "yes"), answers=("yes",)) for one in records[:4]]

    def answers(vlm: Vlm) -> list[Prediction]:
        return list(striate.evaluate(vlm, [*records[4:], *chosen], max_new_tokens=6).predictions)

    vlm = load(routed.path, device="cpu")
    with slow_way(vlm, "0,2,3"):
        slow = answers(vlm)
    found = answers(striate.load(routed.path, device="cpu"))
    assert [one.prediction for one in found] == [one.prediction for one in slow]


def test_scores_are_those_of_the_slow_way(routed: Run, data: Path) -> None:
    vlm = load(routed.path, device="cpu")
    with slow_way(vlm, "0,2,3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "_can_resume", lambda _: False)  # a layer that only replays would be reverted, too
        slow = striate.score(vlm, read(data), batch=3)
    found = striate.score(striate.load(routed.path, device="cpu"), read(data), batch=3)
    plain = striate.score(load(routed.path, device="cpu"), read(data), metrics="image_attention", batch=3)
    assert found.scores.keys() == slow.scores.keys() >= {"image_attention", "layer_contribution", "gradient"}
    for name, score in slow.scores.items():
        assert found.scores[name].values == pytest.approx(score.values, rel=1e-4, abs=1e-6, nan_ok=True), name
        if name in plain.scores:
            assert score.values[1:] != pytest.approx(plain.scores[name].values[1:], rel=1e-3)
    assert found.scores["layer_contribution"].values[1] == pytest.approx(0, abs=1e-9)


def test_pruning_renumbers_the_route(routed: Run, data: Path, tmp_path: Path) -> None:
    prune(routed.path, out=tmp_path / "pruned", region="2", layers="0", data=data, options=OPTIONS)
    run = Run(tmp_path / "pruned")
    vlm = striate.load(run.path)
    assert str(read_route(vlm.model.config)) == "1,2"
    assert json.loads((run.checkpoint / "region.json").read_text())["route"] == [1, 2]
    prune(routed.path, out=tmp_path / "whole", layers="1", data=data, options=OPTIONS)
    whole = Run(tmp_path / "whole")
    assert read_route(load(whole.path).model.config) is None  # all layers are left in it
    assert str(whole.region) == "all"
    with pytest.raises(striate.UserError, match="0 in the region 0,2,3, which is never cut"):
        prune(routed.path, out=tmp_path / "none", layers="0", data=data, options=OPTIONS)
    with pytest.raises(
        striate.UserError, match=r"none of the layers that images are routed through \(0,2,3\) would be"
    ):
        prune(routed.path, out=tmp_path / "none", region="1", layers="0,2,3", data=data, options=OPTIONS)


def test_layers_dropped_in_memory_leave_the_route(routed: Run) -> None:
    vlm = striate.load(routed.path, device="cpu")
    pruned = striate.drop_layers(vlm, [2])
    assert str(read_route(pruned.vlm.model.config)) == "0,2"
    with pytest.raises(striate.UserError, match="is routed already"):
        striate.route(pruned.vlm)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("0,9", "--route 0,9: layer 9 does not exist; this model's depth is 4"),
        ("first:0", "--route first:0: "),
        ("auto:0", "--route auto:0: '0' asks for 0 layers"),
    ],
)
def test_a_bad_route_is_one_line(
    model: Path, data: Path, tmp_path: Path, route: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("tune", "align"):
        words = [verb, str(model), "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]
        assert main([*words, "--route", route]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error
        assert not (tmp_path / "run").exists()
