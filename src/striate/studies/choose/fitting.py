"""A budget of memory and time, and what fits into it: method, modules, micro-batch, number of steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from striate.errors import UserError
from striate.region import Region
from striate.studies.cost import Counts, FakeModel, Machine, Setup, Step, fake_model, gpu_of, this_machine
from striate.studies.cost.fake_model import Dtype
from striate.studies.cost.section import Trained
from striate.studies.cost.step import ROOM, fastest, size
from striate.train.memory import free_bytes
from striate.vlm import Vlm
from striate.vlm.devices import default_device, has_native_bfloat16

# Methods and modules, the first that fits: whole layers, as the paper trains them; then fewer trained weights, whose
# optimizer states take most of the memory; then fewer layers.
WAYS: tuple[tuple[Trained, str], ...] = (("full", "all"), ("full", "gate_up"), ("lora", "all"))
SHARES = ("25%", "12.5%", "1")
MICRO_BATCHES = (1, 4, 16)


_TIME = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|min|h|d)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Fit:
    """The training step that fits; `steps` of it, and whether that is less than an epoch because of the time.

    `refused` says, for each way of training that was preferred and did not fit, the memory it would take in bytes.
    """

    fake_model: FakeModel
    step: Step
    steps: int
    shortened: bool
    refused: tuple[tuple[str, float], ...] = ()

    @property
    def region(self) -> Region:
        """The layers that train."""
        return self.step.region

    def of(self, region: Region, route: str | None = None) -> Fit:
        """The same for other layers, as many of them, and with a route of image tokens."""
        return replace(self, step=Counts(self.fake_model, replace(self.step.setup, route=route)).step(region))


def fit(vlm: Vlm, setup: Setup, budget: Budget, num_records: int) -> Fit:
    """The first way of training (`WAYS`, for a quarter of the layers, then fewer) whose step fits into the memory.

    Layers are `uniform`. With a time in the budget, as many steps as it allows, at most an epoch.

    Raises:
        UserError: nothing fits; names the least memory or time.
    """
    fake = fake_model(vlm.source, dtype=budget.dtype)
    refused: list[tuple[str, float]] = []
    for share in SHARES:
        region = Region.parse(f"uniform:{share}", vlm.depth)
        for method, modules in WAYS:
            tried = replace(setup, method=method, modules=modules)
            if step := fastest(fake, tried, region, budget.memory, budget.machine, MICRO_BATCHES):
                steps, shortened = _in_time(step, budget, num_records)
                return Fit(fake, step, steps, shortened, tuple(refused))
            least = Counts(fake, replace(tried, micro_batch=1, checkpointing=True)).step(region)
            refused.append((f"{method}, {modules}, {len(region)} layers", least.memory.peak / ROOM))
    way, memory = min(refused, key=lambda one: one[1])
    raise UserError(f"--budget {budget.memory / 1e9:.3g}GB: the least is {memory / 1e9:.3g} GB ({way})")


def _in_time(step: Step, budget: Budget, num_records: int) -> tuple[int, bool]:
    """The steps of an epoch, or as many as the time allows; whether the time allows less than an epoch."""
    epoch = math.ceil(num_records / step.setup.batch)
    if budget.seconds is None:
        return epoch, False
    seconds = step.seconds(*budget.machine.reached)
    steps = int(budget.seconds // seconds)
    if not steps:
        raise UserError(
            f"--budget {budget.seconds:g}s is less than the {seconds:.3g} s of one step of {step.setup.batch} records "
            f"on {budget.machine.name}"
        )
    return min(steps, epoch), steps < epoch


@dataclass(frozen=True)
class Budget:
    """The most memory, in bytes, and the most time, in seconds, of a run on a machine whose matmuls are in `dtype`."""

    memory: float
    seconds: float | None
    machine: Machine
    dtype: Dtype

    @classmethod
    def parse(cls, text: str | None, *, gpu: str | None = None, device: str | None = None) -> Budget:
        """Parse 24GB, 2h, or both (24GB,2h). Without a memory: that of the GPU, else what is free on this machine.

        Raises:
            UserError: it is neither, one is given twice, or there is no such GPU.
        """
        found: dict[str, float] = {}
        for part in (text or "").split(",") if text is not None else ():
            kind, value = _read(part)
            if kind in found:
                raise UserError(f"--budget {text!r} has two values of {kind}: give one memory (24GB), one time (2h)")
            found[kind] = value
        here = torch.device(device) if device else default_device()
        dtype: Dtype = "bfloat16" if gpu or has_native_bfloat16(here) else "float32"
        machine = gpu_of(gpu) if gpu else this_machine(dtype)
        memory = found.get("memory") or machine.memory or float(free_bytes(here))
        return cls(memory, found.get("time"), machine, dtype)


def _read(part: str) -> tuple[str, float]:
    if (match := _TIME.fullmatch(part)) and float(match[1]):
        return "time", float(match[1]) * _SECONDS[match[2]]
    try:
        return "memory", size(part)
    except UserError:
        raise UserError(
            f"--budget {part.strip()!r}: expected a memory (24GB), a time (90min, 2h) or both (24GB,2h)"
        ) from None
