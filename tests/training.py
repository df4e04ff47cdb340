"""Records to train on, a short training, and what it changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import striate
from striate.data import Batch, Examples, collate, read
from striate.runs import training
from striate.runs.run import Run
from striate.runs.stage import RunLog
from striate.train import TrainOptions


def write_data(folder: Path, *, records: int = 8) -> Path:
    """A LLaVA-style file with random images."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(records):
        name = f"{index}.png"
        Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / name)
        answer = ["a red cat", "blue dog in the car", "yes", "no it sees a green cat"][index % 4]
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": name, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return path


OPTIONS = TrainOptions(
    batch=4, micro_batch=2, steps=3, learning_rate=1e-2, projector_learning_rate=1e-2, dtype="float32", device="cpu"
)


def tune(model: Path, data: Path, out: Path, options: TrainOptions, **settings: Any) -> Run:
    return training.tune(model, data=data, out=out, region="1,3", options=options, **{"method": "full", **settings})


@contextmanager
def power_cut(after: int) -> Iterator[None]:
    """The training within ends after this step, as if the power were cut."""

    class Cut(RunLog):
        def step(self, entry: dict[str, Any]) -> None:
            super().step(entry)
            if entry["step"] == after:
                raise ValueError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.runs.training.RunLog", Cut)
        with pytest.raises(ValueError, match="power cut"):
            yield


def batch_of(vlm: striate.Vlm, data: Path) -> Batch:
    examples = Examples(read(data).records, vlm.processor)
    return collate([examples[index] for index in range(4)], pad_id=vlm.tokenizer.pad_token_id)


def saved_as(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The same model with its weights in another dtype."""
    vlm = striate.load(model, device="cpu")
    vlm.model.to(dtype).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return striate.load(path).model.state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}
