"""Train the visual region of any Hugging Face vision-language model, and compare it honestly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from striate.errors import UserError
    from striate.region import Region
    from striate.run import Run
    from striate.train import TrainOptions, align, lora_config, tune
    from striate.vlm import Plan, Vlm, load

__version__ = "0.1.0"

# Public names and where they live; imported when first used, so that `import striate` costs nothing. The other verbs
# are functions of the modules of the same name (`from striate.report import report`).
_HOMES = {
    "Plan": "striate.vlm",
    "Region": "striate.region",
    "Run": "striate.run",
    "TrainOptions": "striate.train",
    "UserError": "striate.errors",
    "Vlm": "striate.vlm",
    "align": "striate.train",
    "load": "striate.vlm",
    "lora_config": "striate.train",
    "tune": "striate.train",
}

__all__ = ["Plan", "Region", "Run", "TrainOptions", "UserError", "Vlm", "align", "load", "lora_config", "tune"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'striate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
