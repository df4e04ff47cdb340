"""The config of an untrusted checkpoint, checked before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedConfig

from striate.errors import UserError, first_line
from striate.weights import check_folder

# Config keys for a number of layers, and an upper limit: building a layer takes time even on the meta device.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1000
ADAPTER = "adapter_config.json"


def check_config(source: str) -> PreTrainedConfig:
    """The config of a vision-language model, checked before any weight is read.

    Raises:
        UserError: there is no config, it is of another kind of model or has an absurd number of layers; the folder
            holds unmerged adapters, or `check_folder` rejects it.
    """
    check_folder(Path(source))
    if (adapter := Path(source) / ADAPTER).is_file():
        how = _how_to_merge(adapter)
        raise UserError(
            f"{source} holds adapters that are not merged: merge them into the model first ({how})",
            see="unmerged-adapters",
        )
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        odd = _odd_size(config.to_dict())
    except Exception as error:  # the file is untrusted
        raise UserError(
            f"no model at {source!r}: expected a model folder, a run folder or a hub id ({first_line(error)})"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{source} holds a {config.model_type} model, which is not an image-text-to-text model; "
            "give a vision-language model, or make one with `striate assemble`",
            see="not-a-vision-language-model",
        )
    if odd:
        raise UserError(
            f"{source}: its config has {odd}, which is out of range for any model", see="untrusted-checkpoint"
        )
    return config


def _how_to_merge(adapter: Path) -> str:
    """Python code that merges an adapter into its base model."""
    try:
        base = str(json.loads(adapter.read_bytes())["base_model_name_or_path"] or "BASE")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = "BASE"
    return (  # repr: text from an untrusted file stays a string literal when the code is pasted
        f"model = AutoModelForImageTextToText.from_pretrained({base!r}); "
        f"PeftModel.from_pretrained(model, {str(adapter.parent)!r}).merge_and_unload().save_pretrained('merged'); "
        f"AutoProcessor.from_pretrained({base!r}).save_pretrained('merged')"
    )


def _odd_size(config: Any) -> str:
    """The first absurd size in a config, which would take long to fail; empty when there is none."""
    if not isinstance(config, dict):
        return ""
    for key, value in config.items():
        if isinstance(value, int) and (value > MOST_LAYERS if key in LAYERS else key == "hidden_size" and value < 1):
            return f"{key} {value:,}"
    return next(filter(None, map(_odd_size, config.values())), "")
