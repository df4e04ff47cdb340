"""LoRA on a region: adapters on exactly the linear modules of the region's layers, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from striate.errors import UserError
from striate.region import Layers, Region
from striate.vlm import Vlm

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from striate.train.optimizer import Named


def lora_config(
    vlm: Vlm,
    region: Layers,
    *,
    modules: str = "all",
    rank: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    projector: bool = True,
) -> LoraConfig:
    """A `peft.LoraConfig` for the region, for any trainer that accepts one.

    Target modules are listed by their full names: `layers_to_transform` would also adapt the vision blocks of the same
    numbers, and would ignore a layer that does not exist. `modules` leaves those of other roles out, as in `select`.
    With `projector` its modules get full fine-tuning and are saved beside the adapters (`modules_to_save`); a bare
    parameter beside them (LLaVA-NeXT's `image_newline`) stays frozen, since peft saves modules only. Weights outside of
    linear modules (experts in one tensor, their router) stay frozen, too: peft could adapt them without dropout only.
    (For a few model types with experts peft misreads module names; `adapt` works around that.) Rank, alpha and dropout
    default to the paper's.

    Raises:
        UserError: the region is empty or for another depth.
    """
    from peft import LoraConfig  # slow to import, and not needed without adapters

    region = Region.of(region, vlm.depth)
    targets = vlm.linear_modules(region, modules)
    if not targets:
        of = "" if modules == "all" else f" of --modules {modules}"
        raise UserError(f"region {region} has no linear modules{of} to adapt")
    parts = zip(vlm.parts.projector, vlm.projector, strict=True)
    saved = [one for name, part in parts if isinstance(part, nn.Module) for one in _module_names(name, part)]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A list would match by suffix; this pattern matches full names only.
        target_modules="|".join(re.escape(name) for name in targets),
        modules_to_save=saved if projector else None,
        task_type="CAUSAL_LM",
    )


def _module_names(name: str, part: nn.Module) -> list[str]:
    """The names of a module list's members (Qwen3-VL's DeepStack mergers): peft does not save lists."""
    return [f"{name}.{index}" for index in range(len(part))] if isinstance(part, nn.ModuleList) else [name]


def adapt(
    vlm: Vlm, region: Region, *, projector: bool, modules: str = "all", **lora: Any
) -> tuple[PeftModel, dict[str, Named]]:
    """The model with adapters, and its trainable parameters by group (`layers`, `projector`), in float32.

    Raises:
        UserError: something outside the region and the projector became trainable.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = vlm.linear_modules(region, modules)  # before the adapters add linear modules of their own
    config = lora_config(vlm, region, projector=projector, modules=modules, **lora)
    with _without_model_type(vlm.model):
        network = get_peft_model(vlm.model, config)
    tuners: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for tuner in tuners:  # else each casts its input to float32, which autocast casts back
        tuner.cast_input_dtype_enabled = False
    groups: dict[str, Named] = {"layers": {}, "projector": {}}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.to(torch.float32)
        plain = name.removeprefix("base_model.model.")
        if plain.startswith(tuple(f"{target}.lora_" for target in inside)):
            groups["layers"][name] = parameter
        elif projector and plain.startswith(tuple(f"{part}." for part in vlm.parts.projector)):
            groups["projector"][name] = parameter
        else:
            raise UserError(f"{name} became trainable although it is outside the region {region}")
    return network, {group: named for group, named in groups.items() if named}


@contextmanager
def _without_model_type(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model type from peft, which then takes the names of target modules literally.

    For some types with experts peft maps them from the names of an older transformers: `gate_proj` of one shared
    expert, for example, to all experts of all layers. It recognizes these types by the config.
    """
    kind, settings = model.config.model_type, vars(model.config)
    settings["model_type"] = ""
    try:
        yield
    finally:
        settings["model_type"] = kind
