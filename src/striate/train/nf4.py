"""Decoder layers that do not train, in 4 bits while others train: a quarter of their memory, at a small price."""

from __future__ import annotations

import torch
from torch import nn

from striate.region import Region
from striate.vlm import Vlm, load

BLOCK = 64  # weights that share a scale; bitsandbytes reads rows back wrongly on a CPU where blocks run over their ends


def hold_in_nf4(vlm: Vlm, region: Region, dtype: torch.dtype, device: torch.device) -> None:
    """Put NF4 weights into the linear modules of the layers outside `region`; products are in `dtype` on `device`.

    Layer by layer on their way to the device, so that it never holds them in full. NF4: Dettmers et al. 2023, "QLoRA"
    (arXiv 2305.14314), through bitsandbytes. Weights that are no linear modules (experts in one
    tensor), and rows that are no multiple of 64 long, stay.
    """
    for index in range(vlm.depth):
        if index in region:
            continue
        layer = vlm.layers[index]
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear and module.in_features % BLOCK == 0:
                layer.set_submodule(name, _in_nf4(module, dtype, device))


def bring_back(vlm: Vlm, region: Region) -> None:
    """Put the layers outside `region` back as the model's checkpoint has them."""
    saved = load(vlm.source, device="cpu")
    for index in range(vlm.depth):
        if index not in region:
            vlm.layers[index] = saved.layers[index].to(vlm.device)


def _in_nf4(module: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # slow to import, and seldom needed

    held = Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    held.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=held)
    held.bias = module.bias
    # Else, on some CPUs, the first pass in evaluation mode repacks the weights for good, into a form without gradients.
    held.support_avx512bf16_for_cpu = False
    return held.to(device)  # where it is quantised
