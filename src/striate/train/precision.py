"""The dtypes of a model's weights: during training, and in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from striate.region import Region
from striate.vlm import Vlm
from striate.vlm.reading import read_model

Dtypes = Mapping[str, torch.dtype]
"""Dtypes by the names of a state dict."""


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


def restore(vlm: Vlm, region: Region, dtypes: Dtypes, *, nf4: bool) -> None:
    """Restore frozen weights that were quantized or cast from the checkpoint, bit for bit.

    With NF4 the whole model moves to the CPU: unquantized layers may not fit the device.
    """
    current = {name.replace(".base_layer.", "."): parameter for name, parameter in vlm.model.named_parameters()}
    short = [name for name, p in current.items() if p.dtype == torch.bfloat16 and dtypes.get(name) == torch.float16]
    if not (short or nf4):
        return
    config = AutoConfig.from_pretrained(vlm.source, trust_remote_code=False)
    saved = Vlm.of(read_model(vlm.source, config, dequantize=True)[0])
    weights = saved.model.state_dict()
    for name in short:
        current[name].data = weights[name].to(current[name].device)
    if nf4:
        for index in region.complement:
            vlm.layers[index] = saved.layers[index]
        nn.Module.to(vlm.model, "cpu")


def cast(model: nn.Module, dtypes: Dtypes) -> None:
    """Cast every weight and buffer to its dtype in the checkpoint."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
