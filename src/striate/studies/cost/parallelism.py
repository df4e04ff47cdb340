"""A step on several devices: what each of them holds, what it sends to the others, and how long that takes at least."""

from __future__ import annotations

from dataclasses import dataclass

from striate.studies.cost.fake_model import FakeModel
from striate.studies.cost.step import FLOAT, STATES, Step

UNITS = 2
"""Decoder layers whose weights are whole on a device at a time: one that runs, and the next one on its way."""


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
