"""The dtypes of a model's weights, in the checkpoint and during training; frozen layers in 4 bits (NF4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from striate.region import Region
from striate.vlm import Vlm

Dtypes = Mapping[str, torch.dtype]
"""Dtypes by the names of a state dict."""
BLOCK = 64  # weights per scale; on a CPU bitsandbytes dequantizes wrongly where a block spans two rows


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


def quantize_frozen_layers(vlm: Vlm, region: Region, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Quantize the linear modules of the layers outside `region` to NF4; GEMMs run in `dtype` on `device`.

    Returns the modules that were replaced, by their names in the model.

    Layers are quantized one by one while they move to the device, which never holds all of them unquantized. NF4:
    Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), through bitsandbytes. Weights outside of linear modules (experts
    in one tensor), and rows whose length is not a multiple of 64, are not quantized.
    """
    replaced = {
        f"{vlm.parts.layers}.{index}.{name}": module
        for index in region.complement
        for name, module in vlm.layers[index].named_modules()
        if type(module) is nn.Linear and module.in_features % BLOCK == 0
    }
    for name, module in replaced.items():
        vlm.model.set_submodule(name, _quantize(module, dtype, device))
    return replaced


def _quantize(module: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # slow to import, and seldom needed

    quantized = Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    quantized.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
    quantized.bias = module.bias
    # Otherwise, on some CPUs, the first pass in evaluation mode repacks the weights into a form without gradients.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to(device)  # moving it quantizes it
