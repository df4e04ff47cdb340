"""One training step of a region: trained parameters, FLOPs and memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from striate.region import Region
from striate.routing import resolve
from striate.studies.cost.fake_model import FakeModel, calls
from striate.studies.cost.section import Passed, Section, Trained, head_section, layer_section, vision_section
from striate.studies.cost.tally import Work, total
from striate.vlm import linear_in, select
from striate.vlm.modules import choose_names

STATES = 8  # bytes of AdamW's two moments of a trained parameter, in float32
FLOAT = 4  # bytes of a trained weight, and of its gradient
# Bytes that a trained parameter moves through memory. An optimizer step reads weight, gradient and two moments, and
# writes all but the gradient (28); clipping reads the gradient twice and writes it once (12). Every forward pass of a
# step but the first adds to the gradient (12).
STEP_TRAFFIC, ADDING_TRAFFIC = 40, 12


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
