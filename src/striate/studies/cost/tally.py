"""Counts the FLOPs, memory traffic and live memory of real code, operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_ATEN: Any = torch.ops.aten
# PyTorch has formulas for the attention of GPUs only; that of a CPU, with the same arithmetic, would pass for free.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""FLOPs of an operation from its arguments and result, as `FlopCounterMode` counts them; all others are free."""


@dataclass(frozen=True)
class Work:
    """Operations by their FLOPs and the bytes that they read and write, and how many there are of each kind."""

    operations: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        total = Counter(self.operations)
        total.update(other.operations)  # `+` would build both anew
        return Work(total)

    def __mul__(self, times: int) -> Work:
        return Work(Counter({operation: number * times for operation, number in self.operations.items()}))

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition being two."""
        return sum(flops * number for (flops, _), number in self.operations.items())

    @property
    def traffic(self) -> int:
        """Bytes read and written."""
        return sum(traffic * number for (_, traffic), number in self.operations.items())

    def seconds(self, rate: float, bandwidth: float) -> float:
        """How long it takes at `rate` FLOP/s and `bandwidth` bytes/s.

        Every operation takes as long as the slower of its arithmetic and its memory traffic: the roofline model
        (Williams, Waterman, Patterson 2009).
        """
        return sum(
            number * max(flops / rate, traffic / bandwidth) for (flops, traffic), number in self.operations.items()
        )


def total(works: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(works, Work())


class Tally(TorchDispatchMode):
    """Counts what runs within it; on fake tensors nothing is computed or allocated.

    `work` is what was done since the last `take`; `live` the bytes of tensors made within it that are still held,
    `peak` the most that were ever held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work, self.live, self.peak = Work(), 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def take(self) -> Work:
        """The work since the last time."""
        taken, self.work = self.work, Work()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        count = FORMULAS.get(func.overloadpacket)
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        if func._schema.is_mutable or not _is_view(inputs, outputs):
            self.work.operations[flops, sum(map(_size, inputs)) + sum(map(_size, outputs))] += 1
        self._hold(outputs, inputs)
        return result

    def _hold(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        """Count new storages, until they are freed; storages of inputs are not counted."""
        for tensor in inputs:
            self._known.add(tensor.untyped_storage())
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


def _is_view(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether nothing was written: the result is another look at what came in."""
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in given for tensor in outputs)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
