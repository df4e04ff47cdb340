"""The processor of a model, the token that it writes for each image feature, and whether it matches the model."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch._subclasses import FakeTensor
from transformers import AutoProcessor, GotOcr2Processor, PreTrainedModel

from striate.errors import UserError, first_line
from striate.vlm.template import apply_template, end_tokens, image_mark, turn

# Processors whose `image_token` is another one: the end of a row (Fuyu) or the placeholder in the prompt.
_IMAGE_TOKENS = {"FuyuProcessor": "|SPEAKER|", "Llama4Processor": "<|patch|>", "Ovis2Processor": "<IMG_ATOM>"}
TOKEN_KEYS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
)
"""Inputs with one value per token, the last one also per image and tile; all other inputs describe images."""
WITHOUT_EMBEDDING = ("gemma", "paligemma")
"""Families that do not look up the embedding of an image token; all others do, before features replace it."""
TEST_SIZE = (96, 48)
"""Width and height of the test image in pixels: oblong, so that families with tiles split it."""


def load_processor(source: str) -> Any:
    """Load the processor saved with a model.

    Raises:
        UserError: there is no processor, or it needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"the processor of {source} needs a package that is not installed: {first_line(error)} "
            "(several families need torchvision for their video processor: pip install torchvision)",
            see="package-not-installed",
        ) from error
    except Exception as error:  # the files are untrusted
        raise UserError(f"cannot load a processor from {source or 'nowhere'}: {first_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise UserError(
            f"{source} has no processor for images and text, only a {type(processor).__name__}",
            see="not-a-vision-language-model",
        )
    return processor


def image_token_id(processor: Any) -> int:
    """The id of the tokens that are replaced by image features.

    Raises:
        UserError: the processor has no image token.
    """
    # The first id is that of the features; Pixtral and InternVL list those of borders after it. Gemma 3's
    # `image_token_id` is the placeholder in the prompt, which the processor expands into other tokens.
    if token := _IMAGE_TOKENS.get(type(processor).__name__):
        return int(processor.tokenizer.convert_tokens_to_ids(token))
    found = processor.image_token_ids[0]
    if found is None and getattr(processor, "image_token", None):  # Janus' processor has the token, but not its id
        found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if found is None:
        raise UserError(
            f"{type(processor).__name__} has no image token: striate cannot locate images in the prompt",
            see="not-a-vision-language-model",
        )
    return int(found)


def check_match(model: PreTrainedModel, processor: Any, image_token: int, source: str) -> None:
    """Check that every token has an embedding, and that there are as many image tokens as image features.

    On the `meta` device, features are counted only for families whose code runs there.

    Raises:
        UserError: they do not match; the message says which setting to change.
    """
    _check_vocabulary(model, processor, image_token, source)
    inputs = _process_test_image(model, processor, source)
    if "cross_attention_mask" in inputs:  # features are not among the tokens: one token marks each image
        return
    num_tokens, features = int((inputs["input_ids"] == image_token).sum()), _num_features(model, inputs, source)
    if features is None and (settings := _different_settings(model, processor)):
        raise UserError(
            f"{source}: the processor and the model divide images differently: {_advice(settings)}",
            see="processor-and-model-differ",
        )
    if features is not None and num_tokens != features:
        settings = _different_settings(model, processor, unset=True)
        raise UserError(
            f"{source}: the processor writes {num_tokens:,} image tokens for an image, the model computes {features:,} "
            f"features for it: {_advice(settings)}",
            see="processor-and-model-differ",
        )


def _check_vocabulary(model: PreTrainedModel, processor: Any, image_token: int, source: str) -> None:
    tokenizer, table = processor.tokenizer, getattr(model.get_input_embeddings(), "weight", None)
    if table is None:
        return
    named = (
        value for name, value in vars(model.config).items() if "_token_i" in name
    )  # media tokens are never looked up
    media = {token for value in named for token in (value if isinstance(value, list | tuple) else [value])}
    if not str(model.config.model_type).startswith(WITHOUT_EMBEDDING):
        media.discard(image_token)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if not token.special}
    needed = {*end_tokens(processor), tokenizer.bos_token_id, tokenizer.pad_token_id, image_token, *added} - {
        None,
        *media,
    }
    if lacking := sorted(token for token in needed if token >= len(table)):
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer):,} tokens, the model {len(table):,} embeddings, and "
            f"{tokenizer.convert_ids_to_tokens(lacking[0])!r} ({lacking[0]}) has none: call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save it, or remove the token",
            see="processor-and-model-differ",
        )


