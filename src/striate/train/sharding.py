"""A model sharded over processes (PyTorch's `fully_shard`, FSDP2): each holds its shard of every weight, and gathers a
whole layer only while that layer runs.

One unit per decoder layer, and one for everything else. Frozen layers are gathered like trained ones, but have no
gradients to reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from striate.distributed import Rank
from striate.vlm import Vlm


def shard(vlm: Vlm, network: nn.Module, device: torch.device, rank: Rank) -> dict[str, nn.Parameter]:
    """Shard `network` (the model, or its adapted form) over the processes' devices; its new parameters, by name."""
    mesh = init_device_mesh(device.type, (rank.world_size,))
    for layer in vlm.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return dict(network.named_parameters())


def unshard(network: nn.Module, rank: Rank) -> None:
    """Gather all weights in the CPU memory of the first process; the others keep empty tensors."""
    gathered: dict[int, nn.Parameter] = {}  # by id: modules may share a weight
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                key = id(parameter)
                if key not in gathered:
                    weight = whole(parameter)
                    weight = weight.cpu() if rank.first else weight.new_empty(0, device="cpu")
                    gathered[key] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                module._parameters[name] = gathered[key]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; a collective operation."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Copy new values into a tensor; every process has the whole of them and takes its shard."""
    if isinstance(tensor, DTensor):
        values = values.to(tensor.device)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def optimizer_state(network: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole state of an optimizer by parameter name, in the first process only."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(network, optimizer, options=options)


def set_optimizer_state(network: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`; each process takes its shard, for any number of processes."""
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))
