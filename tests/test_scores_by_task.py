"""Scores over the records of each task: their mean is the whole score, and regions and figures follow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pico import DEPTH, pico_llava
from training import write_data

import striate
from striate.region import Region
from striate.runs.cli import main
from striate.scores import Scores
from striate.scores.figures import figures
from striate.studies.report import report

METRICS = ("block_influence", "layer_contribution", "bypass_perplexity", "gradient")
NUMBERS = {"no task": 1, "count": 2, "read": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_llava(tmp_path_factory.mktemp("pico") / "llava")
    vlm = striate.load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for layer in vlm.layers:
            for parameter in layer.parameters():
                parameter.mul_(3)
    vlm.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_data(tmp_path_factory.mktemp("data"))
    tasks = ["read", "read", "count", "read", "", "count", "read", "read"]
    rows = [
        row | ({"task": task} if task else {}) for row, task in zip(json.loads(path.read_text()), tasks, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vlm = striate.load(model, dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("scores")
    striate.score(vlm, striate.read(data), metrics=METRICS, by="task", batch=3).save(folder / "scores.json")
    return folder


def test_the_mean_over_tasks_is_the_score(run: Path) -> None:
    for name, score in Scores.load(run).scores.items():
        assert {task: one.n for task, one in score.tasks.items()} == NUMBERS, name
        if "perplexity" in name:  # a mean over tokens, not over records
            continue
        for layer in range(DEPTH):
            weighted = sum(one.n * one.values[layer] for one in score.tasks.values()) / score.n
            assert weighted == pytest.approx(score.values[layer], rel=1e-5, abs=1e-9), name


def test_a_task_has_the_scores_of_its_records_alone(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    rows = [row for row in json.loads(data.read_text()) if row.get("task") == "count"]
    alone = data.parent / "count.json"
    alone.write_text(json.dumps(rows))
    vlm = striate.load(model, dtype="float32", device="cpu")
    found, saved = striate.score(vlm, striate.read(alone), metrics=METRICS, by="task"), Scores.load(run)
    for name, score in found.scores.items():
        assert saved[name].tasks["count"].values == pytest.approx(score.values, rel=1e-4, abs=1e-7), name
        assert saved[name].tasks["count"].stderr == pytest.approx(score.stderr, rel=1e-2, abs=1e-6), name
        assert score.tasks["count"].values == score.values
        single = saved[name].tasks["no task"].stderr
        assert single is not None
        assert all(map(math.isnan, single)), name  # one record has no spread


def test_a_region_by_the_score_of_a_task(run: Path) -> None:
    scores = Scores.load(run)
    values = scores["layer_contribution"].tasks["read"].values
    best = max(range(DEPTH), key=values.__getitem__)
    assert Region.parse(f"top:1@{run}:layer_contribution:read", DEPTH).layers == (best,)
    assert scores.top("layer_contribution", 1, tasks="read").layers == (best,)
    assert scores.top("layer_contribution", 1, tasks="read").origin == "top:1@scores:layer_contribution:read"
    both = scores.top("gradient", 2, form="spread", tasks="read,count")
    assert both == Region.parse(f"spread:2@{run}:gradient:read,count", DEPTH)
    with pytest.raises(striate.UserError, match="gradient has no task 'reed'; nearest: read"):
        scores.top("gradient", 1, tasks="reed")


def test_the_heat_map_has_a_row_per_task(run: Path) -> None:
    (figure,) = (one for one in figures(Scores.load(run)) if one.name == "tasks")
    assert len(figure.figure.axes) == len(METRICS)
    assert [text.get_text() for text in figure.figure.axes[0].get_yticklabels()] == list(NUMBERS)


def test_the_verb_shows_tasks_in_strips_figure_and_report(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["score", str(model), "--data", str(data), "--out", str(out), "--by", "task", "--device", "cpu"]
    assert main([*words, "--metrics", "block_influence"]) == 0
    assert "  count, n 2  " in capsys.readouterr().out
    assert (out / "figures" / "tasks.png").is_file()
    assert "Layer scores by task" in report([out], out=tmp_path / "report.html").read_text("utf-8")


def test_records_without_any_task_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    plain = data.parent / "plain.json"
    plain.write_text(
        json.dumps([{k: v for k, v in row.items() if k != "task"} for row in json.loads(data.read_text())])
    )
    vlm = striate.load(model, device="cpu")
    with pytest.raises(striate.UserError, match="--by task: none of the records has a task"):
        striate.score(vlm, striate.read(plain), by="task")


def test_words_that_the_library_does_not_know_are_refused(model: Path, data: Path) -> None:
    vlm, records = striate.load(model, device="cpu"), striate.read(data)
    with pytest.raises(striate.UserError, match="--by 'tasks'; nearest: task"):
        striate.score(vlm, records, by="tasks")
    with pytest.raises(striate.UserError, match="--on-bad-record 'ignore'; there are: stop, skip"):
        striate.score(vlm, records, on_bad_record="ignore")
    with pytest.raises(striate.UserError, match="--on-bad 'drop'; there are: stop, skip"):
        striate.read(data, on_bad="drop")
    with pytest.raises(striate.UserError, match="top, bottom, spread, not 'best'"):
        striate.score(vlm, records, metrics="block_influence").top("block_influence", 2, form="best")
