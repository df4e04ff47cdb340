"""The paper's recipes: read by the command line's own parser, and planned at full size without weights."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from paper import PAPER, full_size
from peft import get_peft_model
from transformers import AutoConfig

import striate
from striate.runs.cli import VERBS, parse_call
from striate.vlm import select

RECIPES = Path(__file__).parents[1] / "recipes"
# Trained: LoRA pairs of rank 128 on the seven (Phi-3: four, fused) matrices of a layer; the projector.
LAYER = {
    "llava-1.5-7b": 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    "llava-1.5-13b": 128 * (4 * (5120 + 5120) + 3 * (5120 + 13824)),
    "bunny-llama-3-8b": 128 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    "bunny-phi3-mini-4b": 128 * ((3072 + 9216) + (3072 + 3072) + (3072 + 16384) + (8192 + 3072)),
}
LAYERS = {"llava-1.5-13b": [0, 4, 8, 13, 17, 22, 26, 31, 35]}


def parsed(verb: str, words: list[str]) -> dict:
    module, _, attribute = VERBS[verb][0].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    return parse_call(verb, function, words)


@pytest.mark.parametrize("name", PAPER)
def test_recipe_says_what_the_paper_does(name: str) -> None:
    call = parsed("tune", ["--config", str(RECIPES / f"{name}.yaml")])
    options = call["options"]
    assert (call["method"], call["rank"], call["alpha"], call["dropout"]) == ("lora", 128, 256, 0.05)
    assert (options.learning_rate, options.projector_learning_rate) == (2e-4, 2e-5)
    assert (options.epochs, options.batch, options.max_length) == (1, 128, 2048)
    assert (options.warmup, options.schedule, options.weight_decay) == (0.03, "cosine", 0)
    assert (options.dtype, options.checkpointing) == ("bfloat16", "all")
    for devices in (1, 8):
        assert options.batch % (options.micro_batch * devices) == 0


@pytest.mark.parametrize("name", PAPER)
def test_recipe_is_planned_at_full_size(name: str) -> None:
    call = parsed("tune", ["--config", str(RECIPES / f"{name}.yaml")])
    vlm = striate.Vlm.of(full_size(name))
    region = striate.Region.parse(call["region"], vlm.depth)
    assert list(region) == LAYERS.get(name, [0, 4, 8, 12, 18, 22, 26, 30])
    plan = select(vlm, region)
    assert plan.total == PAPER[name][1]
    lora = striate.lora_config(vlm, region, rank=call["rank"], alpha=call["alpha"], dropout=call["dropout"])
    with torch.device("meta"):
        adapted = get_peft_model(vlm.model, lora)
    pairs = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert pairs == LAYER[name] * len(region)


@pytest.mark.parametrize("name", PAPER)
def test_the_pipeline_is_understood(name: str) -> None:
    script = (RECIPES / "paper.sh").read_text()
    case = re.search(rf"^{re.escape(name)}\) set -- (.*) ;;$", script, flags=re.MULTILINE)
    assert case
    known = {"NAME": name, "RUNS": f"runs/{name}", "CLIP": "clip", "SIGLIP": "siglip"}
    known |= dict(zip(("LLM", "VISION", "TEMPLATE", "CAPTIONS"), case[1].split(), strict=True))
    lines = re.findall(r"^(?:striate|train) (.*)$", script, flags=re.MULTILINE)
    calls = []
    for line in lines:
        verb, *words = shlex.split(re.sub(r"\$(\w+)", lambda found: known[found[1]], line))
        calls.append((verb, parsed(verb, [word.replace("recipes/", f"{RECIPES}/") for word in words])))
    assert [verb for verb, _ in calls] == ["assemble", "align", "assemble", "assemble", "tune"]
    blind, aligned, exported, start, tuned = (call for _, call in calls)
    assert str(aligned["model"]) == str(blind["out"])
    assert exported["export_projector"] == str(aligned["out"])
    assert start["projector"].parents[1] == exported["out"]
    assert str(tuned["model"]) == str(start["out"])
    assert (aligned["options"].batch, aligned["options"].learning_rate) == (256, 1e-3)


@pytest.mark.parametrize("name", PAPER)
def test_config_beside_the_recipe_is_what_the_import_makes(name: str) -> None:
    stored = AutoConfig.for_model(**json.loads((RECIPES / f"{name}.json").read_text()))
    assert stored.to_diff_dict() == full_size(name).config.to_diff_dict()
