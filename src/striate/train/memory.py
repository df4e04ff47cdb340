"""Peak memory of a piece of work, and whether full tuning of a region fits."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import psutil
import torch

# float32 weight and gradient, and the two moments of Adam
BYTES_A_TRAINED_PARAMETER = 16
# of the free memory; the rest is for activations, which depend on the data
SHARE_FOR_STATES = 0.6


class PeakMemory:
    """The most memory held since `start`, in 10^9 bytes.

    On a GPU: what PyTorch allocated on it. On a CPU: the resident memory of this process, interpreter and libraries
    included; Linux can start that peak anew, elsewhere it counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # give freed memory back first, else earlier work counts as ours
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        """The peak until now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        status = Path("/proc/self/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(peak.split()[1]) * 1024 / 1e9
        import resource  # not on Windows

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def full_tuning_fits(trainable: int, device: torch.device) -> bool:
    """Whether weights, gradients and Adam moments of `trainable` parameters in float32 take at most 60 % of the free
    memory of the device, the model being loaded already."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return trainable * BYTES_A_TRAINED_PARAMETER <= SHARE_FOR_STATES * free
