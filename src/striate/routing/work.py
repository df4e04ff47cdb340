"""What a forward pass through a route multiplies and adds."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from striate.region import Region
from striate.routing.layer import attentions
from striate.vlm import Vlm

OUTPUTS = ("o_proj", "out_proj", "dense")  # what comes after attention


def multiply_adds(vlm: Vlm, region: Region, *, image: int, text: int) -> int:
    """Multiplications and additions of the decoder layers in the forward pass of one record of so many tokens.

    A routed layer does all its products for all T = image + text tokens, and attention 2 T^2 H d; any other does them
    for text tokens, those of keys and values for image tokens, and attention 2 text T H d. Head, tower and projector
    come on top. `vlm` may be without weights (`meta`).
    """
    total, length = 0, image + text
    for number, layer in enumerate(vlm.layers):
        queries = length if number in region else text
        every, keys, width = _products(layer, vlm.model.config.get_text_config(decoder=True))
        total += queries * every + (length - queries) * keys + 2 * queries * length * width
    return total


def _products(layer: nn.Module, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Of a token in a layer: the multiply-adds of all its matrices, those until it has keys and values, and the width
    H d of its queries."""
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    every = sum(
        weight.numel() if weight.dim() == 2 else weight.numel() // len(weight) * used
        for weight in layer.parameters()
        if weight.dim() > 1
    )
    attention = next(module for module in attentions(layer))
    linear = {name: module for name, module in attention.named_children() if isinstance(module, nn.Linear)}
    output = next(module for name, module in linear.items() if name in OUTPUTS)
    keys = sum(module.weight.numel() for name, module in linear.items() if name not in (*OUTPUTS, "q_proj"))
    return every, keys, output.in_features
