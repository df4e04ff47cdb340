"""Pico models: real Hugging Face classes, built from config in milliseconds, for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

DEPTH = 4
WORDS = "what is this ? a red blue green cat dog car in the picture one two three yes no it sees".split()  # noqa: SIM905
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>")
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<image> ' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '</s>' }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_IMAGE = 6
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 8}
_PIXTRAL = {**_SIGLIP, "model_type": "pixtral", "head_dim": 8}
_INTERN = {**_SIGLIP, "model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": _SIGLIP, "text_config": {"model_type": "llama", **_TEXT}},
    "llava_next": {"vision_config": _SIGLIP, "text_config": {"model_type": "mistral", **_TEXT}},
    "llava_onevision": {"vision_config": _SIGLIP, "text_config": {"model_type": "qwen2", **_TEXT}},
    "qwen2_vl": {
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
    },
    "qwen2_5_vl": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
    },
    "qwen3_vl": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
    },
    "internvl": {"vision_config": _INTERN, "text_config": {"model_type": "qwen2", **_TEXT}},
    "gemma3": {
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4,
        "text_config": {"model_type": "gemma3_text", **_TEXT, "sliding_window": 16},
    },
    "paligemma": {
        "vision_config": _SIGLIP, "projection_dim": 32, "hidden_size": 32,
        "text_config": {"model_type": "gemma", **_TEXT},
    },
    "idefics3": {
        "vision_config": {**_SIGLIP, "model_type": "idefics3_vision"}, "scale_factor": 2,
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "smolvlm": {
        "vision_config": {**_SIGLIP, "model_type": "smolvlm_vision"}, "scale_factor": 2,
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "mistral3": {"vision_config": _PIXTRAL, "text_config": {"model_type": "mistral", **_TEXT}},
}  # fmt: skip


def pico(family: str, **changes: Any) -> PreTrainedModel:
    """A model of the family with 4 decoder layers of width 32, seeded."""
    torch.manual_seed(0)
    settings = {"image_token_id": _IMAGE, "image_token_index": _IMAGE, **FAMILIES[family], **changes}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings)).eval()


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose chat template uses one token a role and `</s>` as the end of an answer."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def pico_processor() -> LlavaProcessor:
    """32-pixel pictures, 16 image tokens each."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=pico_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def pico_llava(folder: Path) -> Path:
    """Save a LLaVA of 4 layers with its processor; returns the folder."""
    text = {"model_type": "llama", **_TEXT}
    model = pico("llava", text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="full")
    assert isinstance(model, LlavaForConditionalGeneration)
    model.save_pretrained(folder)
    pico_processor().save_pretrained(folder)
    return folder
