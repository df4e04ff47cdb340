"""The parts of any Hugging Face vision-language model (LVLM): tower, projector, decoder layers, head.

`transformers` can name the decoder, the vision encoder and the depth of nearly every model behind
`AutoModelForImageTextToText`. One rule covers the rest: the decoder may sit one hop further down, and the projector is
what stands beside tower and decoder, or, failing that, the merger inside the tower (Qwen, GLM). A model that
the rule does not fit is refused with what was found.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from striate.errors import UserError

# Neighbours of tower and decoder that do not carry image features to the decoder.
_OTHER_SENSES = ("audio", "speech", "video_tower", "vqmodel", "generation_")


@dataclass(frozen=True)
class Parts:
    """Dotted module names of the parts of one LVLM, as `model.get_submodule` takes them."""

    tower: str
    projector: tuple[str, ...]
    layers: str
    head: str


def find_parts(model: PreTrainedModel) -> Parts:
    """Name the tower, projector, decoder layers and head of an LVLM.

    Raises:
        UserError: with what was found, when a part is missing.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder model: striate works on decoder-only vision-language models")
    names = {id(module): name for name, module in model.named_modules()}
    decoder, layers = _decoder_layers(model)
    tower = model.get_encoder(modality="image")
    if tower is None or tower is decoder or not names.get(id(tower)):
        children = ", ".join(name for name, _ in model.base_model.named_children())
        raise UserError(f"{kind} has no vision tower of its own; found only: {children}")
    head = model.get_output_embeddings()
    if head is None or id(head) not in names:
        raise UserError(f"{kind} has no language-model head")
    tower_name = names[id(tower)]
    projector = _projector(model, tower_name, names[id(decoder)], names[id(head)])
    if not projector:
        raise UserError(f"{kind}: nothing found between the tower ({tower_name}) and the decoder")
    return Parts(tower_name, projector, names[id(layers)], names[id(head)])


def _decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its list of layers, whose length the text config states."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()
    for _ in range(3):  # llama4, blip-2: the decoder is a `...ForCausalLM`, the layers one or two hops further down
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return decoder, child
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        decoder = inner if inner is not decoder else getattr(decoder, "model", decoder)
    found = ", ".join(f"{name} ({type(child).__name__})" for name, child in decoder.named_children())
    kind = model.config.model_type
    raise UserError(f"{kind}: no list of {depth} decoder layers in {type(decoder).__name__}; found: {found}")


def _projector(model: PreTrainedModel, tower: str, decoder: str, head: str) -> tuple[str, ...]:
    """Names of what stands beside tower and decoder, or of the mergers inside the tower."""
    holder = tower.rpartition(".")[0]
    beside = model.get_submodule(holder)
    prefix = f"{holder}." if holder else ""
    taken = (tower, decoder, head)
    found = [
        prefix + name
        for name, child in beside.named_children()
        if not any(other == prefix + name or other.startswith(f"{prefix}{name}.") for other in taken)
        and not name.startswith(_OTHER_SENSES)
        and any(True for _ in child.parameters())
    ]
    # A bare parameter of the holder (LLaVA-NeXT's `image_newline`) goes between image features: it belongs here too.
    found += [prefix + name for name, _ in beside.named_parameters(recurse=False)] if found else []
    if not found:
        tower_module = model.get_submodule(tower)
        found = [f"{tower}.{name}" for name, _ in tower_module.named_children() if "merger" in name]
    return tuple(found)