def _process_test_image(model: PreTrainedModel, processor: Any, source: str) -> dict[str, torch.Tensor]:
    """The processor's output for a prompt with one test image."""
    image = Image.new("RGB", TEST_SIZE, (200, 90, 30))
    message = turn("user", "yes")
    message["content"].insert(0, {"type": "image"})
    try:
        text = apply_template(processor, [message])
    except (TemplateError, TypeError, ValueError):  # PaliGemma has no chat template
        text = image_mark(processor)
    try:
        images = [image] if isinstance(processor, GotOcr2Processor) else [[image]]  # GOT takes pages in the inner list
        return dict(processor(text=[text], images=images, return_tensors="pt"))
    except Exception as error:  # the processor's files are untrusted
        advice = _advice(_different_settings(model, processor, unset=True))
        raise UserError(
            f"{source}: the processor cannot read an image ({first_line(error)}): {advice}",
            see="processor-and-model-differ",
        ) from error


@torch.no_grad()
def _num_features(model: PreTrainedModel, inputs: dict[str, torch.Tensor], source: str) -> int | None:
    """The number of features that the model computes for the image; None where they cannot be counted."""
    holder = next((one for one in (model, model.base_model) if hasattr(one, "get_image_features")), None)
    if holder is None:
        return None

    def move(value: torch.Tensor) -> torch.Tensor:
        if model.device.type == "meta" and not value.is_floating_point():  # the model reads the values of image grids
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    own = {key: move(value) for key, value in inputs.items() if key not in TOKEN_KEYS}
    abstract = model.device.type == "meta" or isinstance(next(model.parameters()), FakeTensor)
    try:
        signature(holder.get_image_features).bind(**own)  # type: ignore[arg-type]
    except TypeError:  # Fuyu's takes patches by another name than its processor's
        return None
    try:
        found = holder.get_image_features(**own)  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if abstract:
            return None
        raise UserError(
            f"{source}: the model cannot process the image of its processor ({first_line(error)})",
            see="processor-and-model-differ",
        ) from error
    features = getattr(found, "pooler_output", found)
    listed = features if isinstance(features, list | tuple) else [features]
    if not all(isinstance(one, torch.Tensor) for one in listed):
        return None
    return sum(one.numel() // one.shape[-1] for one in listed)


def _different_settings(model: PreTrainedModel, processor: Any, *, unset: bool = False) -> dict[str, Any]:
    """The processor's settings for the number of image tokens that differ from the model's config, with its values.

    `unset`: also those that the processor leaves open; some families' processors have no use for them.
    """
    config, images = model.config, getattr(processor, "image_processor", None)
    vision = getattr(config, "vision_config", config)
    strategy = "vision_feature_select_strategy"
    pairs = [
        (processor, "patch_size", getattr(vision, "patch_size", None)),
        (processor, strategy, getattr(config, strategy, None)),
        (images, "patch_size", getattr(vision, "patch_size", None)),
        (images, "temporal_patch_size", getattr(vision, "temporal_patch_size", None)),
        (images, "merge_size", getattr(vision, "spatial_merge_size", None)),
    ]
    return {
        name: value
        for holder, name, value in pairs
        if isinstance(value, int | str)
        and isinstance(getattr(holder, name, {}), (int | str | None) if unset else (int | str))
        and getattr(holder, name) != value
    }


def _advice(settings: dict[str, Any]) -> str:
    changes = ", ".join(f"{name} to {value}" for name, value in settings.items())
    return f"set {changes or 'its sizes as in config.json'} in processor_config.json"
