"""Which device a model runs on, and what that device can do."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from striate.errors import UserError, first_line


def align_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Align the weights on the CPU to 64 bytes, as matmuls prefer; returns the model.

    Memory-mapped weights start at any offset, and on some CPUs the result of a matmul depends on the alignment in the
    last bit: two loads of one model would not agree.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def check_device(name: str | torch.device) -> torch.device:
    """The device of this name, after a test that it is available.

    Raises:
        UserError: there is no such device, or this PyTorch does not support it.
    """
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available: {first_line(error)}; omit it, or use cpu") from None


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device has native bfloat16 support. A CPU without it is ten times slower than in float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
