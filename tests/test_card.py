"""The model card: what the hub reads, what a run did, its results; refreshed without losing what was added by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from pico import pico_llava
from training import OPTIONS, tune

from striate.runs.card import MARK, base_card, split, write_card
from striate.runs.cli import main
from striate.runs.pruning import prune
from striate.runs.run import Run

BASE = "---\nlicense: other\nlicense_name: pico\nlanguage: [en]\ntags: small\n---\n\n# Pico\n\nA model.\n"
RESULTS = {"tasks": {"colors": {"metric": "exact_match", "value": 0.75, "stderr": 0.125, "n": 12}}, "data": "t.json"}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("card")
    model = pico_llava(folder / "llava")
    (model / "README.md").write_text(BASE)
    return tune(model, data, folder / "run", OPTIONS)


def read(run: Run) -> tuple[dict, str]:
    text = (run.checkpoint / "README.md").read_text()
    return split(text)[0], text


def test_a_trained_checkpoint_has_the_license_of_its_base(run: Run) -> None:
    front, text = read(run)
    assert (front["license"], front["license_name"], front["language"]) == ("other", "pico", ["en"])
    assert front["tags"] == ["striate", "visual-region"]
    assert "base_model" not in front  # a folder is not a model of the hub
    assert "It was not evaluated" in text
    assert "Needs transformers 5" in text
    assert ModelCard(text).data.license == "other"


def test_the_verb_adds_results_and_keeps_what_was_added(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.checkpoint / "README.md"
    path.write_text(path.read_text().replace(MARK, f"By hand.\n\n{MARK}\n\nGone.").replace("other", "mit"))
    run.write_results(RESULTS)
    assert main(["card", str(run.path)]) == 0
    assert f"hf upload YOUR_NAME/run {run.checkpoint}" in capsys.readouterr().out
    front, text = read(run)
    assert front["license"] == "mit"
    assert "| colors | exact_match | 0.750 ± 0.125 | 12 |" in text
    assert "By hand." in text
    assert "Gone." not in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("colors", "exact_match", 0.75)
    assert main(["card", str(run.path)]) == 0
    assert path.read_text() == text


def test_what_is_made_from_it_names_the_model_of_the_hub(run: Run, data: Path, tmp_path: Path) -> None:
    path = run.checkpoint / "README.md"
    write_card(run.checkpoint, run.info | {"parent": "someone/pico"})
    assert read(run)[0]["base_model"] == "someone/pico"
    prune(run.path, out=tmp_path / "smaller", layers="0", data=data, options=OPTIONS)
    front, text = read(Run.open(tmp_path / "smaller"))
    assert front["base_model"] == "someone/pico"
    assert "✂□□□" in text
    assert text.count(MARK) == text.count("## Use") == 1
    assert text.index("✂□□□") < text.index(MARK)
    assert "`1,3`" in text  # what the training did
    assert path.is_file()


@pytest.mark.parametrize("front", ["[1, 2", "- a\n- b", "license: [", ""])
def test_front_matter_that_cannot_be_read_is_none(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# Name\n")
    assert split(base_card(str(tmp_path))) == ({}, "# Name\n")


def test_a_base_without_a_card_has_to_be_looked_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": "4.57.1"}))
    path = write_card(tmp_path, {"name": "x", "parent": "nobody/nothing"}, body="# x\n")
    front, body = split(path.read_text())
    assert "license" not in front
    assert body == "# x\n"
    assert "names no license: look it up" in path.read_text()
    assert "Needs transformers" not in path.read_text()
    assert yaml.safe_load(path.read_text().split("---\n")[1]) == front


def test_a_run_without_a_checkpoint_has_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"verb": "score", "status": "finished"}')
    assert main(["card", str(tmp_path)]) == 2
    assert "has no checkpoint/ (score, finished)" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "gone")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
