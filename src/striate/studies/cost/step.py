"""One training step of a region, on one device or several: trained parameters, FLOPs, memory, and what fits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from striate.errors import UserError
from striate.region import Region
from striate.routing import resolve
from striate.studies.cost.fake_model import FakeModel, calls
from striate.studies.cost.machine import Machine
from striate.studies.cost.section import (
    Passed,
    Section,
    Trained,
    Work,
    head_section,
    layer_section,
    total,
    vision_section,
)
from striate.vlm import linear_in, select
from striate.vlm.modules import choose_names

STATES = 8  # bytes of AdamW's two moments of a trained parameter, in float32
FLOAT = 4  # bytes of a trained weight, and of its gradient
# Bytes that a trained parameter moves through memory. An optimizer step reads weight, gradient and two moments, and
# writes all but the gradient (28); clipping reads the gradient twice and writes it once (12). Every forward pass of a
# step but the first adds to the gradient (12).
STEP_TRAFFIC, ADDING_TRAFFIC = 40, 12


UNITS = 2
"""Decoder layers whose weights are whole on a device at a time: one that runs, and the next one on its way."""
ROOM = 0.9
"""Share of a memory that a run may fill; the rest is for libraries, and gaps that an allocator leaves."""
_UNITS = {"": 1e9, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
KINDS = ("uniform", "first", "middle", "last", "hybrid")


@dataclass(frozen=True)
class Setup:
    """How the `modules` of a region train. Tokens are those of one record; `devices` share the batch; image tokens pass
    through the layers of `route` (a form of a region, `same`, or None: all of them)."""

    method: Trained = "full"
    projector: bool = True
    rank: int = 128
    checkpointing: bool = False
    batch: int = 128
    micro_batch: int = 16
    image_tokens: int = 0
    text_tokens: int = 64
    answer_tokens: int = 64
    devices: int = 1
    modules: str = "all"
    route: str | None = None

    @property
    def tokens(self) -> int:
        """All tokens of a record."""
        return self.image_tokens + self.text_tokens + self.answer_tokens

    @property
    def passes(self) -> int:
        """Forward passes of an optimizer step, on each device."""
        return math.ceil(self.batch / self.micro_batch / self.devices)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; each kind at its most.

    `weights` are in the checkpoint's type where frozen, in float32 where trained; `logits` what head and loss hold;
    `temporary` the most that a single layer holds beside its activations. `peak` is the most at any one moment of a
    step with gradients of an earlier pass: logits and temporaries are not held together.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    peak: int


@dataclass(frozen=True)
class Step:
    """One optimizer step: trained and all parameters; the work of a forward pass, a backward pass and the optimizer;
    memory."""

    region: Region
    setup: Setup
    trainable: int
    parameters: int
    forward: Work
    backward: Work
    optimizer: Work
    memory: Memory
    route: Region | None = None

    @property
    def record_flops(self) -> tuple[float, float]:
        """FLOPs of one record, forward and backward."""
        return self.forward.flops / self.setup.micro_batch, self.backward.flops / self.setup.micro_batch

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Seconds of the whole step at `rate` FLOP/s and `bandwidth` bytes/s of each device."""
        setup = self.setup
        once = self.forward.seconds(rate, bandwidth) + self.backward.seconds(rate, bandwidth)
        return once * setup.batch / setup.micro_batch / setup.devices + self.optimizer.seconds(rate, bandwidth)


