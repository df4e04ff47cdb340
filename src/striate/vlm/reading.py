"""Read a model with `transformers`: check its config and size first, then quantized and unexpected weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from striate.errors import UserError, first_line
from striate.weights import check_folder, tensors, weight_files

# Names of tensors that quantization methods store with or instead of a weight.
_QUANTIZED = re.compile(
    r"(weight_scale(_inv)?|weight_scale_2|weight_packed|weight_shape|weight_zero_point|qweight|qzeros|scales|g_idx|"
    r"_scales|_blocks|absmax|quant_map|quant_state\.\w+|SCB|codebooks|W_q)$"
)
_CODES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
PLAIN = ("fp8", "bitsandbytes")
"""Methods whose weights can be dequantized."""
# Layers above the last for multi-token prediction, which only speed up generation.
_MULTI_TOKEN = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp\w*|nextn\w*)\b")
# Config keys for a number of layers, and an upper limit: building a layer takes time even on the meta device.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1000
ADAPTER = "adapter_config.json"


def model_folder(model: str | Path) -> str | Path:
    """The checkpoint of a run folder; any other path or hub id is returned unchanged.

    Raises:
        UserError: the run has no checkpoint.
    """
    info, checkpoint = Path(model) / "run.json", Path(model) / "checkpoint"
    if not info.is_file():
        return model
    if not checkpoint.is_dir():
        run = json.loads(info.read_bytes())
        raise UserError(
            f"{model} has no checkpoint/ ({run.get('verb')}, {run.get('status')}): choose a run that has saved a model",
            see="not-a-run-folder",
        )
    return checkpoint


def quantization(config: PreTrainedConfig) -> str:
    """The quantization method of the weights on disk: `fp8`, `bitsandbytes`, `gptq` ...; empty if not quantized."""
    places = (config, config.get_text_config(decoder=True))
    settings: Any = next(filter(None, (getattr(one, "quantization_config", None) for one in places)), {})
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    return str(fields.get("quant_method", "by an unknown method")) if fields else ""


def check_size(
    config: PreTrainedConfig, source: str, dtype: str | torch.dtype = "auto", device: torch.device | None = None
) -> None:
    """Check, before anything is allocated, that the model fits into the total memory of its device (default: the CPU).

    Raises:
        UserError: the weights need more memory than the device has.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception:  # loading reports the error; some families cannot be built on the meta device
        return
    in_memory: Any = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, config.dtype or torch.float32)
    needed = in_memory.itemsize * sum(p.numel() for p in model.parameters())
    if quantization(config) and Path(source).is_dir():
        needed = min(needed, sum(file.stat().st_size for file in weight_files(Path(source))))
    total = _total_bytes(device or torch.device("cpu"))
    if needed > total:
        holder = "this machine" if device is None or device.type == "cpu" else device
        raise UserError(
            f"{source}: its weights take {needed / 1e9:,.0f} GB, and {holder} has {total / 1e9:.0f} GB",
            see="out-of-memory",
        )


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def read_model(
    source: str,
    config: PreTrainedConfig,
    *,
    dtype: str | torch.dtype = "auto",
    attn: str | None = None,
    dequantize: bool = False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model as `transformers` loads it, and warnings about it.

    It is on the CPU, with its weights memory-mapped: they take memory only once they are changed. With `dequantize`,
    quantized weights are dequantized, and the model is saved as if it had never been quantized.

    Raises:
        UserError: the model does not load, lacks weights, has more layers than its config, or has quantized weights
            without an entry in its config, or of a method that cannot be dequantized.
    """
    method, notes = quantization(config), []
    options = dequantize_options(method, source) if method and dequantize else {}
    stored = tensors(Path(source)) if Path(source).is_dir() else []
    packed = next((one.name for one in stored if _QUANTIZED.search(one.name) or one.code in _CODES), "")
    if method in PLAIN and stored and not packed:  # merged or dequantize_model, but with the old config
        options = {"config": _without_quantization(config)}
        notes.append(
            f"{source} has unquantized weights, but its config.json says {method}: they are loaded as they are"
        )
        method = ""
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attn, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **options,
        )  # fmt: skip
        model, report = loaded
        if method and dequantize:
            model = dequantize_model(model)
            plain = str(model.dtype).removeprefix("torch.")
            notes.append(
                f"{source} is quantized ({method}): its weights are converted to {plain}, also when it is saved"
            )
        if dequantize or not method:
            _add_tower_prefix(model)
    except Exception as error:  # each family raises its own errors for a wrong config
        if packed and not method:
            raise _undeclared(source, packed) from error
        raise UserError(f"cannot load the model in {source}: {first_line(error)}") from error
    notes.append(_check_report(model, report, source, quantized=bool(method)))
    return model, tuple(filter(None, notes))


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove the quantization settings from the config, in place."""
    for one in (config, config.get_text_config(decoder=True)):
        vars(one).pop("quantization_config", None)
    return config


def _undeclared(source: str, packed: str) -> UserError:
    return UserError(
        f"{source} holds quantized weights ({packed}), but its config.json has no quantization_config: restore it, or "
        "use the checkpoint before quantization"
    )


def dequantize_options(method: str, source: str) -> dict[str, Any]:
    """Options of `from_pretrained` to dequantize the weights.

    Raises:
        UserError: the method is not supported.
    """
    if method in PLAIN:
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)} if method == "fp8" else {}
    raise UserError(
        f"{source} is quantized ({method}) and cannot be trained: train the bfloat16 or float16 checkpoint before "
        "quantization, and quantize the result"
    )


def dequantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """Dequantize the model, and remove all traces of its quantization.

    Otherwise `save_pretrained` writes FP8 values without the config for them, or fails (transformers 5.23).
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and getattr(quantizer.quantization_config, "dequantize", False):
        quantizer.remove_quantization_config(model)
    elif quantizer is not None:
        model = model.dequantize(model.config.dtype)
    _without_quantization(model.config)
    read = vars(model).pop("_weight_conversions", None) or ()
    keep_prefixes(model, {one.scope_prefix for one in read if isinstance(one, PrefixChange)})
    return model


def keep_prefixes(model: PreTrainedModel, parts: Collection[str | None]) -> None:
    """Let `save_pretrained` write the weights of these parts under the names that published checkpoints have.

    transformers 5 drops a prefix when it reads them (`vision_model.` in the tower of LLaVA), and writes it only for a
    model that it has read so. vLLM and transformers 4 know no other names; the latter would start with a random tower.
    """
    vars(model)["_weight_conversions"] = [
        one
        for one in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(one, PrefixChange) or one.scope_prefix in parts
    ]


def _add_tower_prefix(model: PreTrainedModel) -> None:
    """As `keep_prefixes`, for the tower of a model whose weights are stored under the shorter names."""
    read = vars(model).get("_weight_conversions") or []
    if not any(_is_of_tower(one) for one in read):
        known = get_model_conversion_mapping(model, add_legacy=False)
        vars(model)["_weight_conversions"] = [*read, *filter(_is_of_tower, known)]


def _is_of_tower(conversion: Any) -> bool:
    return isinstance(conversion, PrefixChange) and conversion.scope_prefix == "vision_tower"


def _check_report(model: PreTrainedModel, report: dict[str, Any], source: str, *, quantized: bool) -> str:
    """Check the missing and unexpected keys; returns a warning about harmless ones.

    Raises:
        UserError: weights are missing, or unexpected weights show that the config is wrong.
    """
    kind = model.config.model_type
    if missing := report["missing_keys"]:
        adapted = any("lora_" in name for name in report["unexpected_keys"])
        why = ", and has LoRA adapters that are not merged: save the model after merge_and_unload()" if adapted else ""
        raise UserError(
            f"{source} lacks {len(missing)} weights of a {kind} model, such as {min(missing)}{why}",
            see="missing-weights",
        )
    if not (unexpected := sorted(report["unexpected_keys"])):
        return ""
    packed = next((name for name in unexpected if _QUANTIZED.search(name)), None)
    if packed and not quantized:
        raise _undeclared(source, packed)
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    ahead = {_surplus_layer(name, lists) for name in unexpected if _MULTI_TOKEN.search(name)}
    if surplus := next((one for name in unexpected if (one := _surplus_layer(name, lists)) and one not in ahead), None):
        depth = lists[surplus.rpartition(".")[0]]
        raise UserError(
            f"{source} holds weights of {surplus}, but its config.json has only {depth} layers", see="missing-weights"
        )
    return f"{source} has {len(unexpected)} weights that a {kind} model does not use, such as {unexpected[0]}"


def _surplus_layer(name: str, lists: dict[str, int]) -> str:
    """The name of a weight's layer if its index is past the end of the model's layer list, else empty."""
    for match in re.finditer(r"\.(\d+)\.", name):
        if int(match[1]) >= lists.get(name[: match.start()], math.inf):
            return name[: match.end() - 1]
    return ""


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
