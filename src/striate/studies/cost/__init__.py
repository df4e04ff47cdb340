"""The cost of tuning a region, from a model's config alone: parameters, FLOPs, memory and time.

The real parts of the model run on fake tensors, which have shapes and types but no data. So the count is that of
training: the backward pass ends where nothing below needs a gradient, frozen weights get no gradient, adapters count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Group

from striate.errors import UserError, at_least
from striate.plot import save
from striate.region import Region
from striate.studies.cost.display import Cost, cost_figure
from striate.studies.cost.fake_model import Dtype, FakeModel, fake_model
from striate.studies.cost.machine import Machine, gpu_of, this_machine
from striate.studies.cost.step import Counts, Memory, Parallelism, Setup, Step, size
from striate.studies.cost.step import fit as largest
from striate.vlm.devices import default_device, has_native_bfloat16
from striate.vlm.modules import parse_modules

__all__ = [
    "Cost",
    "Costs",
    "Counts",
    "FakeModel",
    "Machine",
    "Memory",
    "Parallelism",
    "Setup",
    "Step",
    "cost",
    "fake_model",
    "gpu_of",
    "this_machine",
    "with_one_image",
]


@dataclass(frozen=True)
class Costs:
    """The cost of tuning a region of each of several models."""

    rows: tuple[Cost, ...]

    def __rich__(self) -> Group:
        """One table per model."""
        return Group(*self.rows)


def cost(
    model: Sequence[str],
    *,
    region: str = "uniform:25%",
    route: str | None = None,
    modules: str = "all",
    method: Literal["full", "lora"] = "full",
    projector: Literal["train", "freeze"] = "train",
    rank: int = 128,
    batch: int = 128,
    micro_batch: int = 16,
    checkpointing: Literal["none", "all"] = "none",
    image_tokens: int | None = None,
    text_tokens: int = 64,
    answer_tokens: int = 64,
    gpu: str | None = None,
    devices: int = 1,
    shard: bool = False,
    link: float = 50.0,
    fit: str | None = None,
    plot: Path | None = None,
) -> Costs:
    """The cost of tuning a region: trained parameters, FLOPs, memory and time, from the model's config alone.

    Reading images and records is not counted.

    Args:
        model: model folders, run folders, hub ids or config files; several are compared.
        region: the layers that train.
        route: the layers that image tokens pass through; same: the region and layer 0; default: all layers. Compared
            with all layers without a route.
        modules: the matrices of these layers that train: all, or some of attention, mlp, gate_up, down, qkv, o.
        method: full weights, or LoRA.
        projector: train it or leave it.
        rank: of LoRA.
        batch: records per optimizer step.
        micro_batch: records per forward pass on one device.
        checkpointing: the decoder layers whose activations are recomputed in the backward pass.
        image_tokens: of a record; default: those of one image of the tower's own size.
        text_tokens: of a record's prompt.
        answer_tokens: of a record, those in the loss.
        gpu: a GPU of the table (h100, a100-80gb, rtx-4090, ...), at 60 % of its peak rates; default: this machine,
            measured for a second.
        devices: how many GPUs share the batch.
        shard: weights spread over them (tune --shard), instead of whole on each.
        link: GB/s that each of them sends to the others; 50 is a network of 400 Gbit/s, one card per GPU.
        fit: a memory (24GB): propose the largest region of this kind that fits, micro-batch and checkpointing with it.
        plot: a file name for the figure, written as .svg, .png and .pdf: cost against how many layers train, and
            against where a quarter of them starts.

    Raises:
        UserError: no such model, region or GPU, not a vision-language model, a number out of range, nothing fits.
    """
    at_least(1, micro_batch=micro_batch)
    room = None if fit is None else size(fit)
    kind: Dtype = "bfloat16" if gpu or has_native_bfloat16(default_device()) else "float32"
    machine = this_machine(kind) if gpu is None else gpu_of(gpu)
    setup = Setup(
        method, projector == "train", rank, checkpointing == "all", batch,
        max(1, min(micro_batch, batch // max(1, devices))), image_tokens or 0,
        text_tokens, answer_tokens, devices, parse_modules(modules), route,
    )  # fmt: skip
    at_least(0, text_tokens=text_tokens, image_tokens=image_tokens)
    at_least(1, batch=batch, rank=rank, answer_tokens=answer_tokens)
    parallelism = Parallelism(shard, link * 1e9)
    if devices < 1 or link <= 0 or batch % devices or (fit and devices > 1):
        raise UserError(
            f"--devices {devices}: a divisor of --batch {batch}, a --link above 0, and no --fit were expected"
        )
    names = [model] if isinstance(model, str) else list(model)
    models: list[tuple[FakeModel, Setup]] = []
    rows = []
    for name in names:
        fake = fake_model(name, dtype=kind)
        seen = with_one_image(fake, setup) if image_tokens is None else setup
        models.append((fake, seen))
        if room:
            step = largest(fake, seen, region, room, machine)
        else:
            step = Counts(fake, seen).step(Region.parse(region, fake.vlm.depth))
        whole = replace(step.setup, modules="all", route=None)
        everything = Counts(fake, whole).step(Region.parse("all", fake.vlm.depth))
        rows.append(Cost(name, step, everything, machine, parallelism, fake))
    if plot is not None:
        save(cost_figure(dict(zip(_short(names), models, strict=True)), machine), plot.parent, plot.stem)
    return Costs(tuple(rows))


def with_one_image(fake: FakeModel, setup: Setup) -> Setup:
    """The setup with one image per record.

    Raises:
        UserError: the number of tokens depends on the image.
    """
    if fake.tokens_per_image is None:
        kind = fake.vlm.model.config.model_type
        raise UserError(f"the image tokens of {kind} depend on the size of the image: give --image-tokens, such as 256")
    return replace(setup, image_tokens=fake.tokens_per_image)


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each path, unless two are alike."""
    short = [Path(name).stem if Path(name).suffix == ".json" else Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
