"""Image preprocessing (that of the tower, or padding to a square first) and chat templates: a language model's own one
made to take images, and those that the original LVLMs were trained with.

Facts about the wording: `llava/conversation.py` (haotian-liu/LLaVA) and `bunny/conversation.py` (BAAI-DCAI/Bunny).
All of the paper's four say the same words; what differs is the token that ends an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from striate.errors import UserError, nearest
from striate.vlm.template import template_of

Aspect = Literal["square", "pad"]
"""`image_aspect_ratio` of the originals: crop (CLIP) or squeeze (SigLIP) to a square, or pad with the mean color."""


IMAGE_TOKEN = "<image>"
# For a base language model that came without a chat template: the Vicuna wording of LLaVA-1.5.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}"
    "{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Language models' templates expect strings. This prelude joins lists of parts to strings, images as marks, and
# leaves the model's own template to do the rest.
FLATTEN_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message.content is string -%}{%- set text.value = message.content -%}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- set text.value = text.value + ('IMAGE_TOKEN\n' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message.role, 'content': text.value}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
).replace("IMAGE_TOKEN", IMAGE_TOKEN)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Images go to the front of their turn, one line per image, and the question is trimmed, as LLaVA prepares its data.
TURN = (
    "{%- macro turn(message) -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- set images = message.content | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{{ ('IMAGE_TOKEN\n' * (images | length) + texts | trim) if images else texts }}"
    "{%- endif -%}{%- endmacro -%}"
).replace("IMAGE_TOKEN", IMAGE_TOKEN)
USER_ASSISTANT = (
    TURN + "{%- if messages and messages[0].role != 'system' -%}{{ 'SYSTEM ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ turn(message) + ' ' }}"
    "{%- elif message.role == 'user' -%}{{ 'USER: ' + turn(message) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + turn(message) + 'END' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
).replace("SYSTEM", SYSTEM.replace("'", "\\'"))
# Stage 1: the image, the caption, a line break; what was asked is left out.
CAPTION = (
    "{%- for message in messages -%}{%- if message.content is string -%}"
    "{%- if message.role == 'assistant' -%}{{ message.content + '\n' }}{%- endif -%}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ 'IMAGE_TOKEN' }}"
    "{%- elif message.role == 'assistant' -%}{{ part.text + '\n' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
).replace("IMAGE_TOKEN", IMAGE_TOKEN)


def for_tower(vision: PreTrainedConfig) -> Any:
    """The image processor that a CLIP or SigLIP encoder was trained with, at its image size."""
    square = {"height": vision.image_size, "width": vision.image_size}
    if vision.model_type.startswith("siglip"):
        return SiglipImageProcessorPil(size=square, crop_size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=square)


def pad_to_square(processor: Any) -> LlavaImageProcessorPil:
    """The same resizing and normalization after padding to a square with the mean color."""
    kept = ("resample", "do_center_crop", "image_mean", "image_std", "rescale_factor")
    settings: dict[str, Any] = {name: getattr(processor, name, None) for name in kept}
    settings["do_center_crop"] = bool(settings["do_center_crop"])
    for name, size in (
        ("size", processor.size),
        ("crop_size", getattr(processor, "crop_size", None) or processor.size),
    ):
        settings[name] = {key: value for key, value in dict(size).items() if value is not None}
    return LlavaImageProcessorPil(do_pad=True, **settings)


@dataclass(frozen=True)
class Wording:
    """How a conversation is written, and the token that ends an answer (none: the tokenizer's)."""

    template: str
    end: str | None = None

    @classmethod
    def ending(cls, end: str) -> Wording:
        """USER and ASSISTANT after a sentence about both, each answer with `end` behind it."""
        return cls(USER_ASSISTANT.replace("END", end), end)


WORDINGS = {
    "vicuna_v1": Wording.ending("</s>"),
    "bunny_llama3": Wording.ending("<|end_of_text|>"),
    "bunny_phi3": Wording.ending("<|endoftext|>"),
    "plain": Wording(CAPTION),
}


def wording(name: str | None, tokenizer: PreTrainedTokenizerBase) -> Wording:
    """A wording by name; without one, the tokenizer's own chat template, which then sees images.

    Raises:
        UserError: there is no such wording, or the tokenizer lacks its end token.
    """
    if name is None:
        return Wording(FLATTEN_PARTS + (template_of(tokenizer) or PLAIN_TEMPLATE))
    if name not in WORDINGS:
        raise UserError(f"no template {nearest(name, WORDINGS)}")
    found = WORDINGS[name]
    if found.end is not None and found.end not in tokenizer.get_vocab():
        raise UserError(f"template {name} ends answers with {found.end}, a token that this tokenizer does not have")
    return found
