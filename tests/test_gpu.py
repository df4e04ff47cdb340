"""What only a GPU can show: `pytest -m gpu` there; skipped elsewhere.

STRIATE_TEST_GPU=cpu runs them on a CPU, to see that they run.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import together
from pico import pico_llava
from training import OPTIONS as PLAIN
from training import changed, saved_as, weights

from striate.runs.run import Run
from striate.runs.training import tune
from striate.train.loop import Loop

DEVICE = os.environ.get("STRIATE_TEST_GPU", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]

# No data workers: forking next to CUDA's threads warns.
OPTIONS = replace(PLAIN, workers=0)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not in TF32, and Adam's epsilon where rounding of a gradient near 0 moves nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-4))


def losses(model: Path, data: Path, out: Path, **changes: Any) -> list[float]:
    """Of a short tuning."""
    run = tune(model, data=data, out=out, region="1,3", method="full", options=replace(OPTIONS, **changes))
    return [entry["loss"] for entry in run.history()]


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_gpu_learns_what_a_cpu_learns(model: Path, data: Path, tmp_path: Path, packing: str) -> None:
    cpu = losses(model, data, tmp_path / "cpu", device="cpu", packing=packing)
    gpu = losses(model, data, tmp_path / "gpu", device=DEVICE, packing=packing)
    assert gpu == pytest.approx(cpu, rel=1e-3)


def test_the_same_bytes_twice(model: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        losses(model, data, tmp_path / name, device=DEVICE, deterministic=True)
    assert changed(weights(tmp_path / "a"), weights(tmp_path / "b")) == set()


def test_resumed_on_a_gpu(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"device": DEVICE, "deterministic": True, "steps": 5, "save_steps": 2}
    losses(model, data, tmp_path / "whole", **options)
    run = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.runs.training._end", lambda *_: (_ for _ in ()).throw(ValueError("power cut")))
        with pytest.raises(ValueError, match="power cut"):
            losses(model, data, run, **options)
    tune(model, data=data, out=run, region="1,3", method="full", resume=True, options=replace(OPTIONS, **options))
    assert changed(weights(tmp_path / "whole"), weights(run)) == set()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["llama", "phi"])  # phi: the decoder ends in nn.LayerNorm
def test_half_precision_trains(data: Path, tmp_path: Path, text: str, dtype: torch.dtype, method: Any) -> None:
    source = saved_as(pico_llava(tmp_path / "float32", model_type=text), tmp_path / "half", dtype)
    options = replace(OPTIONS, device=DEVICE, dtype="bfloat16", steps=6)
    run = tune(source, data=data, out=tmp_path / "run", region="1,3", method=method, options=options)
    found = [entry["loss"] for entry in run.history()]
    assert found[-1] < found[0]


@pytest.mark.skipif(not ON_GPU, reason="a CPU does not wait")
def test_few_waits(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the passes of a step, as PyTorch itself reports them: placeholders are checked by transformers, nothing else.
    one = Loop._forward_backward_one

    def watched(*arguments: Any, **settings: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return one(*arguments, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_forward_backward_one", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses(model, data, tmp_path / "run", device=DEVICE, dtype="bfloat16")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    assert not [wait for wait in waits if "/striate/" in wait]


@pytest.mark.parametrize("changes", [{"optimizer": "adamw_8bit"}, {"frozen_layers": "nf4"}])
def test_eight_and_four_bits(model: Path, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    found = losses(model, data, tmp_path / "run", device=DEVICE, steps=6, **changes)
    assert found[-1] < found[0]


def sharded(model: Path, data: Path, out: Path) -> None:
    """One process of a sharded training."""
    losses(model, data, out, device=DEVICE, shard=True, batch=4, micro_batch=1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_over_two_gpus(model: Path, data: Path, tmp_path: Path) -> None:
    alone = losses(model, data, tmp_path / "one", device=DEVICE, batch=4, micro_batch=1)
    assert together(2, sharded, model, data, tmp_path / "two") == [0, 0]
    run = Run.open(tmp_path / "two")
    assert [entry["loss"] for entry in run.history()] == pytest.approx(alone, rel=1e-3)
