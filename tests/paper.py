"""The paper's four models, at full size, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
)

from striate.studies.assemble.original import Original, llava_config, text_config, vision_config

# The published config.json of each of the paper's four, and its parameters: language model, tower, projector.

LLAMA_2 = {"model_type": "llava_llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
           "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}  # fmt: skip
# By hand: 27 layers of attention, MLP and two norms; patches, positions, the last norm. Without the pooling head.
SIGLIP = 27 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
SIGLIP += (3 * 14 * 14 + 1) * 1152 + 27 * 27 * 1152 + 2 * 1152
BUNNY = {"mm_vision_tower": "google/siglip-so400m-patch14-384"}
PAPER: dict[str, tuple[dict[str, Any], int]] = {
    "llava-1.5-7b": (
        LLAMA_2 | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        6_738_415_616 + 303_507_456 + 20_979_712,
    ),
    "llava-1.5-13b": (
        LLAMA_2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        13_015_864_320 + 303_507_456 + 31_467_520,
    ),
    "bunny-llama-3-8b": (
        BUNNY | {"model_type": "bunny-llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5},
        8_030_261_248 + SIGLIP + 21_504_000,
    ),
    "bunny-phi3-mini-4b": (
        BUNNY | {"model_type": "bunny-phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        3_821_079_552 + SIGLIP + 12_982_272,
    ),
}  # fmt: skip


def full_size(name: str) -> LlavaForConditionalGeneration:
    """One of the paper's four as the import makes it, without weights."""
    fields = PAPER[name][0] | {"mm_projector_type": "mlp2x_gelu", "tie_word_embeddings": False}
    original = Original(Path(name), fields)
    vision = vision_config(original, None)
    config = llava_config(original, text_config(fields, original.family), vision, layers=vision.num_hidden_layers)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)
