"""The optimizer and the learning rate of each step."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from striate.train.options import SCHEDULES, TrainOptions

Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters of one part of the model (layers, projector, tower), by name, and their peak learning rate."""

    parameters: Named
    rate: float


def build_optimizer(groups: dict[str, Group], options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW with one learning rate per part, and weight decay on all parameters but norms and biases."""
    parameters = [
        {"params": chosen, "lr": group.rate, "weight_decay": decay}
        for group in groups.values()
        for decays, decay in ((True, options.weight_decay), (False, 0.0))
        if (chosen := [p for name, p in group.parameters.items() if _decays(name, p) == decays])
    ]
    if options.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # slow to import, and seldom needed

        return AdamW8bit(parameters)
    return torch.optim.AdamW(parameters, fused=True)


def build_schedule(options: TrainOptions, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """`transformers`' schedule over `steps`, after a linear warm-up."""
    from transformers import get_scheduler  # slow to import, as in `Loop`

    warmup = ceil(options.warmup * steps)
    return get_scheduler(SCHEDULES[options.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def forward_schedule(schedule: LambdaLR, steps: int) -> None:
    """Put a new schedule where it stands after so many steps."""
    schedule.last_epoch = steps
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(steps)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and not name.endswith("bias")
