"""scripts/serving: its tables are computed as they say, and mistakes are one line. vLLM itself: make serving."""

from __future__ import annotations

import importlib
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from pico import DEPTH, pico_llava

ROOT = Path(__file__).parents[1]
IMAGE = ("--image", "x.png", "--question", "what is this ?", "--out", "out.json")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(script("api", monkeypatch), "version", version)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "serving")
    return importlib.import_module(name)


def run(name: str, *words: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    return script(name, monkeypatch).main()


def test_without_vllm_every_script_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico_llava(tmp_path / "model")
    calls = {"api": (model, "x.png", "what is this ?"), "speed": (model, *IMAGE), "prove": ("--out", tmp_path / "out")}
    capsys.readouterr()
    for name, words in calls.items():
        assert run(name, *words, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith("vLLM is not installed here: pip install vllm")
        assert error.count("\n") == 1
    assert script("speed", monkeypatch).depth(model) == DEPTH


def test_a_run_without_a_checkpoint_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"verb": "score", "status": "finished"}')
    assert run("speed", tmp_path, *IMAGE, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path} has no checkpoint/ (score, finished)")
    assert run("speed", tmp_path / "gone", *IMAGE, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'gone'} is not a model")


def test_ratios_are_within_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is twice as slow in the second turn: the ratios of all turns are the same, the figures are not."""
    speed = script("speed", monkeypatch)
    whole = [speed.Answer(1.0, 10.0), speed.Answer(2.0, 5.0), speed.Answer(1.0, 10.0)]
    small = [speed.Answer(0.5, 15.0), speed.Answer(1.0, 7.5), speed.Answer(0.5, 15.0)]
    found = speed.summarize({"whole": whole, "small": small}, "small")
    assert found["ratios"] == {"first_token_seconds": 0.5, "decode_tokens_per_second": 1.5}
    assert (found["first_token_seconds"], found["decode_tokens_per_second"]) == (0.5, 15.0)


def test_answers_are_compared_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four answers one is equal, one ties at its second token, one differs, and one has another prompt."""
    prove = script("prove", monkeypatch)

    def answer(*tokens: int, prompt: int = 1, gap: float = 1.0, log_prob: float = -1.0) -> Any:
        return prove.Answer([prompt], list(tokens), [log_prob] * len(tokens), [gap] * len(tokens))

    expected = [answer(1, 2), answer(1, 3, gap=5e-4), answer(1, 4), answer(5)]
    found = [answer(1, 2, log_prob=-1.25), answer(1, 9), answer(1, 9), answer(5, prompt=2)]
    comparison = prove.compare(expected, found)
    assert comparison == prove.Comparison(records=4, prompts=3, equal=2, ties=1, largest=0.25, distinct=4)
    assert not comparison.proven
    assert prove.compare(expected, expected).proven


def test_a_script_writes_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(shutil.copy(ROOT / "docs" / "serving.md", tmp_path))
    before = page.read_text()
    monkeypatch.setattr(script("tables", monkeypatch), "PAGE", page)
    ratios = {"first_token_seconds": 0.75, "decode_tokens_per_second": 1.25}
    row = {"layers": 22, "first_token_seconds": 0.09, "decode_tokens_per_second": 12.5, "ratios": ratios}
    script("speed", monkeypatch).write_table({"versions": {"vllm": "1.0"}, "models": {"small": row}})
    start, end = "<!-- table of scripts/serving/speed.py -->", "<!-- end of table -->"
    head, _, rest = before.partition(start)
    assert page.read_text().startswith(f"{head}{start}\nvllm 1.0:\n\n| layers | time to first token |")
    assert page.read_text().endswith(f"\n| 22 | 90 ms | 0.75 | 12.5 | 1.25 |\n{end}{rest.partition(end)[2]}")
