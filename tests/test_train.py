"""Training: what trains, what it costs, and equalities: adapter and merged, resumed and uninterrupted."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from pico import pico_llava, pico_more
from training import OPTIONS, batch_of, changed, power_cut, saved_as, tune, weights, write_data

import striate
from striate.data import read
from striate.roundtrip import save
from striate.runs import training
from striate.runs.run import Run
from striate.runs.stage import RunLog
from striate.train import TrainOptions, answer_nll, last_saved, loop, num_samples, saved
from striate.train.adapter import adapt
from striate.train.records import length_grouped, sample_records
from striate.train.watch import Log, SpikeDetector
from striate.vlm import select


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_the_region_and_the_projector_change(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    run = training.tune(model, data=data, out=tmp_path / "run", region="1,3", method=method, rank=4, options=OPTIONS)
    moved = changed(weights(model), weights(run.path))
    prefixes = ("model.language_model.layers.1.", "model.language_model.layers.3.", "model.multi_modal_projector.")
    assert moved
    assert all(name.startswith(prefixes) for name in moved), moved
    assert {name.split(".layers.")[-1][0] for name in moved if ".layers." in name} == {"1", "3"}


def test_the_checkpoint_is_plain_and_explains_itself(model: Path, data: Path, tmp_path: Path) -> None:
    run = training.tune(model, data=data, out=tmp_path / "run", region="1,3", method="lora", rank=4, options=OPTIONS)
    files = {file.name for file in run.checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "region.json", "README.md", "chat_template.jinja"} <= files
    assert not any("adapter" in name for name in files)
    assert striate.Region.load(run.checkpoint) == run.region
    assert "`1,3`" in (run.checkpoint / "README.md").read_text()
    assert not run.state.exists()
    assert run.info["status"] == "finished"
    assert [entry["step"] for entry in run.history()] == [1, 2, 3]


@pytest.mark.parametrize(("batch", "steps", "noted"), [(4, None, True), (1, None, False), (4, 3, False)])
def test_few_steps_are_noticed(
    model: Path, tmp_path: Path, batch: int, steps: int | None, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Log, "begin", lambda self, done, total, notes: said.extend(notes))
    options = replace(OPTIONS, batch=batch, micro_batch=1, steps=steps, epochs=1)
    striate.tune(striate.load(model, device="cpu"), read(write_data(tmp_path, records=20)), region="1", options=options)
    assert [text for text in said if "of the training" in text] == noted * [
        "all of the training is 5 steps of --batch 4: a smaller --batch or more --epochs makes more"
    ]


def test_merged_adapter_equals_adapter(model: Path, data: Path) -> None:
    vlm = striate.load(model)
    region = striate.Region.parse("1,3", vlm.depth)
    batch = batch_of(vlm, data)
    network, groups = adapt(vlm, region, projector=True, rank=4, alpha=8, dropout=0.0)
    for parameter in groups["layers"].values():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        adapted = network(**batch.inputs).logits
        merged = network.merge_and_unload()(**batch.inputs).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_adapters_stay_out_of_the_tower(model: Path) -> None:
    # The tower has blocks 0 and 1 with projections of the same names: an index or a suffix would hit them too.
    vlm = striate.load(model)
    _, groups = adapt(vlm, striate.Region.parse("1", vlm.depth), projector=False, rank=2, alpha=4, dropout=0.0)
    assert set(groups) == {"layers"}
    assert len(groups["layers"]) == 7 * 2
    assert all(".language_model.layers.1." in name for name in groups["layers"])


@pytest.mark.parametrize("name", ["glm4v_moe", "llama4", "qwen3_5_moe"])
def test_adapters_pass_experts_and_routers_over(name: str) -> None:
    # GLM's shared expert has projections of the names that peft takes for all experts; Llama 4's router is a linear
    # module by class.
    vlm = striate.Vlm.of(pico_more(name))
    _, groups = adapt(vlm, striate.Region.parse("1,3", vlm.depth), projector=True)
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in groups["layers"]}
    assert {name.rpartition(".")[2] for name in adapted} >= {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".layers.1." in name or ".layers.3." in name for name in adapted)
    assert not any("router" in name or ".experts" in name for name in adapted)
    assert vlm.model.config.model_type == name


def test_loss_is_the_models_own(model: Path, data: Path) -> None:
    # Logits at supervised positions only, against the full logits of plain transformers.
    vlm = striate.load(model)
    batch = batch_of(vlm, data)
    ours = answer_nll(vlm, vlm.model, batch).mean()
    theirs = vlm.model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_nothing(model: Path, data: Path, tmp_path: Path, micro_batch: int) -> None:
    options = replace(OPTIONS, warmup=0.0)
    whole = tune(model, data, tmp_path / "whole", replace(options, micro_batch=4))
    split = tune(model, data, tmp_path / "split", replace(options, micro_batch=micro_batch))
    losses = [[entry["loss"] for entry in run.history()] for run in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_same_seed_same_bytes(model: Path, data: Path, tmp_path: Path, deterministic: bool) -> None:
    options = replace(OPTIONS, deterministic=deterministic)
    runs = [tune(model, data, tmp_path / name, options) for name in ("a", "b")]
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = ((run.checkpoint / "model.safetensors").read_bytes() for run in runs)
    assert first == second


@pytest.mark.parametrize(("method", "optimizer"), [("full", "adamw"), ("lora", "adamw"), ("full", "adamw_8bit")])
def test_resumed_run_equals_uninterrupted_run(
    model: Path, data: Path, tmp_path: Path, method: str, optimizer: Any
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    options = replace(OPTIONS, steps=5, save_steps=2, optimizer=optimizer)
    whole = tune(model, data, tmp_path / "whole", options, method=method)

    with power_cut(3):
        tune(model, data, tmp_path / "cut", options, method=method)
    assert Run.open(tmp_path / "cut").info["status"] == "failed"
    resumed = tune(model, data, tmp_path / "cut", options, method=method, resume=True)
    assert changed(weights(whole.path), weights(resumed.path)) == set()
    assert [entry["step"] for entry in resumed.history()] == [1, 2, 3, 4, 5]
    seconds = [entry["seconds"] for entry in resumed.history()]
    assert seconds == sorted(seconds)  # those of the first part count
    assert resumed.info["training"]["seconds"] >= seconds[-1]
    assert resumed.info["training"]["samples"] == whole.info["training"]["samples"] == 20


def test_a_state_is_whole_or_not_there(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=5, save_steps=2)
    whole = tune(model, data, tmp_path / "whole", options)
    state = tmp_path / "cut" / "state"
    real = saved.commit_state

    def killed(written: Path, step: int) -> None:
        if step == 4:
            raise ValueError("killed")
        real(written, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "commit_state", killed)
        with pytest.raises(ValueError, match="killed"):
            tune(model, data, tmp_path / "cut", options)
    assert sorted(file.name for file in (state / "part").iterdir())  # torn, and
    assert last_saved(state) == state / "step-2"  # nobody's state
    resumed = tune(model, data, tmp_path / "cut", options, resume=True)
    assert changed(weights(whole.path), weights(resumed.path)) == set()


def test_a_state_is_that_of_its_step_though_training_continues(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, write, notes = Event(), saved.write_file, list[str]()

    class Slow(RunLog):
        def begin(self, done: int, total: int, lines: Sequence[str]) -> None:
            super().begin(done, total, lines)
            notes.append(" ".join(lines))

        def step(self, entry: dict[str, Any]) -> None:
            super().step(entry)
            if entry["step"] == 4:
                later.set()

    def wait(*arguments: Any) -> None:
        assert later.wait(60)
        write(*arguments)

    monkeypatch.setattr("striate.runs.training.RunLog", Slow)
    monkeypatch.setattr("striate.runs.training.shutil.rmtree", lambda *_, **__: None)  # leave the states
    options = replace(OPTIONS, steps=5, save_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_file", wait)
        behind = tune(model, data, tmp_path / "behind", options)
    with monkeypatch.context() as patch:
        patch.setattr(import_module("striate.train.fit"), "free_bytes", lambda _: 0)  # for no copy
        waiting = tune(model, data, tmp_path / "waiting", replace(options, checkpointing="none"))
    for file in (saved.TRAINED, saved.MOMENTS):
        found = [(run.state / "step-3" / file).read_bytes() for run in (behind, waiting)]
        assert found[0] == found[1]
    assert ["training waits while a state" in line for line in notes] == [False, True]


def test_resume_auto_starts_continues_or_does_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=5, save_steps=2)
    whole = tune(model, data, tmp_path / "whole", options)

    with power_cut(3):
        tune(model, data, tmp_path / "run", options, resume="auto")
    resumed = tune(model, data, tmp_path / "run", options, resume="auto")
    assert changed(weights(whole.path), weights(resumed.path)) == set()
    file = resumed.checkpoint / "model.safetensors"
    before = file.stat().st_mtime_ns
    assert tune(model, data, tmp_path / "run", options, resume="auto").info["status"] == "finished"
    assert file.stat().st_mtime_ns == before
    with pytest.raises(striate.UserError, match="batch was 4, now it is 2"):
        tune(model, data, tmp_path / "run", replace(options, batch=2), resume="auto")


def test_a_resumed_run_trains_with_the_options_of_now(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=5, save_steps=2, schedule="linear", learning_rate=1e-3, weight_decay=0.0)
    now = replace(options, learning_rate=4e-3, projector_learning_rate=1e-4, weight_decay=0.5)

    with power_cut(3):
        tune(model, data, tmp_path / "run", options)
    used: list[set[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.AdamW.step
        patch.setattr(
            torch.optim.AdamW, "step",
            lambda self, *_: used.append({group["weight_decay"] for group in self.param_groups}) or step(self),
        )  # fmt: skip
        resumed = tune(model, data, tmp_path / "run", now, resume="changed")
    whole = tune(model, data, tmp_path / "whole", now)
    assert [one["lr"] for one in resumed.history()[2:]] == [one["lr"] for one in whole.history()[2:]]
    assert used == [{0.0, 0.5}] * 3


def test_resume_names_what_has_changed(model: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data.parent, copy)
    tune(model, copy / data.name, tmp_path / "run", OPTIONS)
    run = Run.open(tmp_path / "run")
    run.update(status="interrupted")
    rows = json.loads((copy / data.name).read_text())
    rows[0]["conversations"][1]["value"] = "a green cat"
    (copy / data.name).write_text(json.dumps(rows))
    run.update(content=run.info["content"] | {"code": "sha256 of another"})
    with pytest.raises(striate.UserError, match="content of code has changed; the content of data has changed"):
        tune(model, copy / data.name, tmp_path / "run", OPTIONS, resume=True)
    forced = tune(model, copy / data.name, tmp_path / "run", replace(OPTIONS, save_steps=7), resume="changed")
    assert forced.info["status"] == "finished"
    assert forced.info["warnings"] == [
        "resumed although the content of code has changed", "resumed although the content of data has changed"
    ]  # fmt: skip


def test_resume_names_a_file_in_a_subfolder_that_has_changed(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "data" / "train")
    tune(model, tmp_path / "data", tmp_path / "run", OPTIONS)
    Run.open(tmp_path / "run").update(status="interrupted")
    copy = tmp_path / "data" / "train" / data.name
    copy.write_text(copy.read_text().replace("red", "green"))
    with pytest.raises(striate.UserError, match=f"the content of data train/{data.name} has changed"):
        tune(model, tmp_path / "data", tmp_path / "run", OPTIONS, resume=True)


@pytest.mark.parametrize("option", ["region", "route"])
def test_resume_refuses_layers_of_a_scores_file_that_has_changed(
    model: Path, data: Path, tmp_path: Path, option: str
) -> None:
    def write_scores(*values: float) -> None:
        score = {"values": values, "direction": "high"}
        (tmp_path / "scores.json").write_text(json.dumps({"depth": 4, "scores": {"gradient": score}}))

    def tune_top(**settings: Any) -> Run:
        layers = {"region": "0,1", option: f"top:2@{tmp_path / 'scores.json'}:gradient"}
        return training.tune(model, data=data, out=tmp_path / "run", options=OPTIONS, **layers, **settings)

    write_scores(4, 3, 2, 1)
    with power_cut(1):
        tune_top()
    write_scores(4, 1, 2, 3)
    with pytest.raises(striate.UserError, match=f"with the same result: {option} was 0,1, now it is 0,3 "):
        tune_top(resume=True)
    assert Run.open(tmp_path / "run").info["status"] == "failed"
    assert str(getattr(Run.open(tmp_path / "run"), option)) == "0,1"
    write_scores(40, 30, 20, 10)
    assert tune_top(resume=True).info["status"] == "finished"


@pytest.fixture(scope="module")
def with_a_bad_word(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The pico model, in which one word's embedding is NaN: every record with a dog in it corrupts its step."""
    vlm = striate.load(model)
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[vlm.tokenizer.convert_tokens_to_ids("dog")] = math.nan
    out = tmp_path_factory.mktemp("bad") / "llava"
    vlm.model.save_pretrained(out)
    vlm.processor.save_pretrained(out)
    return out


