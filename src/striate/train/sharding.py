"""A model sharded over processes (PyTorch's `fully_shard`, FSDP2): each holds its shard of every weight, and gathers a
whole layer only while that layer runs.

One unit per decoder layer, and one for everything else. Frozen layers are gathered like trained ones, but have no
gradients to reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from striate.distributed import Rank
from striate.train.precision import cast_for_training
from striate.vlm import Vlm


def shard(vlm: Vlm, network: nn.Module, device: torch.device, rank: Rank, *, bf16: bool) -> dict[str, nn.Parameter]:
    """Shard `network` (the model, or its adapted form) over the processes' devices; its new parameters, by name.

    Unit by unit, the weights are read from the memory-mapped checkpoint, cast for training, sharded and let go: a
    process holds its shards and one unit. With `bf16` the trained weights, which are in float32, are gathered in
    bfloat16, the dtype of the GEMMs: half the traffic, and autocast keeps no copies. Gradients are summed in float32.
    """
    mesh = init_device_mesh(device.type, (rank.world_size,))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in (*vlm.layers, network):
        cast_for_training(unit, bf16=bf16)
        whole_ones = [p for p in unit.parameters() if not isinstance(p, DTensor)]
        frozen = (p for p in whole_ones if not p.requires_grad)
        keeps = any(p.dtype == torch.float32 for p in frozen)  # for a reason, as routers of experts are
        fully_shard(unit, mesh=mesh, mp_policy=half if bf16 and not keeps else MixedPrecisionPolicy())
        for parameter in whole_ones:  # others may refer to it
            parameter.data = parameter.data.new_empty(0)
    return dict(network.named_parameters())


@contextmanager
def unsharded_parameters(vlm: Vlm, network: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters by name, as a forward pass inside computes with them: of a sharded model those it gathered.

    At the end the model is as it was sharded: after a forward pass without a backward pass some would stay gathered.
    """
    found, names = dict(network.named_parameters()), {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, _: Any) -> None:
        own_names = module.named_parameters(prefix=names[module])
        found.update((name, p) for name, p in own_names if not isinstance(p, DTensor))

    hooks = [module.register_forward_pre_hook(note) for module in (vlm.model, *vlm.layers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for module in names:
            if isinstance(module, FSDPModule):
                module.reshard()


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


def shard_like(tensor: Tensor, values: Tensor) -> Tensor:
    """The values, of which every process has the whole, sharded as a tensor of their shape is."""
    if not isinstance(tensor, DTensor) or values.shape != tensor.shape:
        return values
    return distribute_tensor(
        values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )  # fmt: skip
