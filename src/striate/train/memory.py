"""Peak memory of a piece of work, what a forward pass keeps for its backward pass, whether full tuning fits."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

from striate.vlm import Vlm

# What AdamW holds beside weight and gradient, a parameter: its two moments, in float32 or in 8 bits.
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
# of the free memory; the rest is for activations, which depend on the data
SHARE_FOR_STATES = 0.6


class PeakMemory:
    """The most memory held since `start`, in 10^9 bytes.

    On a GPU: what PyTorch allocated on it. On a CPU: the resident memory of this process, interpreter and libraries
    included; Linux can start that peak anew, elsewhere it counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # give freed memory back first, else earlier work counts as ours
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        """The peak until now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        status = Path("/proc/self/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(peak.split()[1]) * 1024 / 1e9
        import resource  # not on Windows

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody holds."""
    if device.type == "cuda":
        # What PyTorch holds in reserve is as good as free.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return psutil.virtual_memory().available


def full_tuning_fits(trainable: int, device: torch.device, optimizer: str = "adamw") -> bool:
    """Whether weights and gradients of `trainable` parameters in float32, and Adam's moments, take at most 60 % of the
    free memory of the device, the model being loaded already."""
    return trainable * (8 + MOMENT_BYTES[optimizer]) <= SHARE_FOR_STATES * free_bytes(device)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass: those of each decoder layer [L], and all others (tower,
    projector, head, loss). Weights are not among them."""

    layers: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        """All bytes kept."""
        return sum(self.layers) + self.rest

    def scaled(self, factor: float) -> Activations:
        """The same of a batch with so many times the tokens."""
        return Activations(tuple(round(kept * factor) for kept in self.layers), round(self.rest * factor))


def activations(vlm: Vlm, forward: Callable[[], Any]) -> Activations:
    """What `forward`, which calls the model once, keeps for the backward pass; also on the `meta` device.

    A storage that several layers save counts once, for the first of them.
    """
    kept, where = [0] * vlm.depth, -1
    seen = {parameter.untyped_storage()._cdata for parameter in vlm.model.parameters()}
    alive, rest = [], 0  # a storage given back could come again under the same address

    def enter(layer: int, *_: Any) -> None:
        nonlocal where
        where = layer

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            if where < 0:
                rest += storage.nbytes()
            else:
                kept[where] += storage.nbytes()
        return tensor

    hooks = [layer.register_forward_pre_hook(partial(enter, index)) for index, layer in enumerate(vlm.layers)]
    hooks += [layer.register_forward_hook(partial(enter, -1)) for layer in vlm.layers]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    del result
    return Activations(tuple(kept), rest)