@dataclass(frozen=True)
class Counts:
    """The sections of a model under one setup, each counted when first asked for; layers that are alike, once."""

    fake_model: FakeModel
    setup: Setup
    _layers: dict[Any, Section] = field(default_factory=dict, repr=False)

    @cached_property
    def calls(self) -> list[Any]:
        """What each decoder layer is called with."""
        return calls(self.fake_model, self.setup.micro_batch, self.setup.tokens)

    @cached_property
    def head(self) -> Section:
        """Final norm, head and loss."""
        return head_section(self.fake_model, self.setup.micro_batch, self.setup.tokens, self.setup.answer_tokens)

    @cached_property
    def vision(self) -> Section:
        """Tower and projector."""
        setup, config = self.setup, self.fake_model.vlm.model.config
        merged = getattr(config.vision_config, "spatial_merge_size", getattr(config, "scale_factor", 1))
        per_image = self.fake_model.tokens_per_image or setup.image_tokens or 1
        return vision_section(
            self.fake_model,
            setup.micro_batch * math.ceil(setup.image_tokens / per_image),
            setup.micro_batch * setup.image_tokens * int(merged) ** 2,
            trains=setup.projector,
            whole=setup.method == "full",
        )

    def layer(self, index: int, trains: Trained | None, upstream: bool, passed: Passed | None = None) -> Section:
        """One decoder layer."""
        layer, call = self.fake_model.vlm.layers[index], self.calls[index]
        shapes = tuple((name, parameter.shape) for name, parameter in layer.named_parameters())
        alike = (type(layer), shapes, _settings(layer), trains, upstream, passed)
        if alike not in self._layers:
            self._layers[alike] = layer_section(
                self.fake_model, layer, call, trains=trains, modules=self.setup.modules, rank=self.setup.rank,
                upstream=upstream,
                recomputed=self.setup.checkpointing and (upstream or trains is not None), passed=passed,
            )  # fmt: skip
        return self._layers[alike]

    def step(self, region: Region) -> Step:
        """The step that trains a region.

        Raises:
            UserError: the region or the route is for another depth, or nothing would train.
        """
        vlm, setup = self.fake_model.vlm, self.setup
        plan = select(vlm, region, modules=setup.modules, projector=setup.projector)
        vision = self.vision
        trained = {index for index in region if self._trains(vlm.layers[index])}
        lowest = min(trained, default=vlm.depth)
        route = resolve(setup.route, region)
        layers = [
            self.layer(
                index, setup.method if index in trained else None, setup.projector or index > lowest,
                self._passed(index, route),
            )
            for index in range(vlm.depth)
        ]  # fmt: skip
        sections = [vision, *layers, self.head]
        trainable = sum(section.trained for section in sections)
        adapters = trainable - vision.trained if setup.method == "lora" else 0
        # peft keeps the projector that it started from beside the one that it trains.
        replaced = 0 if setup.method == "lora" else trainable
        weights = (plan.total - replaced) * vlm.model.dtype.itemsize + FLOAT * trainable
        optimizer = (0, trainable * (STEP_TRAFFIC + ADDING_TRAFFIC * (setup.passes - 1)))
        return Step(
            region,
            setup,
            trainable,
            plan.total + adapters,
            total(section.forward for section in sections),
            total(section.backward for section in sections),
            Work(Counter([optimizer])),
            self._memory(sections, trainable, weights=weights),
            route,
        )

    def _passed(self, index: int, route: Region | None) -> Passed | None:
        if route is None or index in route or not self.setup.image_tokens:
            return None
        first, last = index == 0 or index - 1 in route, index == route.depth - 1 or index + 1 in route
        return Passed(self.setup.image_tokens, first, last)

    def _trains(self, layer: nn.Module) -> bool:
        """Whether a layer of the region has any of the modules: hybrid models have layers without attention."""
        lora = self.setup.method == "lora"
        names = linear_in(layer) if lora else [name for name, _ in layer.named_parameters()]
        return bool(choose_names(names, self.setup.modules))

    def _memory(self, sections: list[Section], trainable: int, *, weights: int) -> Memory:
        """Follow a pass through its sections and back, and remember the most that was held."""
        setup, head = self.setup, sections[-1]
        # What the decoder is given: hidden states with the image features in their places.
        held = setup.micro_batch * setup.tokens * self.fake_model.width * self.fake_model.vlm.model.dtype.itemsize
        most = sections[0].rise
        for section in sections:
            most = max(most, held + section.rise, held + section.fall)
            held += section.kept
        states = (FLOAT + STATES) * trainable
        return Memory(
            weights=weights,
            gradients=FLOAT * trainable,
            optimizer=STATES * trainable,
            activations=held - head.kept,
            logits=max(head.rise, head.fall),
            temporary=max(max(section.rise, section.fall) - section.kept for section in sections[:-1]),
            peak=weights + states + most,
        )


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """What makes layers of the same shapes different: windows, kinds of attention."""
    plain = (int, float, str, bool)
    return tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and key != "layer_idx"
    )