def test_a_nan_loss_stops_the_run_and_names_the_record(with_a_bad_word: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(striate.UserError, match=r"non-finite loss or gradients in step \d; records: [15](, [15])? \("):
        tune(with_a_bad_word, data, tmp_path / "run", replace(OPTIONS, steps=6))
    assert Run.open(tmp_path / "run").info["status"] == "failed"


def test_a_skipped_step_changes_nothing(with_a_bad_word: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=6, batch=1, micro_batch=1, warmup=0.0, weight_decay=0.1)
    run = tune(with_a_bad_word, data, tmp_path / "run", replace(options, skip_nonfinite=2))
    passed = [entry for entry in run.history() if "nonfinite" in entry]
    assert {name for entry in passed for name in entry["nonfinite"]} <= {"1", "5"}
    assert passed
    assert all(entry["loss"] is None and entry["grad_norm"] is None for entry in passed)
    assert all(math.isfinite(entry["loss"]) for entry in run.history() if entry not in passed)
    assert len(run.info["warnings"]) == len(passed)
    assert all(torch.isfinite(w).all() for name, w in weights(run.path).items() if "layers" in name)


def test_a_spike_is_far_above_the_losses_before_it() -> None:
    even = [2.0, 2.1, 1.9, 2.05, 1.95] * 4
    assert not SpikeDetector(even).spike(2.9)  # 10 deviations, but less than half as much again
    assert SpikeDetector(even).spike(3.1)
    assert not SpikeDetector(even[:10]).spike(30.0)  # too few to know
    assert not SpikeDetector([1.0, 3.0] * 10).spike(7.0)  # the usual deviation is 1.48


def test_samples_of_records_are_nested_and_depend_on_the_seed_alone(model: Path, tmp_path: Path) -> None:
    records = read(write_data(tmp_path, records=40))
    ids = {
        (samples, seed): [record.id for record in sample_records(records, samples, seed=seed)]
        for samples in ("4", "10%", "25%", "100%")
        for seed in (0, 1)
    }
    assert ids["4", 0] == ids["10%", 0]
    assert len(ids["25%", 0]) == 10
    assert set(ids["10%", 0]) < set(ids["25%", 0])
    assert set(ids["10%", 0]) != set(ids["10%", 1])
    assert ids["25%", 1] == sorted(ids["25%", 1], key=int)
    assert ids["100%", 0] == [record.id for record in records]
    run = tune(model, tmp_path / "train.json", tmp_path / "run", replace(OPTIONS, steps=None), samples="20%")
    assert run.info["training"]["samples"] == 8
    assert run.info["options"]["samples"] == "20%"
    with pytest.raises(striate.UserError, match="samples 41: there are only 40 records"):
        sample_records(records, "41", seed=0)


@pytest.mark.parametrize("samples", ["0", 0, "0%", "101%", "2.5", -1, "some", ""])
def test_samples_are_a_number_or_a_share(samples: int | str) -> None:
    with pytest.raises(striate.UserError, match=r"\(500\) or a share of them \(25%\)"):
        num_samples(samples, 10)


def test_resume_refuses_other_options(model: Path, data: Path, tmp_path: Path) -> None:
    tune(model, data, tmp_path / "run", OPTIONS)
    with pytest.raises(striate.UserError, match="finished"):
        tune(model, data, tmp_path / "run", OPTIONS, resume=True)
    Run.open(tmp_path / "run").update(status="interrupted")
    with pytest.raises(striate.UserError, match="learning_rate"):
        tune(model, data, tmp_path / "run", replace(OPTIONS, learning_rate=1.0), resume=True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])  # Ctrl-C; a scheduler whose time is up
