"""Memory: its peak, the activations that a forward pass keeps, which layers to recompute, whether full tuning fits."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from striate.errors import UserError
from striate.train.sharding import own
from striate.vlm import Vlm

# Bytes of AdamW's two moments per parameter, in float32 or in 8 bits.
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
# In errors that are not an `OutOfMemoryError`: of the host, of cuBLAS, of the driver.
OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
SHARE_FOR_STATES = 0.6  # of the free memory; the rest is for activations, which depend on the data
SHARE = 0.8  # of the free memory; the rest is for the kernels' workspaces and for fragmentation


class PeakMemory:
    """The most memory held since `start`, in 10^9 bytes.

    On a GPU: the memory allocated by PyTorch. On a CPU: the resident memory of this process, interpreter and libraries
    included; only Linux can reset that peak, elsewhere it counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Reset the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory first, else earlier work counts
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        """The peak so far, in 10^9 bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        status = Path("/proc/self/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(peak.split()[1]) * 1024 / 1e9
        import resource  # not on Windows

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, PyTorch's unused reserve included."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return psutil.virtual_memory().available


def full_tuning_fits(trainable: int, device: torch.device, optimizer: str = "adamw") -> bool:
    """Whether weights and gradients of `trainable` parameters in float32, and Adam's moments, take at most 60 % of the
    free memory of the device, the model being loaded already."""
    return trainable * (8 + MOMENT_BYTES[optimizer]) <= SHARE_FOR_STATES * free_bytes(device)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass, without weights: per decoder layer [L], and in all other
    modules (tower, projector, head, loss)."""

    layers: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        """All bytes kept."""
        return sum(self.layers) + self.rest

    def beyond(self, smaller: Activations, times: float) -> Activations:
        """The activations of a batch that exceeds this one by `times` what this one exceeds a smaller one by.

        On a straight line: copies of weights in the GEMMs' dtype are kept, too, and do not grow with the batch.
        """

        def line(start: int, end: int) -> int:
            return max(0, round(end + times * (end - start)))

        layers = (line(start, end) for start, end in zip(smaller.layers, self.layers, strict=True))
        return Activations(tuple(layers), line(smaller.rest, self.rest))


def activations(vlm: Vlm, forward: Callable[[], Any]) -> Activations:
    """The activations that `forward`, which calls the model once, keeps for the backward pass; also of a meta model.

    A storage saved by several layers counts once, for the first of them.
    """
    kept, current = [0] * vlm.depth, -1
    seen: set[int] = set()
    alive, rest = [], 0  # references: the address of a freed storage could be used again

    def enter(layer: int, module: torch.nn.Module, *_: Any) -> None:
        nonlocal current
        current = layer
        seen.update(own(p).untyped_storage()._cdata for p in module.parameters())  # gathered by now, if sharded

    enter(-1, vlm.model)  # also where a part of the model is called alone

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            if current < 0:
                rest += storage.nbytes()
            else:
                kept[current] += storage.nbytes()
        return tensor.detach()  # with its graph it would form a reference cycle that is never freed

    hooks = [vlm.model.register_forward_pre_hook(partial(enter, -1))]
    hooks += [layer.register_forward_pre_hook(partial(enter, index)) for index, layer in enumerate(vlm.layers)]
    hooks += [layer.register_forward_hook(partial(enter, -1)) for layer in vlm.layers]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    del result
    return Activations(tuple(kept), rest)


def reachable_parameters(output: torch.Tensor) -> set[torch.nn.Parameter]:
    """The parameters in the autograd graph of `output` [...]: a backward pass would give them a gradient."""
    found: set[Any] = set()
    seen: set[Any] = set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            nodes += [below for below, _ in node.next_functions]
    return found


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
