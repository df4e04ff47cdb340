"""Frozen decoder layers in 4 bits (NF4) during training: a quarter of their memory, with approximate outputs."""

from __future__ import annotations

import torch
from torch import nn

from striate.region import Region
from striate.vlm import Vlm

BLOCK = 64  # weights per scale; on a CPU bitsandbytes dequantizes wrongly where a block spans two rows


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
