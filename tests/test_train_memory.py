"""What training keeps in memory: the cut in the graph, layers recomputed, the way out when memory is full."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import DEPTH
from training import OPTIONS, batch_of, changed, tune, weights

import striate
from striate.data import Batch
from striate.train import TrainOptions
from striate.train.fit import in_bfloat16
from striate.train.loss import NONE, answer_nll
from striate.train.memory import Activations, Checkpointing, activations
from striate.train.saved import REST
from striate.train.watch import Wait
from striate.vlm import Vlm, select
from striate.vlm.devices import has_native_bfloat16


@pytest.fixture
def vlm(model: Path) -> Vlm:
    return striate.load(model, device="cpu")


def measure(vlm: Vlm, batch: Batch, region: str, **parts: Any) -> Activations:
    select(vlm, striate.Region.parse(region, vlm.depth), **parts)
    return activations(vlm, lambda: answer_nll(vlm, vlm.model, batch))


def test_what_was_tried_is_freed(model: Path, data: Path) -> None:
    vlm = striate.load(model, device="cpu")
    alive = weakref.ref(vlm.layers[0].mlp.up_proj.weight)
    measure(vlm, batch_of(vlm, data), "all")
    del vlm
    gc.collect()
    assert alive() is None


def test_nothing_is_kept_below_the_first_layer_that_trains(vlm: Vlm, data: Path) -> None:
    found = measure(vlm, batch_of(vlm, data), "2,3", projector=False)
    assert found.layers[:2] == (0, 0)
    assert min(found.layers[2:]) > 0


def test_frozen_layers_keep_no_inputs_of_weight_gradients(vlm: Vlm, data: Path) -> None:
    # By hand, for each token, in float32: a layer that trains also keeps what its linear modules read, which is 32 wide
    # for attention, 32 and 64 for the MLP (what attention gives is kept by attention itself), and what its two norms
    # multiply with their weights, 32 each.
    batch = batch_of(vlm, data)
    frozen, trained = measure(vlm, batch, "none"), measure(vlm, batch, "all")
    assert min(frozen.layers) > 0  # the projector trains: gradients pass through all of them
    more = batch.labels.numel() * (32 + 32 + 64 + 32 + 32) * 4
    assert [after - before for after, before in zip(trained.layers, frozen.layers, strict=True)] == [more] * DEPTH


def test_a_recomputed_layer_keeps_its_input_only(vlm: Vlm, data: Path) -> None:
    batch = batch_of(vlm, data)
    vlm.model.train()
    select(vlm, striate.Region.parse("all", vlm.depth))
    before = activations(vlm, lambda: answer_nll(vlm, vlm.model, batch))
    inputs = batch.labels.numel() * 32 * 4
    checkpointing = Checkpointing(vlm, before, free=0.0, inputs=inputs, fixed=True)
    checkpointing.choose("all")
    assert checkpointing.layers == tuple(range(DEPTH))
    after = activations(vlm, lambda: answer_nll(vlm, vlm.model, batch))
    assert after.layers[1:] == (inputs,) * (DEPTH - 1)


def test_as_few_layers_are_recomputed_as_memory_asks_for(vlm: Vlm) -> None:
    found = Activations((0, 50, 90, 50), rest=10)
    # Recomputed, layer 2 needs 10 + 50 + 90 when its turn comes; layers 1 and 2 need 10 + 10 + 90.
    for free, layers in ((200, ()), (199, (2,)), (150, (2,)), (149, (1, 2)), (110, (1, 2)), (109, (1, 2, 3))):
        checkpointing = Checkpointing(vlm, found, free=free, inputs=10, fixed=False)
        checkpointing.choose("auto")
        assert checkpointing.needed(0) == 200
        assert checkpointing.layers == layers, free


def test_memory_that_does_not_suffice_costs_nothing_but_time(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, batch=4, micro_batch=1)
    whole = tune(model, data, tmp_path / "whole", options, method="lora", dropout=0.1)
    calls = 0

    def full(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (8, 12):  # in the middle of a step
            raise torch.OutOfMemoryError("no room for 1 GB")

    with pytest.MonkeyPatch.context() as patch:
        real = striate.runs.training.load

        def small(*args: Any, **settings: Any) -> Vlm:
            vlm = real(*args, **settings)
            vlm.layers[2].register_forward_pre_hook(full)
            return vlm

        patch.setattr("striate.runs.training.load", small)
        run = tune(model, data, tmp_path / "run", options, method="lora", dropout=0.1)
    assert changed(weights(whole.path), weights(run.path)) == set()
    assert [entry["loss"] for entry in run.history()] == [entry["loss"] for entry in whole.history()]
    assert run.info["training"]["samples"] == whole.info["training"]["samples"]
    assert len(run.info["training"]["recomputed_layers"]) == 3  # half of four, and half of two


def test_full_memory_that_nothing_helps_is_one_line(model: Path, data: Path, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for 1 GB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.train.loop.Loop._forward_backward_one", full)
        with pytest.raises(striate.UserError, match=r"out of memory \(no room for 1 GB\): set --micro-batch below 2"):
            tune(model, data, tmp_path / "run", replace(OPTIONS, checkpointing="none"))


def test_fast_paths_train_the_same_for_twenty_steps(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Packing and chunks of logits on and off; layers recomputed or not.
    monkeypatch.setattr("striate.train.loss.CHUNK_BYTES", 4 * 128 * 3)  # three rows of logits at a time
    options = replace(OPTIONS, steps=20, learning_rate=1e-3, projector_learning_rate=1e-3)
    fast = tune(model, data, tmp_path / "fast", options)
    assert fast.info["training"]["packing"] is True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("striate.train.fit"), "verify_fast_paths", lambda *_, **__: (NONE, ()))
        patch.setattr("striate.train.loss._ChunkedLosses", None)
        plain = tune(model, data, tmp_path / "plain", replace(options, packing="off", checkpointing="all"))
    assert plain.info["training"]["packing"] is False
    losses = [[entry["loss"] for entry in run.history()] for run in (fast, plain)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_eager_attention_packs_too(model: Path, data: Path, tmp_path: Path) -> None:
    runs = [tune(model, data, tmp_path / attn, replace(OPTIONS, attn=attn)) for attn in ("eager", "sdpa")]
    assert all(run.info["training"]["packing"] for run in runs)
    losses = [[entry["loss"] for entry in run.history()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_products_are_in_what_the_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for units, known in (({"avx2": True}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert has_native_bfloat16(cpu) is known
        assert in_bfloat16(TrainOptions().dtype, cpu) is known
        assert in_bfloat16("bfloat16", cpu)
        assert not in_bfloat16("float32", cpu)


def test_waiting_counts_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 14.0, 20.0])
    monkeypatch.setattr("striate.train.watch.time.monotonic", lambda: next(times))
    clock = Wait()
    assert clock.share == 0
    clock.note(0.0)  # until 10: the workers start
    clock.note(13.0)  # until 14
    clock.note(19.0)  # until 20
    assert clock.share == pytest.approx(2 / 10)


def test_bitsandbytes_optimizes_on_request(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, optimizer="adamw_8bit", save_steps=1, steps=2)
    monkeypatch.setattr("striate.runs.training.shutil.rmtree", lambda *_, **__: None)  # leave the state where it is
    run = tune(model, data, tmp_path / "run", options)
    state = torch.load(run.state / "step-2" / REST, weights_only=True)["optimizer"]
    assert "state1" in str(state)  # bitsandbytes' own name for a moment
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(striate.UserError, match=r"adamw_8bit needs .*pip install bitsandbytes"):
            tune(model, data, tmp_path / "none", options)
