"""Which decoder layers compute their activations again in the backward pass: as few as memory allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from striate.errors import UserError
from striate.train.memory import Activations
from striate.vlm import Vlm

SHARE = 0.8  # of the free memory; the rest is for what kernels take while they run, and for gaps


@dataclass
class Checkpointing:
    """The layers of a model that are computed again, and the way to more of them.

    `kept` are the bytes that the largest micro-batch keeps without checkpointing, `free` those there are for it;
    `inputs` are the bytes of one layer's input, which stay either way. `fixed`: chosen by the user, not by memory.
    """

    vlm: Vlm
    kept: Activations
    free: float
    inputs: float
    fixed: bool
    layers: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        """The plan in one line."""
        recomputed = f"{len(self.layers)} of {self.vlm.depth} decoder layers" if self.layers else "no decoder layer"
        need = self.needed(len(self.layers)) / 1e9
        return f"recomputes {recomputed}: about {need:.2f} GB of activations, {self.free / 1e9:.1f} GB free"

    @property
    def order(self) -> list[int]:
        """Layers by what computing them again saves, most first; those that keep nothing are left out."""
        savers = [layer for layer, kept in enumerate(self.kept.layers) if kept > self.inputs]
        return sorted(savers, key=lambda layer: (-self.kept.layers[layer], layer))

    def needed(self, number: int) -> float:
        """Bytes of activations at their height with that many layers computed again.

        That is where the forward pass ends, or where a layer is there in full again and those above it have gone.
        """
        chosen, height = self.order[:number], float(self.kept.rest)
        heights = []
        for layer, kept in enumerate(self.kept.layers):
            if layer in chosen:
                heights.append(height + kept)
            height += self.inputs if layer in chosen else kept
        return max([height, *heights])

    def choose(self, wish: Literal["auto", "none", "all"]) -> None:
        """Set the model up as wished; auto takes the fewest layers that let the activations fit."""
        numbers = {"none": 0, "all": len(self.order)}
        fitting = (number for number in range(len(self.order)) if self.needed(number) <= self.free)
        self._take(numbers[wish] if wish in numbers else next(fitting, len(self.order)))

    def at_least(self, number: int) -> None:
        """So many layers, where it is fewer."""
        if number > len(self.layers):
            self._take(number)

    def tighten(self) -> bool:
        """Half of the layers that are left, too, after memory did not suffice. False when there is nothing to gain."""
        left = len(self.order) - len(self.layers)
        if self.fixed or not left:
            return False
        self._take(len(self.layers) + (left + 1) // 2)
        return True

    def _take(self, number: int) -> None:
        self.layers = tuple(sorted(self.order[:number]))
        for layer in self.layers:
            module = self.vlm.layers[layer]
            if not isinstance(module, GradientCheckpointingLayer):
                kind = self.vlm.model.config.model_type
                raise UserError(
                    f"{kind} cannot compute layers again: use --checkpointing none, and a smaller --micro-batch"
                )
            # The reentrant kind gives no gradient to layers behind a frozen first layer.
            vars(module)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = True
