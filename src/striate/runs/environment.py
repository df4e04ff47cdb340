"""What a run is made with: the versions of packages, and the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("striate", "torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine of this process: {"platform", "cpu", "cores", "memory_gb" (10^9 bytes), "gpu"}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = getattr(os, "sysconf_names", {})  # none on Windows
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores,
        "memory_gb": pages and round(pages / 1e9, 1),
        "gpu": _gpu(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        import torch  # slow to import
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    return name if count == 1 else f"{count} x {name}"
