"""Pico models: real Hugging Face classes, built from config in milliseconds, for every test."""

from __future__ import annotations

from copy import deepcopy
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
_TOWER = {key: value for key, value in _SIGLIP.items() if key != "model_type"}
_IMAGE = 6
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 8}
_QWEN_WINDOWS = {**_QWEN_TOWER, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
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
        "vision_config": _QWEN_WINDOWS,
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
    # A copy: `transformers` writes into the rope parameters it is given, and families share them here.
    settings = deepcopy({"image_token_id": _IMAGE, "image_token_index": _IMAGE, **FAMILIES[family], **changes})
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
    """32-pixel images, 16 image tokens each."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=pico_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def pico_llava(folder: Path, **text: Any) -> Path:
    """Save a LLaVA of 4 layers with its processor; returns the folder."""
    text = {"model_type": "llama", **_TEXT, **text}
    model = pico("llava", text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="full")
    assert isinstance(model, LlavaForConditionalGeneration)
    model.save_pretrained(folder)
    pico_processor().save_pretrained(folder)
    return folder


# More families, for tests that are about decoder layers; `pico_more` builds them. What varies is the language model
# inside LLaVA, and what a config says about single layers: kinds of attention, experts, layers by their number.

_LLAVA = {"family": "llava", "vision_config": _SIGLIP, "vision_feature_layer": -1,
          "vision_feature_select_strategy": "full"}  # fmt: skip
_COHERE = {"model_type": "cohere2", **_TEXT, "sliding_window": 8}
_GLM_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 8,
              "image_size": 32, "out_hidden_size": 32}  # fmt: skip

MORE: dict[str, dict[str, Any]] = {
    "llava_llama": {**_LLAVA, "text_config": {"model_type": "llama", **_TEXT}},
    "llava_qwen2": {**_LLAVA, "text_config": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": True}},
    "llava_phi3": {**_LLAVA, "text_config": {"model_type": "phi3", **_TEXT}},
    "llava_gemma2": {**_LLAVA, "text_config": {"model_type": "gemma2", **_TEXT, "sliding_window": 8}},
    "mistral3": {"vision_config": _PIXTRAL, "text_config": {"model_type": "mistral", **_TEXT}},
    "aya_vision": {"vision_config": _SIGLIP, "alignment_intermediate_size": 32, "text_config": _COHERE},
    "cohere2_vision": {"vision_config": _SIGLIP, "alignment_intermediate_size": 64, "text_config": _COHERE},
    "glm4v": {"vision_config": _GLM_TOWER, "text_config": {**_TEXT, "rope_parameters": _MROPE}},
    "ovis2": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "vocab_size": 40, "num_visual_indicator_tokens": 2,
        },
        "text_config": {"model_type": "qwen2", **_TEXT}, "hidden_size": 32, "vocab_size": 128,
        "visual_indicator_token_ids": [7, 8],
    },
    "lfm2_vl": {
        "vision_config": {**_SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16},
        "projector_hidden_size": 32,
        "text_config": {
            "model_type": "lfm2", **_TEXT, "layer_types": ["conv", "full_attention"] * (DEPTH // 2),
            "block_auto_adjust_ff_dim": False, "block_ff_dim": 64,
        },
    },
    "mllama": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64,
            "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]],
        },
        "text_config": {
            **_TEXT, "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}  # fmt: skip


# Still more, for the whole path (tests/families.py): experts, linear attention, DeepStack by layer, other bridges.

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
           "layer_types": ["linear_attention", "full_attention"] * (DEPTH // 2)}  # fmt: skip
_QFORMER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
            "encoder_hidden_size": 32, "cross_attention_frequency": 1}  # fmt: skip
_SAM = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 128,
        "patch_size": 8, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1]}  # fmt: skip

OTHERS: dict[str, dict[str, Any]] = {
    "aria": {
        "vision_config": {**_SIGLIP, "model_type": "idefics3_vision"}, "projector_patch_to_query_dict": {"16": 4},
        "text_config": {**_TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    },
    "blip-2": {
        "vision_config": {**_TOWER}, "qformer_config": _QFORMER, "num_query_tokens": 4,
        "text_config": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": DEPTH,
                        "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 512,
                        "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    },
    "cohere_compass": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
                          "num_position_embeddings": 16},
        "text_config": {**_TEXT, "sliding_window": 16,
                        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _MROPE)},
    },
    "cosmos3_edge": {
        "vision_config": {**_TOWER, "num_patches": 16}, "projector_hidden_size": 32,
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
    },
    "deepseek_vl": {"vision_config": _SIGLIP, "text_config": {"model_type": "llama", **_TEXT}},
    "deepseek_vl_hybrid": {
        "vision_config": _SIGLIP, "high_res_vision_config": {"model_type": "sam_vision_model", **_SAM},
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "ernie4_5_vl_moe": {
        "vision_config": _QWEN_TOWER,
        "text_config": {**_TEXT, "rope_parameters": _MROPE, "moe_num_experts": 4, "moe_k": 2,
                        "moe_intermediate_size": [32, 32], "moe_num_shared_experts": 1},
    },
    "exaone4_5": {
        "vision_config": {**_QWEN_WINDOWS, "num_key_value_heads": 2}, "text_config": {"model_type": "exaone4", **_TEXT},
    },
    "fuyu": {"patch_size": 8, "image_size": 32, "text_config": {"model_type": "persimmon", **_TEXT}},
    "glm46v": {"vision_config": _GLM_TOWER, "text_config": {**_TEXT, "rope_parameters": _MROPE}},
    "got_ocr2": {"vision_config": _SAM, "text_config": {"model_type": "qwen2", **_TEXT}},
    "glm4v_moe": {
        "vision_config": _GLM_TOWER,
        "text_config": {
            **_TEXT, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        },
    },
    "granite_docling": {
        "vision_config": {**_TOWER, "scale_factor": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
                          "use_fine_route": False},
        "text_config": _TEXT,
    },
    "hunyuan_vl": {
        "vision_config": {**_TOWER, "out_hidden_size": 32, "text_hidden_size": 32},
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}},
    },
    "hyperclovax_vision_v2": {"vision_config": _QWEN_WINDOWS, "text_config": {"model_type": "hyperclovax", **_TEXT}},
    "idefics2": {
        "vision_config": {**_SIGLIP, "model_type": "idefics2_vision"},
        "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                             "resampler_head_dim": 8, "num_key_value_heads": 2},
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": 8},
    },
    "janus": {
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
                          "patch_size": 8, "projection_dim": 32},
        "vq_config": {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
                      "channel_multiplier": [1], "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32,
                      "image_token_embed_dim": 32},
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "lfm3_vl": {
        "vision_config": {**_TOWER, "num_key_value_heads": 2}, "projector_hidden_size": 32,
        "text_config": {"model_type": "lfm3", **_TEXT},
    },
    "lighton_ocr": {"vision_config": _PIXTRAL, "text_config": {"model_type": "qwen3", **_TEXT}},
    "llama4": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        "text_config": {
            "model_type": "llama4_text", **_TEXT, "moe_layers": [1, 3], "num_local_experts": 2,
            "intermediate_size_mlp": 64, "attention_chunk_size": 16,
        },
    },
    "llava_next_video": {"vision_config": _SIGLIP, "text_config": {"model_type": "llama", **_TEXT}},
    "paddleocr_vl": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 32, "patch_size": 8},
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
    },
    "qianfan_ocr": {
        "vision_config": {**_TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        "text_config": {"model_type": "qwen3", **_TEXT},
    },
    "qwen3_5": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32},
        "text_config": {**_TEXT, **_LINEAR, "rope_parameters": _MROPE},
    },
    "qwen3_5_moe": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32},
        "text_config": {**_TEXT, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 32,
                        "rope_parameters": _MROPE},
    },
    "qwen3_vl_moe": {
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
        "text_config": {**_TEXT, **_EXPERTS, "rope_parameters": _MROPE},
    },
    "video_llama_3": {"vision_config": _TOWER, "text_config": {"model_type": "qwen2", **_TEXT}},
    "video_llava": {
        "vision_config": {**_TOWER, "model_type": "clip_vision_model"}, "vision_feature_layer": -1,
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "vipllava": {
        "vision_config": {**_TOWER, "model_type": "clip_vision_model"}, "vision_feature_layers": [-1, -2],
        "text_config": {"model_type": "llama", **_TEXT},
    },
}  # fmt: skip


def pico_more(name: str, *, depth: int = DEPTH, **text: Any) -> PreTrainedModel:
    """A model of `MORE` or `OTHERS`; `text` are other settings of its language model."""
    settings = {"image_token_id": _IMAGE, "image_token_index": _IMAGE, **deepcopy({**MORE, **OTHERS}[name])}
    settings["text_config"] = settings["text_config"] | {"num_hidden_layers": depth} | text
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("family", name), **settings)
    return filled(AutoModelForImageTextToText.from_config(config).eval())


def filled(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that are large enough to matter; some are zeros to begin with, as gates of cross-attention are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


# Number of image tokens per image where it is not 16, and the token that must precede them.
_TOKENS = dict.fromkeys(
    ("mistral3", "aya_vision", "cohere2_vision", "glm4v", "glm4v_moe", "lfm2_vl", "aria", "blip-2",
     "idefics2", "llama4", "paddleocr_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"), 4
) | {"ovis2": 16, "mllama": 1}  # fmt: skip
_LEADS = {"ovis2": 7, "glm4v": 7, "glm4v_moe": 7}
_TYPED = ("glm4v", "glm4v_moe", "paddleocr_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe")  # want a type of each token
_PATCHED = {"fuyu": (1, 16, 192), **dict.fromkeys(_TYPED, (16, 3 * 2 * 8 * 8)), "paddleocr_vl": (16, 3, 8, 8)}


def pico_pixels(name: str) -> dict[str, torch.Tensor]:
    """One image as the family's own processor prepares it for a model of `MORE` or `OTHERS`."""
    size = (1, 1, 3, 32, 32) if name == "idefics2" else (1, 3, 128, 128) if name == "got_ocr2" else (1, 3, 32, 32)
    pixels = {"pixel_values": torch.randn(*_PATCHED.get(name, size))}
    if name == "fuyu":
        return {"image_patches": pixels["pixel_values"]}
    if name in _TYPED:
        pixels["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    if name == "mistral3":
        pixels["image_sizes"] = torch.tensor([[32, 32]])
    if name == "lfm2_vl":
        pixels = {"pixel_values": torch.randn(1, 16, 3 * 8 * 8), "spatial_shapes": torch.tensor([[4, 4]]),
                  "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}  # fmt: skip
    if name == "mllama":
        pixels = {"pixel_values": torch.randn(1, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(1, 1).long(),
                  "aspect_ratio_mask": torch.ones(1, 1, 1).long()}  # fmt: skip
    if name == "deepseek_vl_hybrid":
        pixels["high_res_pixel_values"] = torch.randn(1, 3, 128, 128)
    if name == "video_llava":
        pixels = {"pixel_values_images": pixels["pixel_values"]}
    return pixels


def pico_prompts(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """What a model of `MORE` takes with an image ("image") and without one ("text"), as its processor would give it."""
    torch.manual_seed(1)
    text = torch.randint(10, 120, (1, 13))
    image = torch.full((1, _TOKENS.get(name, 16)), _IMAGE)
    if name in _LEADS:
        image = torch.cat([torch.full((1, 1), _LEADS[name]), image], dim=1)
    pixels = pico_pixels(name)
    if name == "mllama":
        pixels["cross_attention_mask"] = torch.ones(1, 14, 1, 1).long()
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    if name in _TYPED:
        pixels["mm_token_type_ids"] = (ids == _IMAGE).long()
    with_image = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    return {"image": with_image, "text": {"input_ids": text, "attention_mask": torch.ones_like(text)}}


class PicoReader(LlavaProcessor):
    """A real processor that returns random pixels in the layout of a family."""

    name: str

    def _process_images(self, images: Any, **_: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        outputs = [pico_pixels(self.name) for batch in images for _ in batch]
        lead = self.tokenizer.convert_ids_to_tokens([_LEADS[self.name]]) if self.name in _LEADS else []
        mark = " ".join([*lead, *[self.image_token] * _TOKENS.get(self.name, 16)])
        return {key: torch.cat([one[key] for one in outputs]) for key in outputs[0]}, [mark] * len(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, return_mm_token_type_ids=self.name in _TYPED, **kwargs)


def pico_reader(name: str) -> PicoReader:
    """What reads records for a model of `MORE` or `OTHERS`, with the pico tokenizer."""
    size = {"height": 32, "width": 32}
    reader = PicoReader(SiglipImageProcessorPil(size=size), pico_tokenizer(), chat_template=TEMPLATE)
    reader.name = name
    return reader
