"""Chat templates in the formats of the field, and tiny processors of the real classes, built from nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.processing_utils import ProcessorMixin

# Every template walks the contents alike: `parts(message)` writes one turn's images and texts in order.
PARTS = """
{%- macro parts(message, mark='<image>') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ mark }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
"""

VICUNA = (
    PARTS
    + """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ parts(message) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + parts(message) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + parts(message) + '</s>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)

# LLaVA 1.5 as it is on the hub: a space, and no end token, behind an answer.
LLAVA_15 = VICUNA.replace("'</s>'", "' '")

LLAMA_3 = (
    PARTS
    + """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
{{- parts(message) | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
)

CHATML = (
    PARTS
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + parts(message) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
)

PHI_3 = (
    PARTS
    + """
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\n' + parts(message) + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}
"""
)

# The system prompt goes into the first question; the assistant is called "model".
GEMMA = (
    PARTS
    + """
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = parts(message) + '\n\n' -%}
{%- else -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' -}}
{{- ns.system + parts(message, '<image>') | trim + '<end_of_turn>\n' -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
)

# No generation prompt: the question's own end is one. Spaces around, `</s>` after a space as Llama 2 has it.
MISTRAL = (
    PARTS
    + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '[INST] ' + parts(message) + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ' + parts(message) + ' ' + eos_token }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif -%}
{%- endfor -%}
"""
)

IDEFICS_3 = (
    PARTS
    + """
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | capitalize -}}
{{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}
{{- parts(message) + '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
)

# Stage 1 of LLaVA: the image, the caption, nothing else.
PLAIN = (
    PARTS
    + """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ parts(message) + '\n' }}
{%- else -%}{{ parts(message) if message['content'][0]['type'] == 'image' }}
{%- endif -%}
{%- endfor -%}
"""
)

# Written for a language model: contents are text.
TEXT_ONLY = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

PRINTED = TEXT_ONLY.replace("+ message['content'] +", "~ message['content'] ~")

# Thinks before it answers, but only when asked to go on: the prompt is not a prefix of the finished text.
THINKING = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")

TEMPLATES = {
    "vicuna": VICUNA,
    "llava-1.5": LLAVA_15,
    "llama-3": LLAMA_3,
    "chatml": CHATML,
    "phi-3": PHI_3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "idefics3": IDEFICS_3,
    "plain": PLAIN,
    "text only": TEXT_ONLY,
    "printed": PRINTED,
    "thinking": THINKING,
}

SPECIAL = """
<pad> <s> </s> <image> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> <|user|>
<|assistant|> <|system|> <|end|> <start_of_turn> <end_of_turn> [INST] [/INST] <end_of_utterance>
<start_of_image> <end_of_image> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|> <video> <img>
</img> <IMG_CONTEXT> [IMG] [IMG_BREAK] [IMG_END] <fake_token_around_image> <global-img>
"""

CORPUS = "is the red cat on a mat? yes, no: two dogs and one bird. What colour Answer briefly USER ASSISTANT:"


@cache
def bpe(adds_bos: bool = False, spaces: bool = False) -> Tokenizer:
    """Byte pairs learned on one line; every text goes through it and back unchanged.

    `spaces`: as SentencePiece has it, with a word's space inside its first token, and only known letters.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace() if spaces else pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.Metaspace() if spaces else decoders.ByteLevel()
    special = [*SPECIAL.split(), *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))]
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=special,
        initial_alphabet=[] if spaces else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CORPUS], trainer)
    if adds_bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return model


def tokenizer(adds_bos: bool = False, spaces: bool = False, **named: str) -> PreTrainedTokenizerFast:
    """`adds_bos`: it writes `<s>` and `</s>` around every text. `named`: special tokens by name."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe(adds_bos, spaces),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )


def llava(template: str = CHATML, adds_bos: bool = False, spaces: bool = False) -> LlavaProcessor:
    """32 x 32 pixels and 4 x 4 image tokens per image."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer(adds_bos, spaces),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


# Every family's processor with its own way to cut an image up, small. Those that also take video want
# torchvision for it; their image side does not, so the tests replace the video processor by a dummy.

SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def chatml(mark: str) -> str:
    return CHATML.replace("mark='<image>'", f"mark='{mark}'")


def llava_next() -> ProcessorMixin:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="full", chat_template=CHATML
    )


def llava_onevision() -> ProcessorMixin:
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return LlavaOnevisionProcessor(
        images,
        tokenizer(),
        no_video(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )


def qwen(kind: type[ProcessorMixin]) -> ProcessorMixin:
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16**2, "longest_edge": 64**2},
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
    )
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return kind(images, tokenizer(), no_video(), chat_template=template)


def internvl() -> ProcessorMixin:
    tokens = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    return InternVLProcessor(images, tokens, no_video(), image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>"))


def gemma3() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = Gemma3ImageProcessorPil(size=SQUARE)
    template = GEMMA.replace("'<image>'", "'<start_of_image>'")
    return Gemma3Processor(images, tokens, image_seq_length=4, chat_template=template)


def paligemma() -> ProcessorMixin:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer())


def idefics3() -> ProcessorMixin:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=IDEFICS_3)


def smolvlm() -> ProcessorMixin:
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    with patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):
        return SmolVLMProcessor(images, tokenizer(), no_video(), image_seq_len=4, chat_template=IDEFICS_3)


def pixtral() -> ProcessorMixin:
    """Mistral 3's too. The one processor that does not come without torchvision."""
    pytest.importorskip("torchvision")
    from transformers import PixtralProcessor

    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8)
    return PixtralProcessor(images, tokenizer(), patch_size=8, spatial_merge_size=2, chat_template=chatml("[IMG]"))


def no_video() -> SimpleNamespace:
    return SimpleNamespace(num_frames=1, fps=1, model_input_names=[], font="")


FAMILIES: dict[str, Callable[[], ProcessorMixin]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen(Qwen2VLProcessor),
    "qwen2_5_vl": lambda: qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: qwen(Qwen3VLProcessor),
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "mistral3": pixtral,
}


def processor(family: str) -> ProcessorMixin:
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return FAMILIES[family]()
