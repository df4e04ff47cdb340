"""The command line as a user meets it: verbs in a process of their own, errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pico import pico_llava
from test_train import write_data

from striate.cli import VERBS, call_arguments, main, parser_of
from striate.score import score
from striate.train import tune


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llava(tmp_path_factory.mktemp("cli") / "llava")


def test_a_pipeline_of_verbs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_data(tmp_path), tmp_path / "run"
    words = [
        "tune",
        str(model),
        "--data",
        str(data),
        "--region",
        "1",
        "--steps",
        "2",
        "--batch",
        "4",
        "--device",
        "cpu",
    ]
    assert main([*words, "--out", str(run), "--learning-rate", "0.01", "--method", "full"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["eval", str(run), "--data", str(data), str(data), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert main(["inspect", str(run), "--data", str(data), "--region", "last:1"]) == 0
    shown = capsys.readouterr().out
    assert "[16 image tokens]" in shown
    assert "···■" in shown
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").is_file()


def test_errors_are_one_line_and_tell_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(tmp_path), "--data", "x.json", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no model folder" in error
    assert main(["tunne"]) == 2
    assert "did you mean tune?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--data", "x.json", "--out", "run"])
    assert "required: model" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        main(["inspect", str(tmp_path), "--debug"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: striate " + verb in shown
    assert "--config" in shown


def test_a_recipe_sets_options_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: some-model\ndata: a.json\nregion: last:2\nlearning_rate: 0.5\ntrainer: {optim: sgd}\n")
    parser = parser_of("tune", tune)
    parsed = parser.parse_args(["--config", str(recipe), "--out", "run", "--region", "first:2", "--allow-urls"])
    call = call_arguments(tune, parsed)
    assert call["model"] == "some-model"
    assert call["region"] == "first:2"
    assert call["allow_urls"] is True
    assert call["options"].learning_rate == 0.5
    assert call["options"].trainer == {"optim": "sgd"}
    assert call["options"].batch == 128


def test_an_option_of_several_words_keeps_its_default() -> None:
    parser = parser_of("score", score)
    assert call_arguments(score, parser.parse_args(["--model", "m"]))["metrics"] == "all"
    several = ["--model", "m", "--metrics", "gradient,image_attention", "block_influence"]
    assert call_arguments(score, parser.parse_args(several))["metrics"] == [
        "gradient,image_attention",
        "block_influence",
    ]


def test_scores_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_data(tmp_path), tmp_path / "scores"
    assert main(["score", str(model), "--data", str(data), "--out", str(run), "--samples", "3", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "image_attention  0." in shown
    assert "█" in shown
    assert f"wrote {run}; figures are in {run}/figures" in shown
    assert main(["inspect", str(model), "--region", f"top:25%@{run}:gradient"]) == 0
    assert "■" in capsys.readouterr().out
    assert main(["inspect", str(model), "--region", f"top:25%@{run}:gradiant"]) == 2
    assert "has no score 'gradiant'; nearest: gradient" in capsys.readouterr().err


def test_layers_put_back_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_data(tmp_path), tmp_path / "back"
    words = ["revert", str(model), "--backbone", str(model), "--groups", "0-1,2-3", "--visual", str(data)]
    assert main([*words, "--out", str(run), "--samples", "3", "--device", "cpu"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "put", "none", "0-1", "2-3", "all", "wrote",
    ]  # fmt: skip


def test_the_program_starts_fast_without_its_heavy_libraries() -> None:
    code = "import sys; from striate.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_line_is_all_that_is_said(tmp_path: Path) -> None:
    # Libraries have notes of their own when they are imported, which only a new process shows.
    command = [sys.executable, "-m", "striate", "sweep", str(tmp_path / "nowhere.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    nowhere = tmp_path / "nowhere.yaml"
    assert said.stderr.splitlines() == [f"striate sweep: {nowhere} cannot be read: No such file or directory"]


def test_help_says_nothing_but_the_help() -> None:
    asked = subprocess.run([sys.executable, "-m", "striate", "tune", "--help"], capture_output=True, text=True)
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: striate tune")
    assert asked.stderr == ""
