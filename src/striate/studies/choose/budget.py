"""What a training run may take: memory of a device, and time."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from striate.errors import UserError
from striate.studies.cost import Machine, gpu_of, this_machine
from striate.studies.cost.fake_model import Dtype
from striate.studies.cost.fit import size
from striate.train.memory import free_bytes
from striate.vlm.devices import default_device, has_native_bfloat16

_TIME = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|min|h|d)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


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