def test_interrupt_leaves_a_resumable_run(model: Path, data: Path, tmp_path: Path, sent: signal.Signals) -> None:
    before = signal.getsignal(sent)
    options = replace(OPTIONS, steps=5)
    whole = tune(model, data, tmp_path / "whole", options)
    real = RunLog.step

    def press(self: RunLog, entry: dict[str, Any]) -> None:
        real(self, entry)
        if entry["step"] == 2:
            os.kill(os.getpid(), sent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", press)
        with pytest.raises(KeyboardInterrupt, match="step 2 of 5"):
            tune(model, data, tmp_path / "cut", options)
    assert Run.open(tmp_path / "cut").info["status"] == "interrupted"
    assert signal.getsignal(sent) == before
    resumed = tune(model, data, tmp_path / "cut", options, resume=True)
    assert changed(weights(whole.path), weights(resumed.path)) == set()


def test_a_first_step_of_text_alone_passes_the_audit(model: Path, tmp_path: Path) -> None:
    path = write_data(tmp_path, records=4)
    words = " ".join(["a red cat"] * 20)  # longer than any record with a image: they come first
    talk = [{"from": "human", "value": words}, {"from": "gpt", "value": words}]
    path.write_text(
        json.dumps([{"id": f"text{n}", "conversations": talk} for n in range(4)] + json.loads(path.read_text()))
    )
    run = tune(model, path, tmp_path / "run", replace(OPTIONS, steps=2))
    assert [entry["step"] for entry in run.history()] == [1, 2]
    assert not run.skipped()


def without_images(data: Path, out: Path) -> Path:
    """The same questions and answers about nothing."""
    rows = json.loads(data.read_text())
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "what is this ?"
    out.write_text(json.dumps(rows))
    return out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_text_alone_trains_the_layers(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    text = without_images(data, tmp_path / "text.json")
    run = tune(model, text, tmp_path / "run", OPTIONS, method=method)
    assert run.info["training"]["groups"].keys() == {"layers"}
    assert run.info["warnings"] == ["the probed records have no image: the projector is not trained"]
    assert {name.split(".")[1] for name in moved(model, run.path)} == {"language_model"}
    with pytest.raises(striate.UserError, match="no record has an image, which the projector needs to learn"):
        training.align(model, data=text, out=tmp_path / "align", options=OPTIONS)
    assert not (tmp_path / "align").exists()
    with pytest.raises(striate.UserError, match="no parameter to train"):
        training.tune(model, data=text, out=tmp_path / "none", region="none", method="full", options=OPTIONS)


def test_images_that_are_all_too_long_leave_the_projector_alone(model: Path, data: Path, tmp_path: Path) -> None:
    rows = json.loads(data.read_text())
    text = json.loads(without_images(data, tmp_path / "text.json").read_text())
    mixed = data.with_name("mixed.json")
    mixed.write_text(json.dumps(rows + [row | {"id": f"text{row['id']}"} for row in text]))
    run = tune(model, mixed, tmp_path / "run", replace(OPTIONS, steps=None, max_length=20))
    assert (run.info["training"]["left_out"], run.info["training"]["records"]) == (8, 16)
    assert run.info["warnings"] == [
        "the probed records have no image: the projector is not trained",
        "8 of 16 records are longer than 20 tokens and were left out: raise --max-length or set --truncate-text",
    ]


def test_audit_finds_a_parameter_without_gradient(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class All:
        def __contains__(self, parameter: Any) -> bool:
            return True

    monkeypatch.setattr(import_module("striate.train.fit"), "reachable_parameters", lambda output: All())
    text = without_images(data, tmp_path / "text.json")
    with pytest.raises(striate.UserError, match=r"got no gradient, .*multi_modal_projector"):
        tune(model, text, tmp_path / "run", OPTIONS)


def test_audit_finds_a_frozen_parameter_that_moves(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.Loop._clip

    def nudge(self: loop.Loop) -> float:
        with torch.no_grad():
            next(p for name, p in self.network.named_parameters() if "vision_tower" in name)[0] += 1e-6
        return real(self)

    monkeypatch.setattr(loop.Loop, "_clip", nudge)
    with pytest.raises(striate.UserError, match=r"1 frozen parameters changed .*vision_tower"):
        tune(model, data, tmp_path / "run", OPTIONS)


def test_align_trains_the_projector_and_on_request_the_tower(model: Path, data: Path, tmp_path: Path) -> None:
    run = training.align(model, data=data, out=tmp_path / "align", options=OPTIONS)
    assert {name.rsplit(".", 2)[0] for name in changed(weights(model), weights(run.path))} == {
        "model.multi_modal_projector"
    }
    run = training.align(model, data=data, out=tmp_path / "both", tower=True, options=OPTIONS)
    moved = changed(weights(model), weights(run.path))
    assert {name.split(".")[1] for name in moved} == {"multi_modal_projector", "vision_tower"}
    assert run.info["training"]["trainable_parameters"] == sum(run.info["training"]["groups"].values())


def test_bfloat16_trains_float32_weights_and_saves_the_models_type(model: Path, data: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    vlm = striate.load(model)
    vlm.model.to(torch.bfloat16).save_pretrained(half)
    vlm.processor.save_pretrained(half)
    # A rate this small moves no bfloat16 weight of norm one; it does move float32 weights, until they are saved.
    run = tune(half, data, tmp_path / "run", replace(OPTIONS, dtype="bfloat16", steps=8))
    after = weights(run.path)
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.bfloat16}
    assert changed(weights(half), after)


@pytest.mark.parametrize("frozen_layers", ["as_saved", "nf4"])
def test_a_second_training_in_memory_keeps_the_first(
    model: Path, data: Path, tmp_path: Path, frozen_layers: Any
) -> None:
    if frozen_layers == "nf4":
        pytest.importorskip("bitsandbytes")
    half = tmp_path / "half"
    vlm = striate.load(pico_llava(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16))
    vlm.model.to(torch.float16).save_pretrained(half)
    vlm.processor.save_pretrained(half)
    vlm, records = striate.load(half), read(data)
    options = replace(OPTIONS, dtype="bfloat16", learning_rate=1e-2, frozen_layers=frozen_layers)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    striate.tune(vlm, records, region="1", projector="freeze", method="full", options=options)
    first = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    moved = changed(before, first)
    assert moved
    assert all(".layers.1." in name for name in moved)
    striate.tune(vlm, records, region="3", projector="freeze", method="full", options=options)
    then = changed(first, vlm.model.state_dict())
    assert then
    assert all(".layers.3." in name for name in then)


class Cut(Log):
    """Ends the training in its second step."""

    def step(self, entry: dict[str, Any]) -> None:
        super().step(entry)
        if entry["step"] == 2:
            raise ValueError("power cut")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_that_failed_is_resumed_on_the_same_model(
    model: Path, data: Path, tmp_path: Path, method: Any
) -> None:
    half, records = saved_as(model, tmp_path / "half", torch.float16), read(data)
    settings: dict[str, Any] = {"region": "1,3", "method": method, "options": replace(OPTIONS, save_steps=1)}
    whole, vlm = striate.load(half), striate.load(half)
    striate.tune(whole, records, **settings)
    names = list(vlm.model.state_dict())
    with pytest.raises(ValueError, match="power cut"):
        striate.tune(vlm, records, state=str(tmp_path / "state"), log=Cut(), **settings)
    assert list(vlm.model.state_dict()) == names
    assert {one.dtype for one in vlm.model.parameters()} == {torch.float16}
    assert not vlm.model.training
    striate.tune(vlm, records, state=tmp_path / "state", **settings)
    assert not changed(whole.model.state_dict(), vlm.model.state_dict())


def test_a_training_that_was_stopped_is_resumed_on_the_same_model(model: Path, data: Path, tmp_path: Path) -> None:
    records = read(data)
    settings: dict[str, Any] = {"region": "1,3", "method": "lora", "options": OPTIONS}

    class Interrupted(Log):
        def step(self, entry: dict[str, Any]) -> None:
            super().step(entry)
            signal.raise_signal(signal.SIGINT)

    whole, vlm = striate.load(model), striate.load(model)
    striate.tune(whole, records, **settings)
    assert striate.tune(vlm, records, state=tmp_path / "state", log=Interrupted(), **settings).stopped
    assert not striate.tune(vlm, records, state=tmp_path / "state", **settings).stopped
    assert not changed(whole.model.state_dict(), vlm.model.state_dict())


@pytest.mark.parametrize("verb", ["tune", "align"])
def test_adapters_of_another_trainer_are_merged_first(model: Path, data: Path, verb: str) -> None:
    vlm = striate.load(model)
    network = get_peft_model(vlm.model, striate.lora_config(vlm, "1,3", rank=4))
    train = partial(getattr(striate, verb), vlm, read(data), options=OPTIONS)
    with pytest.raises(striate.UserError, match=r"adapters that are not merged: .*merge_and_unload\(\)"):
        train()
    network.merge_and_unload()
    train()


def test_a_region_is_not_saved_with_a_model_that_has_lost_layers(model: Path, data: Path, tmp_path: Path) -> None:
    vlm = striate.load(model)
    trained = striate.tune(vlm, read(data), region="1,3", options=OPTIONS)
    pruned = striate.drop_layers(vlm, [2])
    with pytest.raises(striate.UserError, match="region 1,3 is for 4 decoder layers, this model has 3"):
        trained.save(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()
    pruned.save(tmp_path / "pruned")


def test_a_model_is_saved_into_a_new_folder_only(model: Path, tmp_path: Path) -> None:
    vlm, file = striate.load(model), tmp_path / "file"
    file.touch()
    for folder in (file, tmp_path):
        with pytest.raises(striate.UserError, match="is not an empty folder: name a new one"):
            save(vlm, folder)
    with pytest.raises(striate.UserError, match=r"file/model cannot be written \(Not a directory\)"):
        save(vlm, file / "model")
    assert [*tmp_path.iterdir()] == [file]


def test_numbers_of_numpy_are_numbers(model: Path, data: Path, tmp_path: Path) -> None:
    two, vlm, records = np.int64(2), striate.load(model), read(data)
    options = replace(OPTIONS, batch=two, micro_batch=two, steps=two, seed=two, learning_rate=np.float32(1e-3))
    assert striate.tune(vlm, records, region=[two], samples=two, options=options, state=tmp_path / "state").seen == 4
    assert striate.tune(vlm, records, region=[two], samples=two, options=options, state=tmp_path / "state").seen == 4
    assert striate.score(vlm, records, metrics="gradient", samples=two, batch=two, seed=two).samples == 2
    assert len(striate.explore(vlm, records, samples=two, seed=two).samples) == 2
    assert len(striate.evaluate(vlm, records, samples=two, batch=two, max_new_tokens=two, seed=two).predictions) == 2


def test_a_list_of_records_will_do(model: Path, data: Path) -> None:
    vlm, records = striate.load(model), read(data)
    chosen = [one for one in records if one.id > "3"]
    expected = striate.score(vlm, records[4:], metrics="gradient")
    assert striate.score(vlm, chosen, metrics="gradient") == expected
    assert len(striate.explore(vlm, iter(chosen), samples=2).samples) == 2
    assert len(striate.evaluate(vlm, iter(chosen)).predictions) == 4
    assert striate.tune(vlm, chosen, region="1", options=OPTIONS).records == 4
    assert striate.align(vlm, iter(chosen), options=OPTIONS).records == 4


@pytest.mark.parametrize("verb", ["tune", "align"])
def test_a_resumed_training_keeps_the_layers_that_were_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    records, vlm = read(data), striate.load(model)
    regions = {"region": "auto:50%"} if verb == "tune" else {}
    train = partial(getattr(striate, verb), vlm, records, options=replace(OPTIONS, save_steps=1), **regions)
    state = tmp_path / "states" / "run"
    with pytest.raises(ValueError, match="power cut"):
        train(route="auto:75%", log=Cut(), state=state)
    with monkeypatch.context() as patch:
        patch.setattr("striate.train.measured.score", None)  # nothing is measured again
        trained = train(route="auto:75%", state=state)
        assert trained.steps == trained.total_steps
        assert trained.route.origin == "auto:75%"
        assert trained.region.origin.startswith("auto:50%" if regions else "none")
        with pytest.raises(TypeError):
            train(route="auto:2", state=state)


def test_layers_are_recomputed_in_the_training_that_asks_for_it_alone(model: Path, data: Path) -> None:
    vlm, records = striate.load(model, device="cpu"), read(data)
    first = striate.tune(vlm, records, region="1", options=replace(OPTIONS, checkpointing="all"))
    assert first.recomputed_layers
    assert not any(layer.gradient_checkpointing for layer in vlm.layers)
    for layer in vlm.layers:
        layer.gradient_checkpointing = True  # as `gradient_checkpointing_enable` leaves it
    seen: list[bool] = []
    vlm.layers[1].register_forward_pre_hook(
        lambda layer, _: seen.append(layer.training and layer.gradient_checkpointing)
    )
    second = striate.tune(vlm, records, region="1", options=replace(OPTIONS, checkpointing="none"))
    assert second.recomputed_layers == ()
    assert seen
    assert not any(seen)


def test_bad_records_are_listed_and_too_many_stop_the_run(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, records=120)
    (tmp_path / "5.png").write_bytes(b"no image")
    options = replace(OPTIONS, steps=None, batch=8, micro_batch=8, epochs=2)
    run = tune(model, data, tmp_path / "one", options)
    assert [entry["source"] for entry in run.skipped()] == ["train.json:6"]
    assert run.info["training"]["samples"] == 2 * 119
    with pytest.raises(striate.UserError, match=r"train.json:6: .*5.png"):
        tune(model, data, tmp_path / "stop", replace(options, on_bad_record="stop"))
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.raises(striate.UserError, match="2 bad records of 120"):
        tune(model, data, tmp_path / "two", options)


def test_bad_records_are_a_share_of_the_data_not_of_a_sample(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, records=120)
    rows = json.loads(data.read_text())
    rows[5]["conversations"] = "no list"
    data.write_text(json.dumps(rows))
    options = replace(OPTIONS, steps=2, batch=4, micro_batch=4, save_steps=1)
    run = tune(model, data, tmp_path / "some", options, samples=8)
    assert [entry["source"] for entry in run.skipped()] == ["train.json:6"]
    rows[7]["conversations"] = "no list"
    data.write_text(json.dumps(rows))
    with pytest.raises(striate.UserError, match="2 bad records of 120"):
        tune(model, data, tmp_path / "two", options, samples=8)


def test_records_that_are_too_long_are_listed_but_not_bad(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, records=8)
    options = replace(OPTIONS, steps=None, batch=4, micro_batch=4)
    run = tune(model, data, tmp_path / "some", replace(options, max_length=26))
    assert 0 < len(run.skipped()) < 8
    assert run.info["training"]["samples"] == 8 - len(run.skipped())
    with pytest.raises(striate.UserError, match="no record is left to train on"):
        tune(model, data, tmp_path / "none", replace(options, max_length=20))


def test_a_step_without_anything_to_learn_has_no_loss(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, records=24)
    rows = json.loads(data.read_text())
    for row in rows[1:]:  # too long, all but one
        row["conversations"][0]["value"] += " is this ?" * 10
    data.write_text(json.dumps(rows))
    run = tune(model, data, tmp_path / "run", replace(OPTIONS, steps=None, max_length=40))
    losses = [entry["loss"] for entry in run.history()]
    assert len(losses) == 6
    assert [loss for loss in losses if loss is not None] == [pytest.approx(4.8, abs=1)]
    assert [entry["records"] for entry in run.history()] == [0, 0, 0, 0, 0, 1]
    training = run.info["training"]
    assert (training["samples"], training["left_out"], training["records"]) == (1, 23, 24)
    assert run.info["warnings"] == [
        "23 of 24 records are longer than 40 tokens and were left out: raise --max-length or set --truncate-text"
    ]


def test_a_slip_leaves_no_run_behind(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(striate.UserError, match="no such file"):
        tune(model, tmp_path / "none.json", out, OPTIONS)
    with pytest.raises(striate.UserError, match="unknown region"):
        training.tune(model, data=data, out=out, region="unifrom:2", options=OPTIONS)
    assert not out.exists()
    tune(model, data, out, OPTIONS)
    with pytest.raises(striate.UserError, match="holds another run: tune, finished"):
        tune(model, data, out, OPTIONS)


def test_groups_of_like_length_come_in_random_order() -> None:
    lengths = [10 + (7 * index) % 97 for index in range(405)]
    order = length_grouped(lengths, batch=4, seed=3)
    assert sorted(order) == list(range(405))
    assert order == length_grouped(lengths, batch=4, seed=3)
    groups = [[lengths[index] for index in order[start : start + 4]] for start in range(0, 404, 4)]
    assert sorted(max(group) - min(group) for group in groups)[-2] <= 10  # the last few records make one mixed group
    assert max(groups[0]) == max(lengths)
    means = [sum(group) / 4 for group in groups]
    drift = np.corrcoef(range(50), means[1:51])[0, 1]  # sorted groups would give -1
    assert abs(drift) < 0.3
    assert length_grouped(lengths, batch=4, seed=4) != order


def moved(before: Path, after: Path) -> dict[str, float]:
    """How far each weight went, by the largest of its numbers; those that stayed are left out."""
    old, new = weights(before), weights(after)
    return {name: float((new[name] - old[name]).abs().max()) for name in changed(old, new)}


def test_a_learning_rate_of_zero_is_one(model: Path, data: Path, tmp_path: Path) -> None:
    still = tune(model, data, tmp_path / "still", replace(OPTIONS, learning_rate=0.0))
    assert {name.split(".")[1] for name in moved(model, still.path)} == {"multi_modal_projector"}
    still = tune(model, data, tmp_path / "bridge", replace(OPTIONS, projector_learning_rate=0.0))
    assert {name.split(".")[1] for name in moved(model, still.path)} == {"language_model"}
    still = training.align(
        model, data=data, out=tmp_path / "align", options=replace(OPTIONS, projector_learning_rate=0.0)
    )
    assert not moved(model, still.path)


def test_the_clipping_of_gradients_counts(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, steps=1, warmup=0.0)
    usual = moved(model, tune(model, data, tmp_path / "usual", options).path)
    assert max(usual.values()) == pytest.approx(1e-2, rel=1e-2)  # the rate, whatever the gradient
    monkeypatch.setattr("torch.optim.AdamW", partial(torch.optim.AdamW, eps=1e3))  # now it counts how large one is
    clipped, not_clipped = (
        moved(model, tune(model, data, tmp_path / f"{norm}", replace(options, max_grad_norm=norm)).path)
        for norm in (1e-3, 0.0)
    )
    assert max(clipped.values(), default=0) < 0.01 * max(not_clipped.values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "--steps 0: more than 0"),
        ({"epochs": 0}, "--epochs 0: more than 0"),
        ({"save_steps": 0}, "--save-steps 0: more than 0"),
        ({"micro_batch": -1}, "--micro-batch -1: more than 0"),
        ({"learning_rate": -1e-5}, "--learning-rate -1e-05: at least 0"),
        ({"learning_rate": math.nan}, "--learning-rate nan: at least 0"),
        ({"seed": -1}, "--seed -1: 0 to 4294967295"),
        ({"seed": 2**32}, "--seed 4294967296: 0 to 4294967295"),
        ({"warmup": 100}, "--warmup 100: at least 0 and less than 1"),
        ({"schedule": "cosine_with_min_lr"}, "--schedule 'cosine_with_min_lr'; there are: cosine, linear"),
        ({"packing": "yes"}, "--packing 'yes'; there are: auto, on, off"),
        ({"batch": 24}, "--batch 24 is not a multiple of --micro-batch 16 x 1 device"),
        ({"report_to": "tensorbord"}, "--report-to 'tensorbord'; nearest: tensorboard"),
        ({"report_to": "dvclive"}, "--report-to dvclive needs dvclive, which is not installed: pip install dvclive"),
    ],
    ids=str,
)
def test_a_value_that_an_option_cannot_have_leaves_nothing_behind(
    model: Path, data: Path, tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(striate.UserError, match=f"^{re.escape(words)}"):
        tune(model, data, tmp_path / "run", TrainOptions(**wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "ful"}, "--method 'ful'; nearest: full"),
        ({"projector": "30%"}, "--projector '30%'; there are: train, freeze"),
        ({"rank": 0}, "--rank 0: at least 1"),
        ({"alpha": 0}, "--alpha 0: more than 0"),
        ({"dropout": 1.0}, "--dropout 1.0: a share"),
    ],
    ids=str,
)
def test_an_argument_of_tune_that_cannot_be_is_refused(
    model: Path, data: Path, tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(striate.UserError, match=f"^{re.escape(words)}"):
        tune(model, data, tmp_path / "run", OPTIONS, **wrong)
    assert not (tmp_path / "run").exists()


def test_frozen_bottom_builds_no_graph(model: Path, data: Path) -> None:
    # With the projector frozen nothing below the first trained layer keeps activations for a backward pass.
    vlm = striate.load(model)
    select(vlm, striate.Region.parse("2", vlm.depth), projector=False)
    seen: dict[int, bool] = {}
    for index, layer in enumerate(vlm.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: seen.__setitem__(index, out.requires_grad))
    answer_nll(vlm, vlm.model, batch_of(vlm, data))
    assert seen == {0: False, 1: False, 2: True, 3: True}
