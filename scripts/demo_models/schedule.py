"""What the three trainings share: the learning rate's schedule and how a model is saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from transformers import PreTrainedModel


def cosine(step: int, steps: int, *, warmup: int = 50) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def save_rounded(model: PreTrainedModel, folder: Path) -> None:
    """Save a copy in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
