"""Which decoder layers compute their activations again in the backward pass: as few as memory allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from striate.errors import UserError
from striate.train.memory import Activations
from striate.vlm import Vlm

SHARE = 0.8  # of the free memory; the rest is for what kernels take while they run, and for gaps
FLAG = "gradient_checkpointing"  # of a layer of transformers
ADAM_BYTES = 12  # a trained parameter, still to come when training starts: gradient and two moments in float32


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
        """Bytes of activations with that many layers computed again, one of which is there in full at a time."""
        chosen = self.order[:number]
        saved = sum(self.kept.layers[layer] - self.inputs for layer in chosen)
        return self.kept.total - saved + max((self.kept.layers[layer] for layer in chosen), default=0)

    def choose(self, wish: Literal["auto", "none", "all"]) -> None:
        """Set the model up as wished; auto takes the fewest layers that let the activations fit."""
        numbers = {"none": 0, "all": len(self.order)}
        fitting = (number for number in range(len(self.order)) if self.needed(number) <= self.free)
        self._take(numbers[wish] if wish in numbers else next(fitting, len(self.order)))

    def tighten(self) -> bool:
        """Half of the layers that are left, too, after memory did not suffice. False when there is nothing to gain."""
        left = len(self.order) - len(self.layers)
        if self.fixed or not left:
            return False
        self._take(len(self.layers) + (left + 1) // 2)
        return True

    def _take(self, number: int) -> None:
        self.layers = tuple(sorted(self.order[:number]))
        if not self.layers:
            return
        try:
            # The reentrant kind gives no gradient to layers behind a frozen first layer.
            self.vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"--checkpointing: {self.vlm.model.config.model_type} cannot compute layers again"
            ) from error
        for module in self.vlm.model.modules():
            if FLAG in vars(module):
                setattr(module, FLAG, False)
        for layer in self.layers:
            setattr(self.vlm.layers[layer], FLAG, True)
