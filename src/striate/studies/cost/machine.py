"""The FLOP rate and memory bandwidth of machines: GPUs from data sheets, this machine by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from striate.errors import UserError
from striate.vlm.devices import default_device

EFFICIENCY = 0.6
"""Share of a GPU's peak rates that large operations reach in practice. Chowdhery et al. 2022 (PaLM, arXiv 2204.02311)
report 0.46 to 0.58 for whole steps; single GEMMs and copies reach 0.6 to 0.9."""


@dataclass(frozen=True)
class Machine:
    """`rate` in FLOP/s, `bandwidth` in bytes/s; `efficiency` is the share of both that is reached.

    `memory` in bytes; 0 where it is not known.
    """

    name: str
    rate: float
    bandwidth: float
    memory: float = 0.0
    efficiency: float = 1.0

    @property
    def reached(self) -> tuple[float, float]:
        """FLOP/s and bytes/s."""
        return self.rate * self.efficiency, self.bandwidth * self.efficiency


# NVIDIA's and AMD's data sheets: dense bfloat16 matmuls that accumulate in float32, TFLOP/s (half of
# the rate "with sparsity"); memory bandwidth, GB/s; memory, GB.
_SHEETS = {
    "a10": (125, 600, 24),  # A10 data sheet
    "a100-40gb": (312, 1555, 40),  # A100 data sheet, PCIe and SXM
    "a100-80gb": (312, 2039, 80),  # A100 data sheet, SXM; PCIe has 1935 GB/s
    "a6000": (154.8, 768, 48),  # RTX A6000: GA102 white paper, appendix
    "b200": (2250, 8000, 180),  # DGX B200 data sheet, an eighth of it
    "h100": (989.4, 3350, 80),  # H100 data sheet, SXM
    "h100-pcie": (756, 2000, 80),  # H100 data sheet, PCIe
    "h200": (989.4, 4800, 141),  # H200 data sheet
    "l4": (121, 300, 24),  # L4 data sheet
    "l40s": (362, 864, 48),  # L40S data sheet
    "mi300x": (1307.4, 5300, 192),  # Instinct MI300X data sheet
    "rtx-3090": (71, 936, 24),  # GA102 white paper, appendix
    "rtx-4090": (165.2, 1008, 24),  # Ada white paper, appendix
}
GPUS = {
    name: Machine(name, tflops * 1e12, gb * 1e9, size * 1e9, EFFICIENCY) for name, (tflops, gb, size) in _SHEETS.items()
}


def gpu_of(name: str) -> Machine:
    """A GPU by its name in the table.

    Raises:
        UserError: there is no such GPU; lists the known ones.
    """
    if name.lower() not in GPUS:
        raise UserError(f"no GPU {name!r} in the table; known are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def this_machine(dtype: str) -> Machine:
    """Measure a square matmul in `dtype` and the scaling of an array; takes about a second."""
    device = default_device()
    side, floats, repeats = measured_sizes(device)
    kind = getattr(torch, dtype)
    with torch.inference_mode():
        left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        array = torch.ones(floats, device=device)
        result = torch.empty_like(array)
        matmul = _seconds(lambda: torch.mm(left, right), device, repeats)
        scaled = _seconds(lambda: torch.mul(array, 2.0, out=result), device, repeats)
    return Machine(f"this machine ({device.type})", 2 * side**3 / matmul, 2 * array.nbytes / scaled)


def measured_sizes(device: torch.device) -> tuple[int, int, int]:
    """The side of the matrices, the length of the float32 array (larger than the caches), and runs between two waits.

    An accelerator does 1024 x 1024 in less time than its start takes, and may hold 60 MB in its cache.
    """
    return (1024, 2**23, 1) if device.type == "cpu" else (8192, 2**28, 10)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int, *, times: int = 7) -> float:
    """The median of a few tries, the first one left out."""
    taken = []
    for _ in range(times + 1):
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        taken.append((time.perf_counter() - began) / repeats)
    return median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
