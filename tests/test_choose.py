"""The verb choose: layers by scores that agree, what fits the budget, a recipe that tune takes, and reasons that say
what was measured."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import pico_llava
from training import write_data

import striate
from striate.region import Region
from striate.runs.cli import main
from striate.runs.run import Run
from striate.runs.training import tune
from striate.scores import Score, rank_correlation
from striate.scores.consensus import Sureness, agreement, choose_region, consensus, stability
from striate.scores.sampling import Sampling
from striate.studies.choose import Budget, Choice, propose
from striate.studies.choose.choice import RouteLoss
from striate.studies.choose.fitting import fit
from striate.studies.cost import Machine
from striate.vlm import load_on_meta

MACHINE = Machine("a machine of the test", 1e9, 1e9)
PLENTY = Budget(1e9, None, MACHINE, "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("pico") / "llava", num_hidden_layers=8)


def proposed(model: Path, data: Path, budget: Budget = PLENTY) -> Choice:
    records, sampling = striate.read(data), Sampling()
    vlm = striate.load(model, dtype="float32", device="cpu")
    return propose(vlm, sampling.draw(records), num_records=1000, budget=budget, sampling=sampling)


@pytest.fixture(scope="module")
def choice(model: Path, data: Path) -> Choice:
    return proposed(model, data)


def score(*values: float, samples: tuple[tuple[float, ...], ...] | None = None, direction: str = "high") -> Score:
    return Score("one", values, samples=samples, direction=direction)


def test_a_consensus_by_hand() -> None:
    one, other = score(9, 5, 7, 1), score(0.1, 0.2, 0.4, 0.3, direction="low")
    # ranks 0, 2, 1, 3 and 0, 1, 3, 2: sums 0, 3, 4, 5
    assert consensus([one, other]) == [0, 1, 2, 3]
    assert agreement([one, other]) == rank_correlation(one, other)
    assert agreement([one, one, other]) == pytest.approx((1 + 2 * rank_correlation(one, other)) / 3)
    assert math.isnan(agreement([one]))


def test_stability_is_one_for_records_that_are_alike_and_lower_for_those_that_differ() -> None:
    alike = score(3, 2, 1, 0, samples=((3, 2, 1, 0),) * 6)
    assert stability([alike], lambda ranked: ranked[:2]) == 1
    rows = tuple(tuple(float(layer == index % 4) for layer in range(4)) for index in range(8))
    differing = score(*torch.tensor(rows).mean(0).tolist(), samples=rows)
    assert 0.25 < stability([differing], lambda ranked: ranked[:1]) < 0.75
    assert math.isnan(stability([score(1, 2, samples=((1, 2),))], lambda ranked: ranked[:1]))


def test_where_scores_agree_each_stretch_has_its_best_layer(choice: Choice) -> None:
    assert choice.sureness.trusted
    ranked = consensus(list(choice.scores.scores.values()))
    best = [next(layer for layer in ranked if start <= layer < start + 4) for start in (0, 4)]
    assert choice.region.layers == tuple(best)
    assert list(choice.scores.scores) == ["block_influence", "layer_contribution", "gradient"]


def test_tune_chooses_the_region_that_scores_choose(model: Path, data: Path, choice: Choice, tmp_path: Path) -> None:
    options = striate.TrainOptions(steps=1, batch=4, micro_batch=4, device="cpu", dtype="float32")
    run = tune(model, data=data, out=tmp_path / "run", region="auto:25%", method="full", options=options)
    assert run.region == choice.region != Region.parse("uniform:25%", 8)
    assert run.region.origin.startswith("auto:25%, chosen by scores (rank correlation of the scores 0.")
    assert Region.load(run.checkpoint) == choice.region


def test_scores_that_disagree_choose_uniform() -> None:
    rows = tuple(tuple(float(layer) for layer in range(8)) for _ in range(4))
    rising, falling = score(*rows[0], samples=rows), score(*rows[0], samples=rows, direction="low")
    region, sureness = choose_region([rising, rising], "25%")
    assert (region.layers, sureness) == ((3, 7), Sureness(1, 1))
    region, sureness = choose_region([rising, falling], "25%")
    assert region == Region.parse("uniform:25%", 8)
    assert str(sureness).startswith("uniform, as the scores do not agree (rank correlation of the scores -1.00")


@pytest.mark.parametrize(
    ("region", "options", "said"),
    [
        ("auto:9", {}, "--region auto:9: '9' asks for 9 layers"),
        ("auto:", {}, "--region auto:: '' is not a number of layers"),
        ("auto:2", {"frozen_layers": "nf4"}, "--region auto:2 measures the model on one device"),
    ],
)
def test_regions_that_cannot_be_chosen(
    model: Path, data: Path, region: str, options: dict[str, str], said: str
) -> None:
    vlm = striate.load(model, dtype="float32", device="cpu")
    with pytest.raises(striate.UserError, match=re.escape(said)):
        striate.tune(vlm, striate.read(data), region=region, options=replace(striate.TrainOptions(), **options))  # type: ignore[arg-type]


def test_elsewhere_a_region_is_named(model: Path) -> None:
    with pytest.raises(striate.UserError, match="auto:25%: tune measures it"):
        Region.parse("auto:25%", 8)


def test_where_they_do_not_uniform_stays(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("striate.scores.consensus.AGREE", 1.01)
    monkeypatch.setattr("striate.studies.choose.CHOOSING", ("block_influence",))
    found = proposed(model, data)
    assert found.region == Region.parse("uniform:25%", 8)
    assert "evenly spread, as in the paper: the scores" in found.reasons[0]


def test_the_first_way_that_fits_is_taken(choice: Choice, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (choice.method, choice.modules, choice.fit.refused) == ("full", "all", ())
    vlm, setup, peak = load_on_meta(model), choice.fit.step.setup, choice.fit.step.memory.peak
    smaller = fit(vlm, setup, replace(PLENTY, memory=peak / 4), 1000)
    assert smaller.step.memory.peak <= 0.9 * peak / 4
    assert smaller.step.setup.micro_batch < 16 or smaller.step.setup.checkpointing
    monkeypatch.setattr("striate.studies.choose.fitting.SHARES", ("1",))
    with pytest.raises(striate.UserError, match=r"--budget 1e-06GB: the least is .* GB \(") as caught:
        fit(vlm, setup, replace(PLENTY, memory=1000), 1000)
    assert "\n" not in str(caught.value)


def test_time_becomes_steps(choice: Choice, model: Path) -> None:
    assert (choice.fit.steps, choice.fit.shortened) == (8, False)  # 1000 records in batches of 128
    assert "steps" not in choice.recipe()
    vlm, setup, second = load_on_meta(model), choice.fit.step.setup, choice.fit.step.seconds(*MACHINE.reached)
    shorter = replace(choice, fit=fit(vlm, setup, replace(PLENTY, seconds=3.5 * second), 1000))
    assert shorter.recipe()["steps"] == 3
    assert "3 steps of the 8 of an epoch" in shorter.reasons[2]
    with pytest.raises(striate.UserError, match=r"is less than the .* s of one step of 128 records"):
        fit(vlm, setup, replace(PLENTY, seconds=0.5 * second), 1000)


def test_without_a_record_that_can_be_used_one_line_says_so(model: Path, tmp_path: Path) -> None:
    file = write_data(tmp_path, records=2)
    for image in tmp_path.glob("*.png"):
        image.write_bytes(b"not an image")
    with pytest.raises(striate.UserError, match=r"none of the 2 records can be used: train.json:1: ") as caught:
        proposed(model, file)
    assert "\n" not in str(caught.value)
    assert caught.value.see == "bad-records"


def test_a_route_is_proposed_where_the_loss_does_not_rise(choice: Choice) -> None:
    assert choice.route_loss.n == 8
    worse = replace(choice, route_loss=RouteLoss(0.5, 0.1, 8))
    same = replace(choice, route_loss=RouteLoss(0.1, 0.1, 8))
    assert (worse.route, same.route, replace(choice, route_loss=RouteLoss(why="no image")).route) == (
        "none", "same", "none",
    )  # fmt: skip
    assert "would cost +0.5 ± 0.1 nats per answer token" in worse.reasons[3]


def test_the_reasons_are_five_lines_and_claim_no_more_than_was_measured(choice: Choice) -> None:
    assert [line.split(" ")[0].rstrip(":") for line in choice.reasons] == [
        "region",
        "modules",
        "method",
        "route",
        "sure",
    ]
    assert not any("\n" in line for line in choice.reasons)
    assert "No measurement shows that they beat uniform" in choice.reasons[4]
    unsure = replace(choice, sureness=Sureness(math.nan, math.nan))
    assert "rank correlation of the scores unknown" in unsure.reasons[4]


def test_tune_takes_the_recipe(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    words = ["choose", str(model), "--data", str(data), "--device", "cpu", "--dtype", "float32", "--out", str(plan)]
    assert main([*words, "--samples", "4", "--budget", "1GB", "--gpu", "l4"]) == 0
    shown = capsys.readouterr().out
    assert "region " in shown
    assert plan.read_text().startswith("# region ")
    small = ["--batch", "4", "--micro-batch", "2", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    assert main(["tune", "--config", str(plan), "--out", str(tmp_path / "run"), *small]) == 0
    run = Run.open(tmp_path / "run")
    assert str(run.region) == run.info["options"]["region"]
    assert main([*words]) == 2  # the recipe exists


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "--budget 'fast': expected a memory"),
        ("0h", "--budget '0h': expected a memory"),
        ("2h,3h", "two values of time"),
        ("", "--budget '': expected a memory"),
    ],
)
def test_bad_budgets_are_one_line(text: str, message: str) -> None:
    with pytest.raises(striate.UserError, match=message) as caught:
        Budget.parse(text, gpu="h100")
    assert "\n" not in str(caught.value)


def test_budgets() -> None:
    both = Budget.parse("24GB, 90min", gpu="h100")
    assert (both.memory, both.seconds) == (24e9, 5400)
    assert Budget.parse("2h", gpu="h100").memory == 80e9
    assert Budget.parse(None, gpu="h100").seconds is None
