"""A model spread over processes: each holds its part of every weight, and has the whole of a layer only while that
layer runs (PyTorch's `fully_shard`, FSDP2).

A unit for each decoder layer, and one for all the rest. Frozen layers are gathered like trained ones, but have no
gradients to bring together.
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

from striate.processes import Rank
from striate.vlm import Vlm


def shard(vlm: Vlm, network: nn.Module, device: torch.device, rank: Rank) -> dict[str, nn.Parameter]:
    """Spread `network` (the model, or its adapted form) over the processes' devices: its parameters now, by name."""
    mesh = init_device_mesh(device.type, (rank.of,))
    for layer in vlm.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return dict(network.named_parameters())


def unshard(network: nn.Module, rank: Rank) -> None:
    """Bring all weights back into the memory of the first process; the others keep nothing."""
    gathered: dict[int, nn.Parameter] = {}  # one for every weight, also where modules share it
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
    """The whole of a tensor, in every process, all of which have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor new values, of which each process has all and takes its part."""
    if isinstance(tensor, DTensor):
        values = values.to(tensor.device)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def optimizer_state(network: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole state of an optimiser, by the parameters' names; only the first process has it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(network, optimizer, options=options)


def set_optimizer_state(network: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`; each process takes its part, also when there are more or fewer of them."""
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))
