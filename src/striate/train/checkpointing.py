"""Activation checkpointing: which decoder layers are recomputed in the backward pass, as few as memory allows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from striate.errors import UserError
from striate.train.memory import Activations
from striate.vlm import Vlm

SHARE = 0.8  # of the free memory; the rest is for the kernels' workspaces and for fragmentation


@dataclass
class Checkpointing:
    """The recomputed layers of a model, and how to recompute more.

    `kept` are the bytes of activations of the largest micro-batch without checkpointing, `free` the bytes available for
    them; `inputs` are the bytes of one layer's input, which is kept either way. `fixed`: chosen by the user, not by
    memory.
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
        """Layers by the bytes that recomputing them saves, most first; layers that keep nothing are left out."""
        savers = [layer for layer, kept in enumerate(self.kept.layers) if kept > self.inputs]
        return sorted(savers, key=lambda layer: (-self.kept.layers[layer], layer))

    def needed(self, number: int) -> float:
        """Peak bytes of activations with that many layers recomputed.

        The peak is at the end of the forward pass, or where the backward pass has recomputed a layer and freed the
        layers above it.
        """
        chosen, total = self.order[:number], float(self.kept.rest)
        peaks = []
        for layer, kept in enumerate(self.kept.layers):
            if layer in chosen:
                peaks.append(total + kept)
            total += self.inputs if layer in chosen else kept
        return max([total, *peaks])

    def choose(self, setting: Literal["auto", "none", "all"]) -> None:
        """Recompute no layers, all layers, or (auto) the fewest layers with which the activations fit."""
        numbers = {"none": 0, "all": len(self.order)}
        fitting = (number for number in range(len(self.order)) if self.needed(number) <= self.free)
        self._recompute(numbers[setting] if setting in numbers else next(fitting, len(self.order)))

    def at_least(self, number: int) -> None:
        """Recompute at least this many layers."""
        if number > len(self.layers):
            self._recompute(number)

    def recompute_more(self) -> bool:
        """After running out of memory: recompute half of the remaining layers, too. False when none are left."""
        left = len(self.order) - len(self.layers)
        if self.fixed or not left:
            return False
        self._recompute(len(self.layers) + (left + 1) // 2)
        return True

    def _recompute(self, number: int) -> None:
        self.layers = tuple(sorted(self.order[:number]))
        recompute(self.vlm, self.layers)


def recompute(vlm: Vlm, layers: Collection[int]) -> None:
    """Recompute these decoder layers in the backward pass, and no others.

    Raises:
        UserError: the family cannot.
    """
    for index, module in enumerate(vlm.layers):
        if isinstance(module, GradientCheckpointingLayer):
            # Reentrant checkpointing gives no gradient to layers behind a frozen first layer.
            vars(module)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = index in layers
        elif index in layers:
            kind = vlm.model.config.model_type
            raise UserError(
                f"{kind} does not support activation checkpointing: use --checkpointing none and a smaller "
                "--micro-batch"
            )
