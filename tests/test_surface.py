"""The surface that users rely on: verbs, public names, the order of imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import striate
from striate.runs.cli import VERBS
from striate.runs.options import options_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "striate"
# A module may import those before it; the design of the whole in three lines: the library, the runs, the studies.
LIBRARY = [
    "errors", "console", "distributed", "region", "weights", "vlm", "data", "routing", "trace", "plot", "scores",
    "roundtrip", "train", "prune", "evaluation", "exploration",
]  # fmt: skip
ORDER = [*LIBRARY, "runs", "studies", "__main__"]
# Every option of every verb: a new one is a decision.
OPTIONS = {
    "inspect": "model data images region modules record",
    "cost": (
        "model region route modules method projector rank batch micro_batch checkpointing image_tokens text_tokens "
        "answer_tokens gpu devices shard link fit plot"
    ),
    "assemble": (
        "out vision llm projector import export_projector template aspect feature_layer pool image_size "
        "patch_size dtype seed"
    ),
    "align": (
        "model data out images tower route resume epochs steps batch micro_batch learning_rate "
        "max_length on_bad_record checkpointing frozen_layers shard workers seed device dtype attn "
        "report_to"
    ),
    "tune": (
        "model data out images region route modules samples method projector rank alpha dropout "
        "resume epochs steps batch micro_batch learning_rate projector_learning_rate warmup schedule optimizer "
        "weight_decay max_grad_norm max_length truncate_text on_bad_record packing checkpointing "
        "frozen_layers skip_nonfinite shard save_steps workers seed deterministic device dtype attn "
        "report_to"
    ),
    "score": ("model data images out metrics backbone by samples batch max_length seed on_bad_record device dtype"),
    "revert": ("model backbone groups out visual text images samples batch max_length seed on_bad_record device dtype"),
    "choose": "model data images budget gpu out samples batch on_bad_record device dtype",
    "prune": (
        "model out region remove by layers data images scores samples dry_run heal heal_layers "
        "steps batch micro_batch learning_rate max_length seed device attn"
    ),
    "eval": (
        "model data images split out tasks task_path max_new_tokens samples batch max_length seed "
        "on_bad_record device dtype"
    ),
    "ask": "model question image against route max_new_tokens device",
    "card": "run",
    "sweep": "file executor workers only redo dry_run",
    "report": "runs out reference title page_only",
    "explore": ("model data images out region backbone live against host port samples seed device dtype"),
    "demo": "out seed quick",
}


def test_verbs() -> None:
    assert list(VERBS) == [
        "inspect", "cost", "assemble", "align", "tune", "score", "revert", "choose", "prune", "eval", "ask", "card",
        "sweep", "report", "explore", "demo",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_options(verb: str) -> None:
    module, _, attribute = VERBS[verb][0].partition(":")
    options = options_of(getattr(importlib.import_module(module), attribute))
    assert [option.name for option in options] == OPTIONS[verb].split()


def test_public_names() -> None:
    assert striate.__all__ == [
        "Collator", "Pruned", "Record", "Records", "Region", "Results", "Scores", "Selection", "TrainOptions",
        "Trained", "UserError", "Vlm", "align", "ask", "bypass", "drop_layers", "evaluate", "explore", "load",
        "lora_config", "read", "report", "revert", "route", "score", "select", "tune",
    ]  # fmt: skip
    for _ in range(2):  # a module of the same name must not take a function's place once it is imported
        for name in striate.__all__:
            assert inspect.getdoc(getattr(striate, name)), name
            assert not inspect.ismodule(getattr(striate, name)), name
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


def test_every_console_shows_names_as_they_are() -> None:
    makers = [
        path for path in SOURCE.rglob("*.py") if re.search(r"\bConsole\(|\bProgress\(|\btrack\(", path.read_text())
    ]
    assert SOURCE / "console.py" in makers
    for path in makers:
        for made in re.findall(r"\b(?:Progress|track)\(.*", path.read_text()):
            assert "console=console(" in made, f"{path.name}: {made}"
        assert ("Console(" in path.read_text()) == (path.name == "console.py"), path


def test_public_functions_are_documented() -> None:
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
