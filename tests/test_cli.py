"""The command line as a user meets it: verbs in a process of their own, errors of one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from pico import pico_llava
from training import write_data

from striate.errors import UserError
from striate.runs.cli import VERBS, call_arguments, main, parse_call, parser_of
from striate.runs.options import help_of, options_of, signature_of
from striate.runs.scoring import score
from striate.runs.training import align, tune
from striate.train import ALIGN


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


def test_errors_are_one_line_with_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(tmp_path), "--data", "x.json", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not a model folder" in error
    assert main(["tunne"]) == 2
    assert "did you mean tune?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--regoin", "all"], "no option '--regoin'; nearest: --region"),
        (["--regoin=all"], "no option '--regoin'; nearest: --region"),
        (["--samp", "3"], "no option '--samp'; nearest: --samples"),
        (["--batch", "8", "more.json"], "'more.json' is in no option's place: options are --NAME VALUE"),
        (["--steps", "ten"], "--steps: 'ten' is not a whole number"),
        (["--method", "ful"], "--method: 'ful' is not one of auto, full, lora"),
        (["--learning-rate", "high"], "--learning-rate: 'high' is not a number"),
        (["--config", "typo.yaml"], "no option 'modle'; nearest: modules, model"),
        (["--config", "kind.yaml"], "--batch: '[1, 2]' is not a whole number"),
        (["--config", "gone.yaml"], "--config: File does not exist: "),
        (["--config", "torn.yaml"], "Problems parsing config: while parsing"),
        (["--config", "records.json"], "--config: a YAML file was expected, with a line OPTION: VALUE for each option"),
        (["--config", "empty.yaml"], "--config: a YAML file was expected"),
        (["--config", "image.png"], "--config: a YAML file was expected"),
        (["--steps"], "argument --steps: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"typo": "modle: x", "kind": "batch: [1, 2]", "torn": "batch: ["}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "records.json").write_text('[{"id": 1}]')
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert main(["tune", "some-model", "--data", "x.json", "--out", "run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"striate tune: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "m", "--data", "x.json", "--samples", "0"], "--samples 0: at least 1"),
        (["eval", "m", "--data", "x.json", "--batch", "0"], "--batch 0: at least 1"),
        (["eval", "m", "--data", "x.json", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
        (["eval", "m", "--data", "x.json", "--max-length", "-3"], "--max-length -3: at least 1"),
        (["eval", "m", "--tasks", "lm:arc_easy", "--samples", "0"], "--samples 0: at least 1"),
        (["score", "m", "--data", "x.json", "--samples", "0", "--out", "o"], "--samples 0: at least 1"),
        (["score", "m", "--data", "x.json", "--max-length", "0", "--out", "o"], "--max-length 0: at least 1"),
        (["cost", "m", "--micro-batch", "0"], "--micro-batch 0: at least 1"),
        (["sweep", "x.yaml", "--workers", "0"], "--workers 0: at least 1"),
    ],
)
def test_zero_is_a_number(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"striate {words[0]}: {message} was expected\n"


@pytest.mark.parametrize("device", ["gpu9", "cuda:77"])
def test_a_device_that_is_not_here(
    device: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    capsys.readouterr()
    for verb in ("eval", "score"):
        assert main([verb, str(model), "--data", str(data), "--out", str(out), "--device", device]) == 2
        assert re.fullmatch(rf"striate {verb}: --device {device} is not available: .*\n", capsys.readouterr().err)
        assert not out.exists()


def test_an_option_that_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--data", "x.json", "--out", "run"]) == 2
    assert capsys.readouterr().err == "striate tune: required: --model\n"


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "a [bold]b[] [/nothing] :car: $\\frac$ ü 100 %"
    here.mkdir(parents=True)  # the slash of a closing tag parts folders
    model, data, run = pico_llava(here / "m"), write_data(here), here / "run"
    more, scores = ["--device", "cpu", "--on-bad-record", "skip"], ["--metrics", "block_influence"]
    tune = ["tune", str(model), "--data", str(data), "--out", str(run), "--region", "1", "--steps", "1", *more]
    steps = [
        (["eval", str(run), "--data", str(data), "--max-new-tokens", "1", *more], f"listed in {run}/skipped.jsonl"),
        (["score", str(run), "--data", str(data), *scores, *more], f"wrote {run}; figures are in {run}/figures"),
        (["inspect", str(run), "--data", str(data)], "train.json:1: "),
        (["cost", str(model), "--gpu", "h100"], f"{model}\n"),
        (
            ["prune", str(run), "--remove", "1", "--by", "random", "--out", f"{run}+", "--data", str(data), *more[:2]],
            "+/",
        ),
        (["report", str(run), f"{run}+", "--out", str(here / "[i].html")], f"wrote {here}/[i].html"),
    ]
    assert main(tune) == 0
    assert f"finished: {run}; the model is in {run}/checkpoint" in capsys.readouterr().out
    (here / "3.png").write_text("no image")
    for words, shown in steps:
        assert main(words) == 0, words
        assert shown in capsys.readouterr().out
    assert main([*tune[:5], str(here)]) == 2
    assert f"striate tune: {here} is not empty" in capsys.readouterr().err


def test_a_name_that_a_terminal_has_no_letters_for(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "striate", "sweep", tmp_path / "größe.yaml"], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "gr\\xf6\\xdfe.yaml cannot be read" in said.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model folder"):
        main(["inspect", str(tmp_path), "--debug"])


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, attribute = VERBS[verb][0].partition(":")
    flags = {"--config", *(option.flag for option in options_of(getattr(import_module(module), attribute)))}
    shown = {}
    for wish in ("--help", "--help-all"):
        assert main([verb, wish]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: striate {verb}")
        assert not re.search(r"Union|Literal\[|<class|null|None", text)
        shown[wish] = re.findall(r"^  (--[a-z0-9-]+)", text, flags=re.MULTILINE)
    assert len(shown["--help-all"]) == len(flags)
    assert set(shown["--help-all"]) == flags
    assert set(shown["--help"]) <= flags
    assert len(shown["--help"]) == min(len(flags), 11)  # ten options and --config


@pytest.mark.parametrize("width", [80, 120])
def test_the_help_of_tune_is_in_groups(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    main(["tune", "--help"])
    short = capsys.readouterr().out
    assert short.endswith("31 more options: striate tune --help-all\n")
    assert "  --method auto|full|lora\n" in short
    main(["tune", "m", "--help-all"])
    text = capsys.readouterr().out
    groups = re.findall(r"^(\w+):$", text, flags=re.MULTILINE)
    assert groups == ["data", "region", "optimization", "memory", "run", "distributed", "recipe"]
    assert "  --resume [auto|changed]" in text
    assert "  --batch INT           records per optimizer step" in text
    assert max(map(len, (short + text).splitlines())) <= width


def test_help_names_no_empty_default_and_counts_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "--help"])
    main(["choose", "--help"])
    text = capsys.readouterr().out
    assert "words above the headline\n" in text
    assert text.endswith("1 more option: striate choose --help-all\n")


def test_a_recipe_sets_options_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: some-model\ndata: a.json\nregion: last:2\nlearning_rate: 0.5\nmax_grad_norm: 0\n")
    parser = parser_of("tune", tune)
    parsed = parser.parse_args(["--config", str(recipe), "--out", "run", "--region", "first:2", "--deterministic"])
    call = call_arguments(tune, parsed)
    assert call["model"] == "some-model"
    assert call["region"] == "first:2"
    assert call["options"].deterministic is True
    assert call["options"].learning_rate == 0.5
    assert call["options"].max_grad_norm == 0
    assert call["options"].batch == 128


def test_a_verb_with_some_of_the_training_options_keeps_the_defaults_of_the_others() -> None:
    words = ["m", "--data", "d.json", "--out", "run"]
    assert parse_call("align", align, [*words, "--epochs", "2"])["options"] == replace(ALIGN, epochs=2)
    with pytest.raises(UserError, match="no option '--packing'"):
        parse_call("align", align, [*words, "--packing", "off"])


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


def test_layers_reverted_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_data(tmp_path), tmp_path / "back"
    words = ["revert", str(model), "--backbone", str(model), "--groups", "0-1,2-3", "--visual", str(data)]
    assert main([*words, "--out", str(run), "--samples", "3", "--device", "cpu"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "reverted", "none", "0-1", "2-3", "all", "wrote",
    ]  # fmt: skip


def test_the_program_starts_fast_without_its_heavy_libraries() -> None:
    code = "import sys; from striate.runs.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_nothing_but_one_line_is_printed(tmp_path: Path) -> None:
    # Libraries have notes of their own when they are imported, which only a new process shows. What only training needs
    # stays away: a fifth of the time of a start.
    script = (
        "import sys; from striate.runs.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' in sys.modules and not {'peft', 'bitsandbytes'} & {*sys.modules}; "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "sweep", str(tmp_path / "nowhere.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    nowhere = tmp_path / "nowhere.yaml"
    assert said.stderr.splitlines() == [f"striate sweep: {nowhere} cannot be read: No such file or directory"]


def test_help_says_nothing_but_the_help() -> None:
    asked = subprocess.run([sys.executable, "-m", "striate", "tune", "--help"], capture_output=True, text=True)
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: striate tune")
    assert asked.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_a_signature_read_from_the_source_is_that_of_the_verb(verb: str) -> None:
    module, _, name = VERBS[verb][0].partition(":")
    function, light = getattr(import_module(module), name), signature_of(VERBS[verb][0])
    assert light is not function
    helps = [help_of(verb, one, subject="model", everything=True) for one in (function, light)]
    assert helps[0] == helps[1]
    assert [str(option) for option in options_of(function)] == [str(option) for option in options_of(light)]


@pytest.mark.parametrize(
    ("words", "code"), [(["tune", "--help"], 0), (["tune", "m", "--bach", "4"], 2), (["tune", "m", "--batch", "x"], 2)]
)
def test_help_and_wrong_options_import_nothing_slow(words: list[str], code: int) -> None:
    script = (
        "import sys; from striate.runs.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'peft', 'numpy', 'matplotlib'} & {*sys.modules}; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(("said", "shown"), [((), "interrupted"), (("stopped in step 3",), "stopped in step 3")])
def test_an_interruption_is_one_line(
    said: tuple[str, ...], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr("striate.runs.cli.run_verb", interrupted)
    assert main(["card", "run"]) == 130
    assert capsys.readouterr().err.strip() == f"striate card: {shown}"
