"""Find, train and prune the visual region of any Hugging Face vision-language model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from striate.data import Record, Records, read
    from striate.errors import UserError
    from striate.evaluation import Results, ask, evaluate
    from striate.exploration import explore
    from striate.prune import Pruned, bypass, drop_layers
    from striate.region import Region
    from striate.routing import load, route
    from striate.scores import Scores, revert, score
    from striate.studies.report import report
    from striate.train import Trained, TrainOptions, align, lora_config, tune
    from striate.train.collator import Collator
    from striate.vlm import Selection, Vlm, select

__version__ = "0.2.0"

# Public names and where they live; imported when first used, so that `import striate` costs nothing.
_HOMES = {
    "Collator": "striate.train.collator",
    "Pruned": "striate.prune",
    "Record": "striate.data",
    "Records": "striate.data",
    "Region": "striate.region",
    "Results": "striate.evaluation",
    "Scores": "striate.scores",
    "Selection": "striate.vlm",
    "TrainOptions": "striate.train",
    "Trained": "striate.train",
    "UserError": "striate.errors",
    "Vlm": "striate.vlm",
    "align": "striate.train",
    "ask": "striate.evaluation",
    "bypass": "striate.prune",
    "drop_layers": "striate.prune",
    "evaluate": "striate.evaluation",
    "explore": "striate.exploration",
    "load": "striate.routing",
    "lora_config": "striate.train",
    "read": "striate.data",
    "report": "striate.studies.report",
    "revert": "striate.scores",
    "route": "striate.routing",
    "score": "striate.scores",
    "select": "striate.vlm",
    "tune": "striate.train",
}

__all__ = [
    "Collator",
    "Pruned",
    "Record",
    "Records",
    "Region",
    "Results",
    "Scores",
    "Selection",
    "TrainOptions",
    "Trained",
    "UserError",
    "Vlm",
    "align",
    "ask",
    "bypass",
    "drop_layers",
    "evaluate",
    "explore",
    "load",
    "lora_config",
    "read",
    "report",
    "revert",
    "route",
    "score",
    "select",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'striate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
