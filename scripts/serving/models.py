"""Tiny models of real classes whose attention heads are as large as serving engines need, with processors and records.

The processors are those of tests/templates.py, with real video processors: an engine loads them from the disk.
"""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import pico
import templates

DEPTH = 6
QUESTIONS = ("What is on the mat?", "Is the cat red?", "What color is the bird?", "How many dogs are in it?")
ANSWERS = ("a red cat", "no: two dogs", "the bird is on a mat", "yes, and one dog")

# ChatML, with the loops in the places where engines look for them.
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ 'MARK' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MARKS = {
    "llava": "<image>",
    "qwen2_vl": _QWEN_MARK,
    "qwen2_5_vl": _QWEN_MARK,
    "qwen3_vl": _QWEN_MARK,
    "smolvlm": "<image>",
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}
"""What the chat template of each family writes for an image. The first key of the table of families."""

_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_QWEN_TOWER = {"hidden_size": 64, "num_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}}
_INTERLEAVED = {"rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
_ATTENTION = ["sliding_attention", "sliding_attention", "full_attention"] * (DEPTH // 3)
_WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": _WHOLE,
    "qwen2_vl": {"vision_config": {"hidden_size": 128, "embed_dim": 64, "num_heads": 2}, "text_config": _MROPE},
    "qwen2_5_vl": {"vision_config": {**_QWEN_TOWER, "out_hidden_size": 128}, "text_config": _MROPE},
    "qwen3_vl": {"vision_config": {**_QWEN_TOWER, "out_hidden_size": 128}, "text_config": _INTERLEAVED},
    "gemma3": {"text_config": {"layer_types": _ATTENTION, "query_pre_attn_scalar": 32}},
}
"""What the config of a family says besides the sizes that all have."""


def processor(family: str) -> Any:
    """The family's processor, small, as it can be saved."""
    # They need torchvision, which a machine without vLLM may not have.
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    reader = templates.processor(family)
    sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    videos = {
        "qwen2_vl": lambda: Qwen2VLVideoProcessor(**sizes),
        "qwen2_5_vl": lambda: Qwen2VLVideoProcessor(**sizes),
        "qwen3_vl": lambda: Qwen3VLVideoProcessor(**sizes),
        "internvl": lambda: InternVLVideoProcessor(size=templates.SQUARE),
        "smolvlm": lambda: SmolVLMVideoProcessor(size={"longest_edge": 64}),
    }
    if family in videos:
        reader.video_processor = videos[family]()
    if family == "gemma3":  # around its images are two line breaks, which are one token of its tokenizer
        reader.tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])
    reader.chat_template = TEMPLATE.replace("MARK", MARKS[family])
    reader.tokenizer.chat_template = reader.chat_template
    return reader


def model(family: str, reader: Any) -> PreTrainedModel:
    """A model with 6 decoder layers of 4 heads of 32, for this processor; its weights are large, so that what it
    answers depends on every layer and on the image."""
    ids, vocabulary = reader.tokenizer.convert_tokens_to_ids, len(reader.tokenizer)
    settings = deepcopy(pico.FAMILIES[family])
    settings["text_config"] |= _TEXT | {"vocab_size": vocabulary}
    for name, value in SETTINGS.get(family, {}).items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    image = reader.image_token_ids[0]
    settings |= {"image_token_id": image, "image_token_index": image}
    if family.startswith("qwen"):
        settings |= {
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
            "video_token_id": ids("<|video_pad|>"),
        }
    if family == "gemma3":
        settings |= {"boi_token_index": ids("<start_of_image>"), "eoi_token_index": ids("<end_of_image>")}
    torch.manual_seed(0)
    return pico.filled(AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings)).eval())


def save(family: str, folder: Path) -> Path:
    """Write the model, with the names that published checkpoints have, and its processor; returns the folder."""
    reader = processor(family)
    model(family, reader).save_pretrained(folder)
    if family in ("llava", "gemma3"):  # transformers writes it only for a model that it has loaded so
        weights = load_file(folder / "model.safetensors")
        named = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): weights[name] for name in weights}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    reader.save_pretrained(folder)
    return folder


def write_records(folder: Path, number: int) -> Path:
    """Records in LLaVA's format, each with an image of four colors in a size of its own."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        quarters = np.kron(random.integers(0, 255, (2, 2, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        size = (32 + 8 * (index % 3), 32 + 8 * (index % 5))
        Image.fromarray(quarters).resize(size).save(folder / f"{index}.png")
        question = {"from": "human", "value": f"<image>\n{QUESTIONS[index % 4]}"}
        answer = {"from": "gpt", "value": ANSWERS[index % 4]}
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": [question, answer]})
    (folder / "records.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return folder / "records.json"
