"""Batches whose attention and layers are looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pico
import torch
from asking import answered, in_family, loud, noise, record
from torch import nn

import striate
import striate.trace
from striate.data import Batch, Record, collate, encode
from striate.scores.states import token_kinds
from striate.trace import Attention, forward, watch_attention
from striate.vlm import Vlm, select

# Language models that attend in other ways than Llama, each inside a LLaVA.
MODELS: dict[str, dict[str, Any]] = {
    "one head a group": {"model_type": "llama", "num_key_value_heads": 4},
    "sliding window": {"model_type": "mistral", "sliding_window": 9},
    "soft cap": {"model_type": "gemma2", "attn_logit_softcapping": 0.5, "sliding_window": 9},
    "sinks": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "experts": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "fused": {"model_type": "phi3"},
}


def llava_of(text: dict[str, Any]) -> Vlm:
    """A pico LLaVA around a language model of another kind."""
    family = pico.FAMILIES["llava"]
    with patch.dict(pico.FAMILIES, llava=family | {"text_config": family["text_config"] | text}):
        return of_family("llava")


def of_family(name: str) -> Vlm:
    """A pico model of a family in which no weights are 0, as those of Gemma 3's projector are to begin with."""
    vlm = loud(in_family(name))
    for parameter in vlm.model.parameters():
        if not parameter.any() and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return vlm


def records(*, text_only: bool = True) -> list[Record]:
    """One image, none, two; of different lengths; the last without an answer."""
    two = record("What colour is one bird")
    two = replace(
        two,
        messages=({"role": "user", "content": [{"type": "image"}, {"type": "image"}, *two.messages[0]["content"]]},),
        images=(noise(2, 40, 40), noise(3, 32, 32)),
    )
    one = answered(replace(record("is the red cat on a mat?", image=0), images=(noise(0, 20, 16),)), "no, two dogs")
    return [one, *([answered(record("yes, no: two dogs"), "red")] if text_only else []), two]


def batch_of(vlm: Vlm, asked: list[Record], side: str = "right") -> Batch:
    examples = [encode(one, vlm.processor, generation=one.messages[-1]["role"] == "user") for one in asked]
    return collate(examples, pad_id=vlm.pad_token_id, side=side).to(vlm.device, vlm.model.dtype)


def attention_of(vlm: Vlm, batch: Batch) -> dict[int, Attention]:
    kinds, seen = token_kinds(batch), {}

    def see(layer: int, attention: Attention) -> None:
        assert layer not in seen
        seen[layer] = attention

    with watch_attention(vlm, see, queries=kinds["text"], keys=kinds["image"]):
        forward(vlm, batch)
    return seen


def mllama() -> tuple[Vlm, Batch]:
    """Layers 1 and 3 look at the image by cross-attention."""
    text = {
        **pico.FAMILIES["llava"]["text_config"],
        "model_type": "mllama_text_model",
        "cross_attention_layers": [1, 3],
    }
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 32, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64,
        "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    with patch.dict(pico.FAMILIES, mllama={"text_config": text, "vision_config": tower}):
        vlm = Vlm.of(pico.pico("mllama"))
    tokens = torch.tensor([[2, 6, 10, 11, 12, 13], [2, 6, 14, 15, 0, 0]])
    inputs = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "pixel_values": torch.randn(2, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 6, 1, 1, dtype=torch.long),
    }
    labels = torch.full_like(tokens, -100)
    labels[0, 4:], labels[1, 3] = tokens[0, 4:], 15
    return vlm, Batch(inputs, labels, tokens == 6, ("a", "b"))


def family_batch(vlm: Vlm, name: str) -> Batch:
    one = replace(answered(record("is the red cat on a mat?", image=0), "one bird"), images=(noise(0, 20, 16),))
    two = replace(answered(record("What", image=0), "yes, two dogs"), images=(noise(1, 40, 40),))
    if name == "paligemma":
        return batch_of(vlm, [one, two])
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    several = Record("", ({"role": "user", "content": content},), (noise(2, 30, 30), noise(3, 16, 40)))
    return batch_of(vlm, [one, answered(record("two"), "three"), two, answered(several, "a mat on one bird")])


def family(name: str) -> tuple[Vlm, Batch]:
    vlm = loud(in_family(name))
    select(vlm, striate.Region.parse("1,3", vlm.depth))
    return vlm, family_batch(vlm, name)
