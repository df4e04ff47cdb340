"""Numbers that are none: the run stops before they reach the weights, and says whose record they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import pico_llava
from plain import train_plainly
from safetensors.torch import load_file
from test_train import write_data

import striate
from striate.train import TrainOptions, last_saved, tune

OPTIONS = TrainOptions(batch=4, micro_batch=2, steps=6, save_steps=1, learning_rate=1e-2, dtype="float32", device="cpu")


def broken(path: Path, where: str) -> Path:
    """A pico model with one value in it that is no number, or infinite."""
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


@pytest.mark.parametrize("where", ["embedding", "projector", "head"])
def test_numbers_that_are_none(where: str, tmp_path: Path, bad_day: Callable[..., None]) -> None:
    data, model = write_data(tmp_path), broken(tmp_path, where)
    with pytest.raises(striate.UserError, match=r"are not finite; records: \d") as stopped:
        tune(model, data=data, out=tmp_path / "run", method="full", options=OPTIONS)
    state = last_saved(tmp_path / "run" / "state")
    kept = {} if state is None else load_file(Path(state) / "trained.safetensors")
    sound = all(bool(weight.isfinite().all()) for name, weight in kept.items() if where not in name)
    train_plainly(model, data, tmp_path / "plain", max_steps=6, save_steps=6)
    plain = load_file(tmp_path / "plain" / "checkpoint" / "model.safetensors")
    spoilt = sum(not bool(weight.isfinite().all()) for weight in plain.values())
    said = f"goes on; {spoilt} of {len(plain)} weights end as no numbers"
    bad_day("losses and gradients that are not finite", 1, int(sound), "0; names the records", said)
    assert sound
    named = str(stopped.value).partition("records: ")[2].partition(" (")[0].split(", ")
    rows = {row["id"]: row for row in json.loads(data.read_text())}
    assert all("dog" in str(rows[name]) or where != "embedding" for name in named)
