"""The surface that users rely on: verbs, public names, the order of imports, commands in the README."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import striate
from striate.cli import VERBS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "striate"
# A module may import those before it; the design of the whole in one line.
ORDER = [
    "errors", "options", "region", "run", "content", "processes", "checkpoint", "vlm", "assemble", "data", "trace",
    "plot", "score", "train", "cost", "prune", "evaluate", "sweep", "report", "demo", "cli", "__main__",
]  # fmt: skip


def test_verbs() -> None:
    assert list(VERBS) == [
        "inspect", "cost", "assemble", "align", "tune", "score", "revert", "prune", "eval", "sweep", "report", "demo",
    ]  # fmt: skip


def test_public_names() -> None:
    assert set(striate.__all__) == {
        "Plan", "Region", "Run", "TrainOptions", "UserError", "Vlm", "align", "load", "lora_config", "tune",
    }  # fmt: skip
    for name in striate.__all__:
        assert inspect.getdoc(getattr(striate, name)), name
    with pytest.raises(AttributeError, match="nothing_here"):
        striate.nothing_here  # noqa: B018


def module_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_modules_import_only_from_those_before_them() -> None:
    assert {module_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"} == set(ORDER)
    for path in SOURCE.rglob("*.py"):
        own = module_of(path)
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.startswith("striate."):
                    other = name.split(".")[1]
                    assert ORDER.index(other) <= ORDER.index(own), f"{path.name} imports {name}"


def test_public_functions_are_documented() -> None:
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    verbs = re.findall(r"^striate (\w+)", readme, flags=re.MULTILINE)
    assert verbs
    assert set(verbs) <= set(VERBS)
    for target in re.findall(r"^make (\w+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for flag in set(re.findall(r"(?<= )--[a-z-]+", "\n".join(re.findall(r"^striate .*$", readme, flags=re.MULTILINE)))):
        assert any(flag in options_of(verb) for verb in set(verbs)), flag


def options_of(verb: str) -> str:
    from striate.cli import parser_of

    module, _, attribute = VERBS[verb][0].partition(":")
    return parser_of(verb, getattr(importlib.import_module(module), attribute)).format_help()
