"""The dtypes of a model's weights: during training, and in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Dtypes = Mapping[str, torch.dtype]
"""Dtypes by the names of a state dict."""


@dataclass(frozen=True)
class Before:
    """What a model was before training changed it: all dtypes; weights in float16 that become bfloat16, on the CPU; the
    linear modules that become NF4."""

    dtypes: Dtypes
    float16: Mapping[str, torch.Tensor]
    linear: dict[str, nn.Linear] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *, bf16: bool) -> Before:
        """Of a model on a CPU the weights are not copied."""
        half = [(name, p.data) for name, p in model.named_parameters() if bf16 and p.dtype == torch.float16]
        return cls(dtypes_of(model), {name: weights.cpu() for name, weights in half})


def dtypes_of(model: nn.Module) -> Dtypes:
    """The dtypes of a model's weights and buffers."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def size_in(model: nn.Module, dtypes: Dtypes) -> int:
    """Bytes of the weights in these dtypes."""
    return sum(dtypes[name].itemsize * parameter.numel() for name, parameter in model.named_parameters())


def cast_for_training(module: nn.Module, *, bf16: bool) -> None:
    """Cast a module's weights to the dtypes in which they train; those that are sharded have been cast before.

    Trained weights become float32: bfloat16 would round small updates away. With GEMMs in bfloat16, frozen float16
    weights become bfloat16: otherwise every forward pass would cast them, and some modules do not support mixed dtypes
    on a CPU. Without, all weights become float32.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, DTensor) or not tensor.is_floating_point():
            continue
        if tensor.requires_grad or not bf16:
            tensor.data = tensor.data.float()
        elif tensor.dtype == torch.float16:
            tensor.data = tensor.data.to(torch.bfloat16)


def restore(model: nn.Module, before: Before) -> None:
    """Restore frozen weights that were quantized or cast, bit for bit.

    With NF4 the whole model moves to the CPU: unquantized layers may not fit the device.
    """
    for name, module in before.linear.items():
        model.set_submodule(name, module)
    if before.linear:
        nn.Module.to(model, "cpu")  # a method of its own refuses quantized models
    for name, parameter in model.named_parameters():
        own = name.replace(".base_layer.", ".")
        if parameter.dtype == torch.bfloat16 and own in before.float16:
            parameter.data = before.float16[own].to(parameter.device)


def cast(model: nn.Module, dtypes: Dtypes) -> None:
    """Cast every weight and buffer to its dtype in the checkpoint."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