@dataclass(frozen=True)
class Parallelism:
    """Whether the weights of a step on n devices are sharded, and the bytes/s that each can send.

    Without sharding (DDP) every device has all weights, and the gradients of trained ones are averaged once per step,
    in a ring: each device sends 2 (n - 1) / n of them. With sharding (`--shard`, FSDP2) each holds 1 / n of weights,
    gradients and moments; for every pass it gets the others' weights before the forward and again before the
    backward pass through a layer, and sends its part of the gradients: (n - 1) / n of each.
    """

    shard: bool = False
    link: float = 50e9

    def sent(self, step: Step) -> float:
        """Bytes that a device sends in a step."""
        setup, depth = step.setup, step.region.depth
        others = (setup.devices - 1) / setup.devices
        if not self.shard:
            return 2 * others * FLOAT * step.trainable
        back = 1.0 if setup.projector else 1 - min(step.region, default=0) / depth  # below it nothing goes back
        return others * setup.passes * (step.memory.weights * (1 + back) + FLOAT * step.trainable)

    def memory(self, step: Step, fake_model: FakeModel) -> float:
        """Bytes on a device at their most."""
        if not self.shard:
            return float(step.memory.peak)
        devices, depth, weights = step.setup.devices, step.region.depth, step.memory.weights
        states = weights + (FLOAT + STATES) * step.trainable
        layers = sum(p.numel() for layer in fake_model.vlm.layers for p in layer.parameters())
        share = layers / sum(p.numel() for p in fake_model.vlm.model.parameters())
        # Everything outside the decoder layers is one FSDP unit, which is whole all the time.
        whole = weights * (1 - share + share * min(UNITS, depth) / depth)
        return step.memory.peak - states + states / devices + whole * (devices - 1) / devices

    def seconds(self, step: Step, rate: float, bandwidth: float) -> float:
        """Of a step, at `rate` FLOP/s and `bandwidth` bytes/s per device: the longer of computing and sending,
        which run side by side."""
        optimizer = step.optimizer.seconds(rate, bandwidth)
        spared = optimizer * (1 - 1 / step.setup.devices) if self.shard else 0.0
        return max(step.seconds(rate, bandwidth) - spared, self.sent(step) / self.link)


def size(text: str) -> float:
    """The bytes of "24GB", "24" (also GB), "512 MB" or "80GiB".

    Raises:
        UserError: it is not a size, or it is zero.
    """
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match or not float(match[1]):
        raise UserError(f"--fit {text!r}: a size of memory was expected, such as 24GB or 80GiB")
    return float(match[1]) * _UNITS[match[2] or ""]


def fit(fake_model: FakeModel, setup: Setup, region: str, memory: float, machine: Machine) -> Step:
    """The step with the largest region that fits, and of those the fastest.

    Regions have the form of `region`, or `uniform:N` where it has no size. Micro-batches are powers of two up to the
    batch, with and without activation checkpointing.

    Raises:
        UserError: not even one layer fits; names the memory that one takes.
    """
    room = ROOM * memory
    depth = fake_model.vlm.depth
    least = {check: Counts(fake_model, replace(setup, micro_batch=1, checkpointing=check)) for check in (True, False)}
    for count in range(depth, 0, -1):
        chosen = _region(region, count, depth)
        if min(counts.step(chosen).memory.peak for counts in least.values()) <= room:
            step = fastest(fake_model, setup, chosen, memory, machine)
            assert step is not None
            return step
    smallest = min(counts.step(chosen).memory.peak for counts in least.values())
    other = "; --method lora takes less" if setup.method == "full" else ""
    raise UserError(
        f"--fit {memory / 1e9:g} GB is too small: one layer of {depth}, with a micro-batch of 1, takes "
        f"{smallest / ROOM / 1e9:.3g} GB{other}"
    )


def fastest(
    fake_model: FakeModel, setup: Setup, region: Region, memory: float, machine: Machine,
    micro_batches: Sequence[int] = (),
) -> Step | None:  # fmt: skip
    """The fastest step of a region that fits, with and without activation checkpointing; None if none fits.

    `micro_batches` to try, in ascending order; default: powers of two up to the batch.
    """
    tried = micro_batches or [2**power for power in range(setup.batch.bit_length())]
    steps = _fitting_steps(fake_model, setup, region, ROOM * memory, tried)
    return min(steps, key=lambda step: step.seconds(*machine.reached), default=None)


def _fitting_steps(
    fake_model: FakeModel, setup: Setup, region: Region, room: float, micro_batches: Sequence[int]
) -> Iterator[Step]:
    for checkpointing in (False, True):
        for micro_batch in micro_batches:
            tried = replace(setup, micro_batch=micro_batch, checkpointing=checkpointing)
            step = Counts(fake_model, tried).step(region)
            if step.memory.peak > room:
                break
            yield step


def _region(form: str, count: int, depth: int) -> Region:
    kind = form.partition(":")[0]
    return Region.parse(f"{kind if kind in KINDS else KINDS[0]}:{count}", depth)
