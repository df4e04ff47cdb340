"""Old and new numbers of the decoder layers, and the config's settings that depend on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from striate.errors import UserError
from striate.region import Region

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
