"""What tuning a region takes, before it is tuned: parameters, arithmetic, memory and time, from a model's config alone.

The real parts of the model run on fake tensors, which have shapes and types but no numbers. So what is counted is what
training does: the backward pass ends where nothing below needs a gradient, frozen weights get none, adapters cost
what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group

from striate.cost.display import Cost
from striate.cost.figure import drawn
from striate.cost.fit import fit as largest
from striate.cost.fit import size
from striate.cost.machine import Machine, gpu, this_machine
from striate.cost.outline import Dtype, Outline, outline
from striate.cost.spread import Spread
from striate.cost.step import Counts, Memory, Setup, Step
from striate.errors import UserError
from striate.plot import save
from striate.region import Region
from striate.train.fitting import in_bfloat16
from striate.vlm import default_device

__all__ = [
    "Cost",
    "Costs",
    "Counts",
    "Machine",
    "Memory",
    "Outline",
    "Setup",
    "Spread",
    "Step",
    "cost",
    "gpu",
    "outline",
    "this_machine",
    "with_pictures",
]


@dataclass(frozen=True)
class Costs:
    """What a region of each of some models takes."""

    rows: tuple[Cost, ...]

    def __rich__(self) -> Group:
        """A table a model."""
        return Group(*self.rows)


def cost(
    model: Sequence[str],
    *,
    region: str = "uniform:25%",
    method: Literal["full", "lora"] = "full",
    projector: Literal["train", "freeze"] = "train",
    rank: int = 128,
    batch: int = 128,
    micro_batch: int = 16,
    checkpointing: Literal["none", "all"] = "none",
    image_tokens: int | None = None,
    text_tokens: int = 64,
    answer_tokens: int = 64,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    gpu: str | None = None,
    efficiency: float | None = None,
    devices: int = 1,
    shard: bool = False,
    link: float = 50.0,
    fit: str | None = None,
    plot: Path | None = None,
) -> Costs:
    """What tuning a region takes: trained parameters, FLOPs, memory and time. Only the model's config is read.

    Reading pictures and records is not in it.

    Args:
        model: model folders, run folders, hub ids or config files; several can be compared.
        region: the layers that train.
        method: full weights, or LoRA.
        projector: train it or leave it.
        rank: of LoRA.
        batch: records an optimiser step.
        micro_batch: records a forward pass on one device.
        checkpointing: the decoder layers whose activations are computed again in the backward pass.
        image_tokens: of a record; default: of one picture of the tower's own size.
        text_tokens: of a record's prompt.
        answer_tokens: of a record, those that are learnt.
        dtype: of the matrix products; auto: bfloat16 on a GPU of the table, and here where there are units for it.
        gpu: a GPU of the table (h100, a100-80gb, rtx-4090, ...); default: this machine, measured for a second.
        efficiency: share of its rates that is reached, above 0 and up to 1; default: 0.6 of a GPU's peak rates, all of
            what was measured.
        devices: how many GPUs share the batch.
        shard: weights spread over them (tune --shard), instead of whole on each.
        link: GB/s that each of them sends to the others; 50 is a network of 400 Gbit/s, one card a GPU.
        fit: a memory (24GB): propose the largest region of this kind that fits, micro-batch and checkpointing with it.
        plot: a file name for the figure, written as .svg, .png and .pdf: cost against how many layers train, and
            against where a quarter of them starts.

    Raises:
        UserError: no such model, region or GPU, not a vision-language model, a number out of range, nothing fits.
    """
    room = None if fit is None else size(fit)
    here: Dtype = "bfloat16" if in_bfloat16(dtype, default_device()) else "float32"
    kind: Dtype = "bfloat16" if gpu and dtype == "auto" else here
    machine = _machine(gpu, efficiency, kind)
    setup = Setup(
        method, projector == "train", rank, checkpointing == "all", batch,
        max(1, min(micro_batch, batch // max(1, devices))), image_tokens or 0,
        text_tokens, answer_tokens, devices,
    )  # fmt: skip
    _check(setup, image_tokens)
    spread = Spread(shard, link * 1e9)
    if devices < 1 or link <= 0 or batch % devices or (fit and devices > 1):
        raise UserError(
            f"--devices {devices}: a divisor of --batch {batch}, a --link above 0, and no --fit were expected"
        )
    names = [model] if isinstance(model, str) else list(model)
    found: list[tuple[Outline, Setup]] = []
    rows = []
    for name in names:
        sketch = outline(name, dtype=kind)
        seen = with_pictures(sketch, setup) if image_tokens is None else setup
        found.append((sketch, seen))
        step = largest(sketch, seen, region, room, machine) if room else _step(sketch, seen, region)
        everything = Counts(sketch, step.setup).step(Region.parse("all", sketch.vlm.depth))
        rows.append(Cost(name, step, everything, machine, spread, sketch))
    if plot is not None:
        save(drawn(dict(zip(_short(names), found, strict=True)), machine), plot.parent, plot.stem)
    return Costs(tuple(rows))


def with_pictures(sketch: Outline, setup: Setup) -> Setup:
    """The setup with one picture a record.

    Raises:
        UserError: how many tokens that is depends on the picture.
    """
    if sketch.picture_tokens is None:
        kind = sketch.vlm.model.config.model_type
        raise UserError(
            f"{kind} makes as many tokens of a picture as its size wants: say how many (--image-tokens 256)"
        )
    return replace(setup, image_tokens=sketch.picture_tokens)


def _step(sketch: Outline, setup: Setup, region: str) -> Step:
    return Counts(sketch, setup).step(Region.parse(region, sketch.vlm.depth))


def _machine(name: str | None, efficiency: float | None, dtype: str) -> Machine:
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency}: a share above 0 and up to 1 was expected")
    found = this_machine(dtype) if name is None else gpu(name)
    return found if efficiency is None else replace(found, efficiency=efficiency)


def _check(setup: Setup, image_tokens: int | None) -> None:
    least: dict[str, Any] = {"batch": 1, "micro_batch": 1, "rank": 1, "text_tokens": 0, "answer_tokens": 1}
    for name, low in least.items():
        if getattr(setup, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(setup, name)}: at least {low} was expected")
    if image_tokens is not None and image_tokens < 0:
        raise UserError(f"--image-tokens {image_tokens}: at least 0 was expected")


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each path, unless two are alike."""
    short = [Path(name).stem if Path(name).suffix == ".json" else Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
