"""Leaving decoder layers out of a model in memory: temporarily (`bypass`), or permanently (`cut`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import nn
from transformers import PreTrainedConfig

from striate.errors import UserError
from striate.prune.numbering import Numbering
from striate.region import Region
from striate.routing import read_route, route, unroute, write_route
from striate.vlm import Vlm
from striate.vlm.modes import change_layers, skip


def bypass(vlm: Vlm, layers: Iterable[int]) -> AbstractContextManager[None]:
    """Context in which the output of each of the layers is its input.

    The layers still run and their outputs are discarded: generation with a cache is that of the model without them.
    """
    return change_layers((vlm.layers[layer] for layer in layers), skip)


def cut(vlm: Vlm, numbers: Numbering) -> None:
    """Remove the layers from the model in place, and renumber the others in modules, config and route.

    Does not verify that the result equals the bypassed model: see `verify_cut`.
    """
    left, routed = route_after(vlm.model.config, numbers), unroute(vlm.model)
    decoder = vlm.model.get_submodule(vlm.parts.layers.rpartition(".")[0])
    for config in _configs(vlm, decoder):
        for name, value in numbers.renumber(vars(config), depth_name(config)).items():
            setattr(config, name, value)
    # mllama's decoder has a list of layer numbers of its own.
    own = {name: value for name, value in vars(decoder).items() if not name.startswith("_")}
    for name, value in numbers.renumber(own).items():
        setattr(decoder, name, value)
    for removed in reversed(numbers.removed.layers):
        del vlm.layers[removed]
    for number, layer in enumerate(vlm.layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = number
    write_route(vlm.model.config, left)
    if routed:
        route(vlm, numbers.of(routed))


def route_after(config: PreTrainedConfig, numbers: Numbering) -> Region | None:
    """The route of a model without the removed layers; None where it has no route.

    Raises:
        UserError: none of its layers is left.
    """
    before = read_route(config)
    left = before and numbers.of(before)
    if left is not None and not left.layers:
        raise UserError(
            f"layers {numbers.removed} cannot be cut: none of the layers that images are routed through ({before}) "
            "would be left"
        )
    return left


def depth_name(config: PreTrainedConfig) -> str:
    """The name of a config's setting for its number of layers."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def _configs(vlm: Vlm, decoder: nn.Module) -> list[PreTrainedConfig]:
    """The decoder's configs, each once: some families' modules hold copies."""
    text = vlm.model.config.get_text_config(decoder=True)
    held = [text, *(getattr(module, "config", None) for module in decoder.modules())]
    configs = [config for config in held if isinstance(config, PreTrainedConfig)]
    same_depth = [c for c in configs if getattr(c, depth_name(c), None) == vlm.depth]
    return list({id(config): config for config in same_depth}.values())
