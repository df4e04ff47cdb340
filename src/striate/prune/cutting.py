"""Leaving decoder layers out of a model in memory, temporarily (`bypass`) or permanently (`cut`).

`Numbering` has the old and new numbers of the layers, and the config's settings that depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from striate.errors import UserError
from striate.region import Layers, Region
from striate.routing import check_route, read_route, running_route, write_route
from striate.vlm import Vlm
from striate.vlm.modes import change_layers, skip

# Lists of layer numbers, in any order, in the configs of the families that have them.
INDICES = ("cross_attention_layers", "full_attn_idxs", "mlp_only_layers", "moe_layers", "rope_scaling_layers")
# Lists with one layer number per layer.
SOURCES = ("kv_source_layers",)
# Layer numbers that split the layers into two kinds, below and from there on.
BOUNDARIES = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
# Other lists, whose length can be the model's depth by coincidence.
UNRELATED = ("_token_id", "_token_ids", "architectures")


@dataclass(frozen=True)
class Numbering:
    """The layers to remove, a region of the whole model, and the new numbers of the others.

    Raises:
        UserError: no layer is removed, or all layers are.
    """

    removed: Region

    def __post_init__(self) -> None:
        if not 0 < len(self.removed) < self.removed.depth:
            raise UserError(f"{len(self.removed)} of {self.removed.depth} layers cannot be cut: at least one, not all")

    @property
    def remaining(self) -> tuple[int, ...]:
        """Old numbers of the remaining layers, in order."""
        return self.removed.complement.layers

    @property
    def depth(self) -> int:
        """Number of remaining layers."""
        return len(self.remaining)

    @cached_property
    def new(self) -> dict[int, int]:
        """New number of each remaining layer, by its old number."""
        return {old: new for new, old in enumerate(self.remaining)}

    def boundary(self, old: int) -> int:
        """Number of remaining layers below `old`, which may lie above the last layer."""
        return old - sum(layer < old for layer in self.removed)

    def of(self, region: Region) -> Region:
        """The remaining layers of a region, in the new numbers."""
        origin = f"{region} of {region.depth} layers, before layers {self.removed} were cut"
        return Region(tuple(self._new_numbers(region)), self.depth, origin)

    @property
    def neighbors(self) -> Region:
        """The remaining layers below and above each cut, in the new numbers."""
        beside = {near for layer in self.removed for near in (self.boundary(layer) - 1, self.boundary(layer))}
        return Region(tuple(sorted(beside & set(range(self.depth)))), self.depth, f"neighbors of {self.removed}")

    def renumber(self, settings: Mapping[str, Any], depth_name: str = "num_hidden_layers") -> dict[str, Any]:
        """The settings of a decoder that change, with their new values.

        `settings` is a config as a mapping, from memory or from config.json; `depth_name` its name for the depth.
        """
        changes = {}
        for name, value in settings.items():
            new = self.depth if name == depth_name and value is not None else self._renumber_value(name, value)
            if new is not None:
                changes[name] = new
        return changes

    def _renumber_value(self, name: str, value: Any) -> Any:
        """The new value of a setting; None when it does not change."""
        if name in BOUNDARIES and isinstance(value, int):
            return self.boundary(value)
        if name in INDICES and isinstance(value, list | tuple):
            return self._new_numbers(value)
        if isinstance(value, str) and "pattern" in name and len(value) == self.removed.depth:  # one letter per layer
            return "".join(value[layer] for layer in self.remaining)
        if not isinstance(value, list | tuple) or len(value) != self.removed.depth or name.endswith(UNRELATED):
            return None
        entries = [value[layer] for layer in self.remaining]
        return [self.new.get(entry, entry) for entry in entries] if name in SOURCES else entries

    def _new_numbers(self, layers: Iterable[int]) -> list[int]:
        return [self.new[layer] for layer in layers if layer in self.new]


def bypass(vlm: Vlm, layers: Layers) -> AbstractContextManager[None]:
    """Context in which the output of each of the layers, a region in any form or their numbers, is its input.

    The layers still run and their outputs are discarded: generation with a cache is that of the model without them.

    Raises:
        UserError: a layer does not exist, or the region is for another depth.
    """
    return change_layers((vlm.layers[layer] for layer in Region.of(layers, vlm.depth)), skip)


def cut(vlm: Vlm, numbers: Numbering) -> None:
    """Remove the layers from the model in place, and renumber the others in modules, config and route.

    Does not verify that the result equals the bypassed model: see `verify_cut`.
    """
    left, routed = route_after(vlm.model.config, numbers), running_route(vlm.model)
    if routed:
        check_route(numbers.of(routed.region), numbers.depth)
        routed.remove()
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
        routed.turn_on(numbers.of(routed.region))


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
