"""The parts of any Hugging Face vision-language model (LVLM): tower, projector, decoder layers, head.

`transformers` can name the decoder, the vision encoder and the depth of nearly every model behind
`AutoModelForImageTextToText`. One rule covers the rest: the decoder may be nested one level deeper, and the projector
is the other modules next to tower and decoder, or else the merger inside the tower (Qwen, GLM). `_EXCEPTIONS` are the
few families that the rule does not cover. For any other model, the error lists the modules that were found.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from striate.errors import UserError

# Name parts of modules next to tower and decoder that do not belong to the projector: other modalities, image
# generation, a second tower.
_NO_PROJECTORS = ("audio", "speech", "video_tower", "vqmodel", "generation_", "high_res_vision_model")

# Names of tower and projector in the base model. Where both are one module, patches reach the decoder through it alone;
# the resampler of Idefics is optional.
_EXCEPTIONS = {
    "fuyu": ("vision_embed_tokens", ("vision_embed_tokens",)),
    "gemma4_unified": ("embed_vision", ("embed_vision.multimodal_embedder",)),
    "git": ("image_encoder", ("visual_projection",)),
    "idefics": ("vision_model", ("perceiver_resampler", "gated_cross_attn_layers")),
    "inkling_mm_model": ("vision_tower", ("vision_tower",)),
}


@dataclass(frozen=True)
class Parts:
    """Dotted module names of the parts of one LVLM, for `model.get_submodule`."""

    tower: str
    projector: tuple[str, ...]
    layers: str
    head: str


def find_parts(model: PreTrainedModel) -> Parts:
    """Name the tower, projector, decoder layers and head of an LVLM.

    Raises:
        UserError: a part is missing; the message lists the modules that were found.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{kind} is an encoder-decoder model: striate works on decoder-only vision-language models",
            see="not-a-vision-language-model",
        )
    names = {id(module): name for name, module in model.named_modules()}
    decoder, layers = _decoder_layers(model)
    # Nemotron's head is inside the language model.
    head = model.get_output_embeddings() or model.get_decoder().get_output_embeddings()
    if id(head) not in names:
        raise UserError(f"{kind} has no language-model head", see="not-a-vision-language-model")
    if kind in _EXCEPTIONS:
        tower, projector = _find_exception(model, names)
    else:
        tower = names.get(id(model.get_encoder(modality="image")), "")
        if tower in ("", names[id(decoder)]):
            raise UserError(
                f"{kind} has no vision tower of its own; found only: {_children(model)}",
                see="not-a-vision-language-model",
            )
        projector = _projector(model, tower, names[id(decoder)], names[id(head)])
    if not projector:
        raise UserError(
            f"{kind}: no projector found between the tower ({tower}) and the decoder", see="not-a-vision-language-model"
        )
    return Parts(tower, projector, names[id(layers)], names[id(head)])


def _find_exception(model: PreTrainedModel, names: dict[int, str]) -> tuple[str, tuple[str, ...]]:
    """Tower and projector of a family in `_EXCEPTIONS`."""
    base = model.base_model
    prefix = f"{names[id(base)]}." if names[id(base)] else ""
    tower, projector = _EXCEPTIONS[model.config.model_type]
    existing = set(names.values())
    if prefix + tower not in existing:
        raise UserError(
            f"{model.config.model_type}: no module {tower}; found only: {_children(model)}",
            see="not-a-vision-language-model",
        )
    return prefix + tower, tuple(prefix + name for name in projector if prefix + name in existing)


def _children(model: PreTrainedModel) -> str:
    return ", ".join(name for name, _ in model.base_model.named_children())


def _decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its list of layers, whose length is that in the text config."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()
    for _ in range(3):  # llama4, blip-2: the decoder is a `...ForCausalLM`, the layers are one or two levels deeper
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return decoder, child
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        below = getattr(decoder, "model", getattr(decoder, "encoder", decoder))  # the encoder of BERT-like models
        decoder = inner if inner is not decoder else below
    found = ", ".join(f"{name} ({type(child).__name__})" for name, child in decoder.named_children())
    kind = model.config.model_type
    raise UserError(
        f"{kind}: no list of {depth} decoder layers in {type(decoder).__name__}; found: {found}",
        see="not-a-vision-language-model",
    )


def _projector(model: PreTrainedModel, tower: str, decoder: str, head: str) -> tuple[str, ...]:
    """Names of the modules next to tower and decoder, or of the mergers and connectors inside the tower."""
    holder = tower.rpartition(".")[0]
    beside = model.get_submodule(holder)
    prefix = f"{holder}." if holder else ""
    taken = (tower, decoder, head)
    found = [
        prefix + name
        for name, child in beside.named_children()
        if not any(other == prefix + name or other.startswith(f"{prefix}{name}.") for other in taken)
        and not any(word in name for word in _NO_PROJECTORS)
        and any(True for _ in child.parameters())
    ]
    # A bare parameter (LLaVA-NeXT's `image_newline`) is inserted between image features: part of the projector.
    found += [prefix + name for name, _ in beside.named_parameters(recurse=False)] if found else []
    if not found:
        tower_module = model.get_submodule(tower)
        found = [
            f"{tower}.{name}" for name, _ in tower_module.named_children() if "merger" in name or "connector" in name
        ]
    return tuple(found)
