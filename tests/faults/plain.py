"""What a user without striate would run: transformers' Trainer on the whole LVLM, for the last column of the table."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from guard import HangError, in_time
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def train_plainly(model: Path, data: Path, out: Path, **arguments: Any) -> None:
    """Begin a training, or resume from the last saved state, following the documentation; the model goes to `out`."""
    processor = AutoProcessor.from_pretrained(model)
    trainer = Trainer(
        AutoModelForImageTextToText.from_pretrained(model),
        TrainingArguments(
            str(out / "state"), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
            **{"save_total_limit": 2, **arguments},
        ),
        train_dataset=json.loads(data.read_text()),
        data_collator=partial(collated, processor, data.parent),
    )  # fmt: skip
    last = get_last_checkpoint(str(out / "state")) if (out / "state").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out / "checkpoint"))


def ended_by(processor: Any, images: Path, rows: list[Any]) -> str:
    """How many records, or their images, would each have ended such a training."""
    ended = 0
    for row in rows:
        try:
            with in_time(), warnings.catch_warnings(action="ignore"):
                collated(processor, images, [row])
        except (Exception, HangError):
            ended += 1
    return f"an error at the first of {ended:,} ends it"


def collated(processor: Any, images: Path, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as a user writes it, for records as they should be."""
    opened = [_opened(images / row["image"]) for row in rows]
    texts = ["\n".join(turn["value"].replace("\n", " ") for turn in row["conversations"]) for row in rows]
    batch = processor(images=opened, text=texts, padding=True, return_tensors="pt")
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return inputs | {"labels": inputs["input_ids"]}


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
