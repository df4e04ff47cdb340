"""What striate does with every type behind `AutoModelForImageTextToText`: the one source of docs/families.md
(`python scripts/families.py`) and of the tests that prove its cells."""

from __future__ import annotations

from typing import Any

import pico
import processors
import templates
import transformers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from striate.errors import UserError
from striate.prune.protected import protected_by_config
from striate.vlm import Vlm

TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
STEPS = ("tune full", "tune LoRA", "score", "reload")

# What the default config of a type lacks. Towers of timm, which is not installed here, make place for SigLIP's.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SIGLIP = {"model_type": "siglip_vision_model"}
COMPLETED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": _SIGLIP},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse"] * 32}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "moe_intermediate_size": 64, "top_k_experts": 2}},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 8711, "<image>": 3}},
    "fast_vlm": {"vision_config": _SIGLIP},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {"vision_config": {**_SIGLIP, "model_args": {"embed_dim": 768}}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 1, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 1024,
            "indexer_compress_ratio": 4,
        }
    },
}  # fmt: skip

# The pico models that the whole path is tried on, by type: with the family's own processor, or with a `PicoReader`.
OWN = [name for name in processors.FAMILIES if name != "mistral3"]  # whose processor needs torchvision
READ = [name for name in {**pico.MORE, **pico.OTHERS} if name not in OWN and not name.startswith("llava_")]

# Tried with their processor, and not the whole path, for its time: their parts are those of others.
ALIKE = ("exaone4_5", "glm46v", "hyperclovax_vision_v2")

# Processors that records cannot be read with, or that no tiny one can be made of; others that are missing below need
# torchvision, which is not installed, or have no name in transformers.
_NO_TEMPLATE = "it takes no chat template"
_NO_TOKEN = "it has no image token"
_TORCHVISION = "it needs torchvision"
UNREAD: dict[str, str] = {
    "blip-2": _NO_TEMPLATE,
    "deepseek_ocr2": "its model has features for images of 768 and 1024 pixels alone",
    "fuyu": _NO_TEMPLATE,
    "git": _NO_TOKEN,
    "instructblip": _NO_TEMPLATE,
    "instructblipvideo": _NO_TEMPLATE,
    "mistral3": _TORCHVISION,
    "mistral_large4": _TORCHVISION,
    "pp_chart2table": _NO_TOKEN,
}

# Types whose pico models are cut and reloaded in tests/test_prune_families.py.
CUT = {*templates.FAMILIES, *(settings.get("family", name) for name, settings in pico.MORE.items()), "llama4"}


# Types that tests/test_route.py sends images through two of four layers of.
ROUTED = {*templates.FAMILIES, *OWN, *(settings.get("family", name) for name, settings in pico.MORE.items())}
NOT_ROUTED = {
    "lfm2_vl": "",
    "lfm3_vl": "yes, with its convolutions in the route",
    "mllama": "no: its cross-attention has no keys and values of each token",
    "qwen3_5": "yes, with its linear attention in the route",
    "qwen3_5_moe": "yes, with its linear attention in the route",
}


def config_of(kind: str) -> Any:
    """The default config of a type, completed."""
    return AutoConfig.for_model(kind, **COMPLETED.get(kind, {}))


def parts(kind: str) -> str:
    """`yes`, or why the parts of a type are not found."""
    config = config_of(kind)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "no: its config is behind no class for images and text"
    try:
        Vlm.on_meta(config)
    except UserError as error:
        reason = str(error).removeprefix(f"{kind} ").removeprefix(f"{kind}: ")
        return f"no: {reason}"
    return "yes"


def processor(kind: str) -> str:
    """`yes` where records are read with the type's own processor, why they cannot be, or nothing."""
    if kind in OWN:
        return "yes"
    if kind in UNREAD:
        return f"no: {UNREAD[kind]}"
    if PROCESSOR_MAPPING_NAMES.get(kind) is None:
        return "no: transformers names none"
    return "" if "pil" in (IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}) else f"no: {_TORCHVISION}"


def prune(kind: str) -> str:
    """`protected: why` where a type has layers that cannot be cut, `yes` where cutting is proven, or nothing."""
    config = config_of(kind)
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or 0
    found = protected_by_config(config, depth)
    if found:
        reasons = "; ".join(dict.fromkeys(found.values()))
        return f"protected: {'all' if len(found) == depth else len(found)} of {depth} layers: {reasons}"
    return "yes" if kind in CUT else ""


def row(kind: str) -> list[str]:
    """The cells of a type."""
    found = parts(kind)
    if found != "yes":
        return [f"`{kind}`", found, *[""] * (len(STEPS) + 3)]
    tried = kind in {*OWN, *READ} - {*ALIKE}
    steps = ["yes" if tried else "" for _ in STEPS]
    routed = NOT_ROUTED.get(kind, "yes" if kind in ROUTED else "")
    return [f"`{kind}`", found, processor(kind), *steps, prune(kind), routed]


def page() -> str:
    """docs/families.md."""
    transformers.logging.set_verbosity_error()  # some default configs are talked about
    rows = [row(kind) for kind in TYPES]
    found = sum(cells[1] == "yes" for cells in rows)
    read = sum(cells[2] == "yes" for cells in rows)
    whole = sum(cells[3:7] == ["yes"] * 4 for cells in rows)
    header = ["type", "parts", "processor", *STEPS, "prune", "route"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return INTRODUCTION.format(
        types=len(rows), version=transformers.__version__, found=found, read=read, whole=whole, completed=len(COMPLETED)
    ) + "\n".join(lines) + "\n"  # fmt: skip


INTRODUCTION = """# Families

Written by `python scripts/families.py`, checked by `tests/test_families.py`.

The {types} types behind `AutoModelForImageTextToText` of transformers {version}.

- **Parts**: tower, projector, decoder layers and head are found from the default config on the `meta` device, as
  `striate inspect` does it: {found} of {types}. {completed} default configs lack values, which `COMPLETED` in
  `tests/families.py` adds.
- **Processor**: records of one image, of two, of a conversation and of text alone are read with a tiny processor of the
  type's own: the label mask covers exactly the answers, and each image feature of the model has its image token. {read}
  types; `no` says why not, and the columns behind it are then tried with images laid out as the type has them. In
  transformers, Mllama's tokens before the first image look across to whatever pads the row, and HunYuan's numbers of
  images run on over a batch: losses depend on the batch a little.
- **The columns behind it** are tried on tiny models of the real classes: two steps of `tune` on the CPU, full and with
  LoRA, a score of the result, and the saved checkpoint loaded again with equal logits. All four: {whole} types.
- **Prune**: layers are cut with every proof. `protected`: layers of the default config that cannot be cut.
- **Route**: images pass through some of the layers, and losses equal those of the slow way ([Route](route.md)).

An empty cell was not tried. `tune` tries every fast path on the model before it uses it, and `prune` verifies every
cut, so that a type which fails is refused before anything is saved.

"""
