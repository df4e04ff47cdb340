"""Options that change how the frozen layers are held."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_llava
from training import OPTIONS, tune, weights

import striate
from striate.train import TrainOptions
from striate.train.precision import Before, quantize_frozen_layers, restore


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and 128 weights: whole blocks of 64 that share a scale."""
    return pico_llava(tmp_path_factory.mktemp("pico") / "wide", hidden_size=64, intermediate_size=128, head_dim=16)


def test_layers_in_four_bits_multiply_as_their_weights_read_back(wide: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes").functional
    vlm = striate.load(wide, device="cpu")
    region = striate.Region.parse("1", vlm.depth)
    before, saved = (
        {name: p.detach().clone() for name, p in vlm.model.named_parameters()},
        Before.of(vlm.model, bf16=False),
    )
    outside = [name for name in vlm.linear_modules(striate.Region.parse("all", vlm.depth)) if ".layers.1." not in name]
    saved.linear.update(quantize_frozen_layers(vlm, region, torch.float32, torch.device("cpu")))
    for name in outside:
        held: Any = vlm.model.get_submodule(name)
        # Half the widest gap between NF4's levels, of the largest weight, and a little for scales in 8 bits.
        original = before[f"{name}.weight"]
        assert held.weight.numel() * held.weight.element_size() * 2 == original.numel()
        read = functional.dequantize_4bit(held.weight.data, held.weight.quant_state).float()
        assert 0 < float((read - original).abs().max()) < 0.17 * float(original.abs().max())
        states = torch.randn(3, held.in_features)
        torch.testing.assert_close(held(states), states @ read.T, rtol=1e-4, atol=1e-5)
    restore(vlm.model, saved)
    after = dict(vlm.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_region_tunes_beside_layers_in_four_bits(wide: Path, data: Path, tmp_path: Path, method: Any) -> None:
    pytest.importorskip("bitsandbytes")
    options = replace(OPTIONS, steps=3, learning_rate=1e-3, frozen_layers="nf4")
    run = tune(wide, data, tmp_path / "run", options, method=method)
    before, after = weights(wide), weights(run.path)
    assert after.keys() == before.keys()
    frozen = [name for name in before if ".layers." in name and ".layers.1." not in name and ".layers.3." not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not all(torch.equal(before[name], after[name]) for name in before if ".layers.1." in name)
    plain = tune(wide, data, tmp_path / "plain", replace(options, frozen_layers="as_saved"), method=method)
    pairs = zip(run.history(), plain.history(), strict=True)
    assert all(0 < abs(one["loss"] - other["loss"]) < 0.1 for one, other in pairs)


def test_four_bits_need_their_package(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(striate.UserError, match=r"--frozen-layers nf4 needs .*pip install bitsandbytes"):
        tune(model, data, tmp_path / "run", replace(TrainOptions(), frozen_layers="nf4"))
