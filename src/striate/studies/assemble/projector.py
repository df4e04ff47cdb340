"""The projector alone: read under original or transformers names, written in the format of LLaVA and Bunny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from striate.errors import UserError
from striate.runs.run import Run
from striate.studies.assemble.original import FAMILIES, PROJECTOR, TOWERS, local, read_json
from striate.weights import file_tensors, tensors

# Of `nn.Sequential(Linear, GELU, Linear)` in the original, and of transformers' projector of LLaVA.
NAMES = {"0": "linear_1", "2": "linear_2"}


def load_projector(projector: nn.Module, path: Path) -> None:
    """Put trained weights into a projector with `linear_1` and `linear_2`.

    `path` is safetensors or an `mm_projector.bin`, with original or transformers names.

    Raises:
        UserError: the file cannot be read or is of another size.
    """
    if not path.is_file():
        raise UserError(f"cannot read the projector {path}: no such file")
    weights = {_plain(one.name): one.read() for one in file_tensors(path)}
    expected = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise UserError(f"the projector {path} does not fit: found {found}, expected {expected}")
    projector.load_state_dict(weights)


def _plain(name: str) -> str:
    """`model.mm_projector.0.weight` and `multi_modal_projector.linear_1.weight` as `linear_1.weight`."""
    part, _, kind = name.rpartition(".")
    layer = part.rpartition(".")[2]
    return f"{NAMES.get(layer, layer)}.{kind}"


def export_projector(model: str, out: Path) -> Run:
    """Write a model's projector as a stage-1 checkpoint of LLaVA or Bunny: `mm_projector.bin` and its `config.json`.

    Only the projector's tensors are read. The result is what `--pretrain_mm_mlp_adapter` takes there and `--import`
    and `--projector` here.

    Raises:
        UserError: the model is not a LLaVA of transformers.
    """
    folder = local(model)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llava":
        raise UserError(f"{model} is a {config.get('model_type')} model: only a llava has LLaVA's projector")
    layers = {plain: original for original, plain in NAMES.items()}
    weights: dict[str, Tensor] = {}
    for one in tensors(folder, pickles=True):
        if "multi_modal_projector." in one.name:
            layer, _, kind = one.name.rpartition("multi_modal_projector.")[2].partition(".")
            weights[f"model.mm_projector.{layers[layer]}.{kind}"] = one.read().clone()
    if len(weights) != 2 * len(NAMES):
        raise UserError(f"{model}: {2 * len(NAMES)} tensors of a projector were expected, found {len(weights)}")
    run = Run.create(out, verb="assemble", options={"export_projector": model}, parent=model)
    with run.recording():
        run.checkpoint.mkdir()
        torch.save(weights, run.checkpoint / PROJECTOR)
        text = json.dumps(_original_config(config), indent=2) + "\n"
        (run.checkpoint / "config.json").write_text(text, encoding="utf-8")
    return run


def _original_config(config: dict[str, Any]) -> dict[str, Any]:
    """A plain LLaVA's config as the originals write theirs: all in one, `mm_` before what is about images."""
    text, vision = dict(config["text_config"]), config["vision_config"]
    side = "bunny" if vision["model_type"].startswith("siglip") else "llava"
    kind = next((k for k, f in FAMILIES.items() if k.startswith(side) and f.text == text["model_type"]), "llava_llama")
    sizes = ("model_type", "hidden_size", "image_size", "patch_size")
    tower = next((n for n, known in TOWERS.items() if all(known[k] == vision.get(k) for k in sizes)), None)
    return text | {
        "model_type": kind,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_select_layer": config["vision_feature_layer"],
        **({"mm_vision_tower": tower} if tower else {}),
    }
