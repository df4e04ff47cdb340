"""NaN and Inf: the run stops before they reach the weights, and names the records that they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard import watched
from pico import pico_llava
from plain import train_plainly
from safetensors.torch import load_file
from training import write_data

import striate
from striate import vlm
from striate.runs.training import tune
from striate.train import TrainOptions, last_saved

OPTIONS = TrainOptions(batch=4, micro_batch=2, steps=6, save_steps=1, learning_rate=1e-2, dtype="float32", device="cpu")


def broken(path: Path, where: str) -> Path:
    """A pico model with one NaN or infinite value in it."""
    vlm = striate.load(pico_llava(path / "sound"), device="cpu")
    with torch.no_grad():
        if where == "embedding":  # every record with a dog in it
            vlm.model.get_input_embeddings().weight[vlm.tokenizer.convert_tokens_to_ids("dog")] = math.nan
        elif where == "projector":
            vlm.model.model.multi_modal_projector.linear_1.bias[0] = math.inf
        else:
            vlm.model.lm_head.weight[vlm.tokenizer.convert_tokens_to_ids("yes")] = -math.inf
    vlm.model.save_pretrained(path / "model")
    vlm.processor.save_pretrained(path / "model")
    return path / "model"


def not_finite(model: torch.nn.Module) -> set[str]:
    """The names of its weights with a NaN or Inf."""
    return {name for name, weight in model.named_parameters() if not weight.isfinite().all()}


def test_memory_that_was_taken_before_hides_nothing() -> None:
    filled = bytearray(b"x" * 300_000_000)
    del filled
    with watched() as watch:
        filled = bytearray(b"x" * 100_000_000)
        del filled
        assert 100_000_000 <= watch.grown < 300_000_000


@pytest.mark.parametrize("where", ["embedding", "projector", "head"])
def test_nan_and_inf(
    where: str, tmp_path: Path, note_fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_data(tmp_path), broken(tmp_path, where)
    trained: list[striate.Vlm] = []

    def load(*args: Any, **settings: Any) -> striate.Vlm:
        trained.append(vlm.load(*args, **settings))
        return trained[-1]

    monkeypatch.setattr("striate.runs.training.load", load)
    with pytest.raises(striate.UserError, match=r"non-finite loss or gradients in step \d; records: \d") as stopped:
        tune(model, data=data, out=tmp_path / "run", method="full", options=OPTIONS)
    before, after = striate.load(model, device="cpu").model, trained[0].model
    sound = not_finite(after) == not_finite(before) != set()
    state = last_saved(tmp_path / "run" / "state")
    saved = {} if state is None else load_file(Path(state) / "trained.safetensors")
    sound &= {name for name, weight in saved.items() if not weight.isfinite().all()} <= not_finite(before)
    train_plainly(model, data, tmp_path / "plain", max_steps=6, save_steps=6)
    plain = load_file(tmp_path / "plain" / "checkpoint" / "model.safetensors")
    corrupted = sum(not bool(weight.isfinite().all()) for weight in plain.values())
    said = f"goes on; {corrupted} of {len(plain)} weights end as NaN"
    note_fault("non-finite losses and gradients", 1, int(sound), "0; names the records", said)
    assert sound
    named = str(stopped.value).partition("records: ")[2].partition(" (")[0].split(", ")
    rows = {row["id"]: row for row in json.loads(data.read_text())}
    assert all("dog" in str(rows[name]) or where != "embedding" for name in named)
