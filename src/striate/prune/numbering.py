"""Old and new numbers of the decoder layers, and what in a config goes by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from striate.errors import UserError
from striate.region import Region

# Lists of layer numbers, in any order, in the configs of the families that have them.
INDICES = ("cross_attention_layers", "full_attn_idxs", "mlp_only_layers", "moe_layers", "rope_scaling_layers")
# Lists with one layer number for each layer.
SOURCES = ("kv_source_layers",)
# Numbers that split the layers: those below are of one kind, those from there on of another.
BOUNDARIES = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
# Lists of other things, which can happen to be as long as the model is deep.
UNRELATED = ("_token_id", "_token_ids", "architectures")


@dataclass(frozen=True)
class Numbering:
    """Which layers go, and what the others are called afterwards.

    `removed` is a region of the model as it was.

    Raises:
        UserError: nothing is removed, or everything.
    """

    removed: Region

    def __post_init__(self) -> None:
        if not 0 < len(self.removed) < self.removed.depth:
            raise UserError(f"{len(self.removed)} of {self.removed.depth} layers cannot be cut: at least one, not all")

    @property
    def kept(self) -> tuple[int, ...]:
        """Old numbers of the layers that stay, in order."""
        return self.removed.complement.layers

    @property
    def depth(self) -> int:
        """Number of layers that stay."""
        return len(self.kept)

    @cached_property
    def new(self) -> dict[int, int]:
        """Old number to new number, of the layers that stay."""
        return {old: new for new, old in enumerate(self.kept)}

    def boundary(self, old: int) -> int:
        """How many layers stay of those below `old`, which may lie above the last layer."""
        return old - sum(layer < old for layer in self.removed)

    def of(self, region: Region) -> Region:
        """What stays of a region, in the new numbers."""
        kept = self._new_numbers(region)
        origin = f"{region} of {region.depth} layers, before layers {self.removed} were cut"
        return Region(tuple(kept), self.depth, origin)

    @property
    def neighbours(self) -> Region:
        """The layers below and above each cut, in the new numbers."""
        beside = {near for layer in self.removed for near in (self.boundary(layer) - 1, self.boundary(layer))}
        return Region(tuple(sorted(beside & set(range(self.depth)))), self.depth, f"neighbours of {self.removed}")

    def renumbered(self, settings: Mapping[str, Any], depth_name: str = "num_hidden_layers") -> dict[str, Any]:
        """What has to change in the settings of a decoder: name to new value.

        `settings` is a config as a mapping, from memory or from config.json; `depth_name` what it calls its depth.
        """
        changes = {}
        for name, value in settings.items():
            new = self.depth if name == depth_name and value is not None else self._moved(name, value)
            if new is not None:
                changes[name] = new
        return changes

    def _moved(self, name: str, value: Any) -> Any:
        if name in BOUNDARIES and isinstance(value, int):
            return self.boundary(value)
        if name in INDICES and isinstance(value, list | tuple):
            return self._new_numbers(value)
        if isinstance(value, str) and "pattern" in name and len(value) == self.removed.depth:  # a letter for each layer
            return "".join(value[layer] for layer in self.kept)
        if not isinstance(value, list | tuple) or len(value) != self.removed.depth or name.endswith(UNRELATED):
            return None
        entries = [value[layer] for layer in self.kept]
        return [self.new.get(entry, entry) for entry in entries] if name in SOURCES else entries

    def _new_numbers(self, layers: Iterable[int]) -> list[int]:
        return [self.new[layer] for layer in layers if layer in self.new]
