"""Protected layers, which cannot be cut, and why: other parts of the model refer to them by their number.

A few rules cover the families: features that enter at a layer by its number, keys and values that layers share. They
read the config. Cases that no rule covers are found by the verification of a cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedConfig

from striate.vlm import Vlm

Config = PreTrainedConfig
Rule = Callable[[Any, Any, int], Iterable[int]]
"""From the model's config, the decoder's config and the depth to the protected layers."""


def protected_layers(vlm: Vlm) -> dict[int, str]:
    """The layers of a model that cannot be cut, each with the reason."""
    return protected_by_config(vlm.model.config, vlm.depth)


def protected_by_config(config: Config, depth: int) -> dict[int, str]:
    """The layers that cannot be cut from a model with this config, each with the reason."""
    text = config.get_text_config(decoder=True)
    reasons: dict[int, str] = {}
    for rule, reason in RULES.items():
        reasons = {layer: reason for layer in rule(config, text, depth) if 0 <= layer < depth} | reasons
    return dict(sorted(reasons.items()))


def _deepstack(config: Any, text: Any, depth: int) -> Iterable[int]:
    vision = getattr(config, "vision_config", None)
    return range(len(getattr(vision, "deepstack_visual_indexes", None) or ()))


def _mapped_deepstack(config: Any, text: Any, depth: int) -> Iterable[int]:
    pairs = getattr(config, "deepstack_layer_map", None) or ()
    return range(1 + max((decoder_layer for _, decoder_layer in pairs), default=-1))


def _cross_attention(config: Any, text: Any, depth: int) -> Iterable[int]:
    return getattr(text, "cross_attention_layers", None) or ()


def _cross_blocks(config: Any, text: Any, depth: int) -> Iterable[int]:
    return range(depth) if getattr(text, "cross_layer_interval", None) else ()


def _inputs_by_layer(config: Any, text: Any, depth: int) -> Iterable[int]:
    return range(depth) if getattr(text, "hidden_size_per_layer_input", None) else ()


def _shared_keys(config: Any, text: Any, depth: int) -> Iterable[int]:
    """The last layers, which take keys and values from the last layer of their kind before them, and those layers."""
    first = depth - (getattr(text, "num_kv_shared_layers", None) or 0)
    kinds = (getattr(text, "layer_types", None) or ["" for _ in range(depth)])[:first]
    sources = {kind: layer for layer, kind in enumerate(kinds)} if first < depth else {}
    return [*sources.values(), *range(first, depth)]


def _key_sources(config: Any, text: Any, depth: int) -> Iterable[int]:
    sources = getattr(text, "kv_source_layers", None) or ()
    uses = Counter(sources)
    return [layer for layer, source in enumerate(sources) if uses[source] > 1]


RULES: dict[Rule, str] = {
    _deepstack: "DeepStack adds image features behind it, by its number",
    _mapped_deepstack: "DeepStack adds image features below or at it, by the number of a layer",
    _cross_attention: "its cross-attention is how the image gets in",
    _cross_blocks: "cross-attention blocks stand between the layers, by their number",
    _inputs_by_layer: "it has a slice of the embeddings by layer",
    _shared_keys: "layers share keys and values, by their number",
    _key_sources: "layers share keys and values, by their number",
}
