"""The parts of a new LVLM, loaded or fresh, and the model around them: a plain LLaVA that any HF code loads.

With `pool=2` every 2x2 square of patches becomes one image token. LLaVA's own class has no place for that, so the
result is then an `AyaVisionForConditionalGeneration`: the same tower and language model around a projector that puts
the four features side by side first (pixel shuffle). Nothing is averaged away, and it loads without code of ours too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from striate.errors import UserError, first_line, need
from striate.studies.assemble.processor import IMAGE_TOKEN
from striate.vlm.reading import dequantize_model, dequantize_options, quantization
from striate.weights import check_folder

# Fresh SigLIP towers by size name: layers, width, heads. The image and patch sizes are the user's.
TOWERS = {"tiny": (4, 128, 4), "small": (6, 256, 4), "base": (12, 768, 12)}


def tower(vision: str, *, image_size: int, patch_size: int) -> tuple[PreTrainedModel, Any, bool]:
    """The vision encoder, its image processor, and whether it is fresh."""
    if vision in TOWERS:
        layers, width, heads = TOWERS[vision]
        config = SiglipVisionConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=image_size, patch_size=patch_size, vision_use_head=False,
        )  # fmt: skip
        size = {"height": image_size, "width": image_size}
        return AutoModel.from_config(config), SiglipImageProcessorPil(size=size), True
    check_folder(Path(vision))
    try:
        config = AutoConfig.from_pretrained(vision, trust_remote_code=False)
        if method := quantization(config):
            raise UserError(f"{vision} is quantized ({method}): give the vision encoder that it was made from")
        # CLIP and SigLIP checkpoints hold a text half too; the vision config picks the vision class.
        model = AutoModel.from_pretrained(
            vision, config=getattr(config, "vision_config", config), dtype=torch.float32, trust_remote_code=False
        )
        return model, AutoImageProcessor.from_pretrained(vision, use_fast=False, trust_remote_code=False), False
    except UserError:
        raise
    except (OSError, ValueError) as error:
        sizes = ", ".join(TOWERS)
        raise UserError(
            f"no vision encoder at {vision!r}: expected a folder, a hub id or one of {sizes} ({first_line(error)})"
        ) from error


def language_model(llm: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer; GGUF files, FP8 and bitsandbytes weights are dequantized.

    Raises:
        UserError: there is none, or its weights cannot be dequantized.
    """
    gguf = Path(llm).suffix == ".gguf"
    source = str(Path(llm).parent) if gguf else llm
    named: dict[str, Any] = {"gguf_file": Path(llm).name} if gguf else {}
    check_folder(Path(source))
    if gguf:
        need("gguf", llm, extra="gguf")
    try:
        method = "" if gguf else quantization(AutoConfig.from_pretrained(source, trust_remote_code=False))
        options = dequantize_options(method, source) if method else named
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **options)
        if method:
            model = dequantize_model(model).float()
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **named)
    except ImportError as error:
        raise UserError(f"reading {llm} needs a package: {first_line(error)}", see="package-not-installed") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"no language model at {llm!r}: expected a folder, a hub id or a .gguf file ({first_line(error)})"
        ) from error
    # The weights are plain float32 now; the note of their former quantization would mislead whoever loads them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel | None = None) -> None:
    """Give a vocabulary an image token and a padding token; the image token's embedding is never read, image features
    take its place. Without `language` the rows of its embeddings are the caller's to add."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if language is not None and len(tokenizer) > len(next(language.get_input_embeddings().parameters())):
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def join(
    tower: PreTrainedModel, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, layer: int, pool: int
) -> PreTrainedModel:
    """The LVLM around the two trained parts; what lies between them is fresh."""
    settings: dict[str, Any] = {
        "vision_config": tower.config,
        "text_config": language.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if _has_class_token(tower.config) else "full",
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    if pool == 1:
        model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(**settings))
    else:  # half of the inner width gates the other half
        inner = 2 * language.config.hidden_size
        settings |= {"downsample_factor": pool, "alignment_intermediate_size": inner}
        model = AyaVisionForConditionalGeneration(AyaVisionConfig(**settings))
    model.get_encoder(modality="image").load_state_dict(tower.state_dict())
    model.get_decoder().load_state_dict(language.get_decoder().state_dict())
    model.get_output_embeddings().load_state_dict(language.get_output_embeddings().state_dict())
    model.generation_config = language.generation_config
    return model


def _has_class_token(vision: PreTrainedConfig) -> bool:
    """Whether the tower puts a class token before the patches (CLIP, DINOv2 and plain ViT do, SigLIP does not)."""
    return not vision.model_type.startswith("siglip")


def processor(
    tokenizer: PreTrainedTokenizerBase, image_processor: Any, config: PreTrainedConfig, *, pool: int = 1, template: str
) -> LlavaProcessor:
    """Image and text to what a model of this config takes, with its chat template."""
    vision = config.vision_config
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size * pool,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(_has_class_token(vision)),
        chat_template=template,
    )
