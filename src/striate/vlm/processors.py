"""The processor of a model, and the token that it writes for each image feature."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from striate.errors import UserError, first_line

# Processors whose `image_token` is another one: the end of a row (Fuyu) or the placeholder in the prompt.
_IMAGE_TOKENS = {"FuyuProcessor": "|SPEAKER|", "Llama4Processor": "<|patch|>", "Ovis2Processor": "<IMG_ATOM>"}


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
