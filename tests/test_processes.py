"""Two processes do what one does: the same losses, weights and scores, nothing sent that need not be, no hanging."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launch import finish, start, together, wait_for
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import changed, weights, write_data

import striate
from striate.data import Examples, read
from striate.distributed import Rank
from striate.runs import training as verbs
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import revert, score
from striate.runs.stage import RunLog
from striate.runs.training import tune
from striate.train import TrainOptions, last_saved
from striate.train.collator import DummyCollator

OPTIONS = TrainOptions(
    batch=4, micro_batch=1, epochs=2, learning_rate=1e-2, projector_learning_rate=1e-2, warmup=0.0, dtype="float32",
    device="cpu", workers=0,
)  # fmt: skip
# Sums in another order round otherwise. Where a gradient is near 0, as LoRA's first ones are, Adam's usual epsilon of
# 1e-8 would make full steps of the rounding.
ADAM = partial(torch.optim.AdamW, eps=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records, so that the last step of an epoch has two; every third has no image."""
    file = write_data(tmp_path_factory.mktemp("data"), records=10)
    rows = json.loads(file.read_text())
    for row in rows[::3]:
        del row["image"]
        row["conversations"][0]["value"] = "what is this ?"
    file.write_text(json.dumps(rows))
    return file


def train(model: Path, data: Path, out: Path, options: TrainOptions, settings: dict[str, Any]) -> None:
    """One process of a training."""
    with mock.patch("torch.optim.AdamW", ADAM):
        tune(model, data=data, out=out, region="1,3", options=options, **settings)


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in Run.open(run).history()]


@pytest.mark.parametrize("settings", [{"method": "full"}, {"method": "lora", "rank": 4, "dropout": 0.0}])
@pytest.mark.parametrize("ways", [{}, {"packing": "off"}, {"shard": True}, {"shard": True, "checkpointing": "all"}])
def test_two_processes_train_as_one(
    model: Path, data: Path, tmp_path: Path, settings: dict[str, Any], ways: dict[str, Any]
) -> None:
    options = replace(OPTIONS, **ways)
    train(model, data, tmp_path / "one", replace(options, shard=False), settings)
    assert together(2, train, model, data, tmp_path / "two", options, settings) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == 6
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    info = Run.open(tmp_path / "two").info
    assert (info["status"], info["training"]["samples"]) == ("finished", 20)


@pytest.mark.parametrize("ways", [{}, {"shard": True}])
def test_two_processes_train_as_one_with_a_route(model: Path, data: Path, tmp_path: Path, ways: dict[str, Any]) -> None:
    test_two_processes_train_as_one(model, data, tmp_path, {"method": "full", "route": "0,2"}, ways)


def train_and_count(sent: Path, *arguments: Any) -> None:
    """Train, and note the bytes of gradients that each step brings to the other processes."""
    init = DistributedDataParallel.__init__
    bytes_sent: list[int] = []

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations as text
        bytes_sent.append(bucket.buffer().nbytes)
        averaged = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return averaged.then(lambda done: done.value()[0])

    def hooked(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_comm_hook(None, counted)

    DistributedDataParallel.__init__ = hooked  # type: ignore[method-assign]
    train(*arguments)
    if os.environ["RANK"] == "0":
        sent.write_text(str(sum(bytes_sent)))


def test_a_frozen_layer_costs_no_communication(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=3, micro_batch=2)  # one step in three is of two micro-batches: sent once
    arguments = (model, data, tmp_path / "run", options, {"method": "full"})
    assert together(2, train_and_count, tmp_path / "sent", *arguments) == [0, 0]
    trained = Run.open(tmp_path / "run").info["training"]["trainable_parameters"]
    assert trained < 0.5 * sum(weight.numel() for weight in weights(model).values())
    assert int((tmp_path / "sent").read_text()) == 3 * 4 * trained


def train_and_count_scattered(sent: Path, *arguments: Any) -> None:
    """Train sharded, and note the bytes of gradients that are brought together."""
    name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, n))
    scatter = getattr(torch.distributed, name)
    bytes_sent: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        bytes_sent.append(kwargs["input"].nbytes)
        return scatter(*args, **kwargs)

    setattr(torch.distributed, name, counted)
    train(*arguments)
    if os.environ["RANK"] == "0":
        sent.write_text(str(sum(bytes_sent)))


def test_a_frozen_layer_that_is_sharded_has_no_gradients_to_bring_together(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options = replace(OPTIONS, steps=3, micro_batch=2, shard=True)
    arguments = (model, data, tmp_path / "run", options, {"method": "full"})
    assert together(2, train_and_count_scattered, tmp_path / "sent", *arguments) == [0, 0]
    trained = Run.open(tmp_path / "run").info["training"]["trainable_parameters"]
    padding = 1.1  # odd rows are filled up so that each process has as many
    assert 3 * 4 * trained <= int((tmp_path / "sent").read_text()) < padding * 3 * 4 * trained


def crash(at: int, *arguments: Any) -> None:
    """Train until a step, and fall over."""

    class Crash(RunLog):
        def step(self, entry: dict[str, Any]) -> None:
            super().step(entry)
            if entry["step"] == at:
                raise ValueError("power cut")

    verbs.RunLog = Crash  # type: ignore[misc]
    train(*arguments)


@pytest.mark.parametrize("ways", [{}, {"shard": True}])
def test_processes_resume_to_the_same_bits(model: Path, data: Path, tmp_path: Path, ways: dict[str, Any]) -> None:
    options = replace(OPTIONS, save_steps=2, **ways)
    settings = {"method": "full", "resume": "auto"}
    assert together(2, train, model, data, tmp_path / "whole", options, settings) == [0, 0]
    assert together(2, crash, 3, model, data, tmp_path / "cut", options, settings) == [1, 1]
    assert together(2, train, model, data, tmp_path / "cut", options, settings) == [0, 0]
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == set()


def test_frozen_layers_in_bfloat16_are_sharded_beside_trained_ones_in_float32(
    model: Path, data: Path, tmp_path: Path
) -> None:
    vlm = striate.load(model, dtype="bfloat16")
    vlm.model.save_pretrained(tmp_path / "half")
    vlm.processor.save_pretrained(tmp_path / "half")
    options = replace(OPTIONS, dtype="bfloat16", shard=True, micro_batch=2)
    for method in ("full", "lora"):
        arguments = (tmp_path / "half", data, tmp_path / method, options, {"method": method})
        assert together(2, train, *arguments) == [0, 0]
        before, after = weights(tmp_path / "half"), weights(tmp_path / method)
        assert {name.split(".layers.")[-1][0] for name in changed(before, after) if ".layers." in name} == {"1", "3"}
        assert losses(tmp_path / method)[-1] < losses(tmp_path / method)[0]


def probe_sharded(*arguments: Any) -> None:
    """Train; fails unless the model is sharded, and on its device, before it is probed."""
    module = import_module("striate.train.fit")
    verify = module.verify_fast_paths

    def watched(models: list[Any], *others: Any, **settings: Any) -> Any:
        assert all(isinstance(parameter, DTensor) for parameter in settings["network"].parameters())
        return verify(models, *others, **settings)

    vars(module)["verify_fast_paths"] = watched
    train(*arguments)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sharded_model_is_probed_where_it_trains(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    # Before, each process ran a whole model on its CPU, in one thread and under the autocast of a GPU.
    arguments = (model, data, tmp_path / "run", replace(OPTIONS, shard=True), {"method": method})
    assert together(2, probe_sharded, *arguments) == [0, 0]
    assert Run.open(tmp_path / "run").info["training"]["packing"]


class Everything:
    """Contains whatever it is asked for."""

    def __contains__(self, one: Any) -> bool:
        return True


def train_all(*arguments: Any) -> None:
    """Train, with every parameter regarded as one that the answers depend on."""
    vars(import_module("striate.train.fit"))["reachable_parameters"] = lambda output: Everything()
    train(*arguments)


@pytest.mark.parametrize("ways", [{}, {"shard": True}])
def test_the_audit_is_kept(model: Path, data: Path, tmp_path: Path, ways: dict[str, Any]) -> None:
    # Text alone gives the projector no gradient: no launch may go on that says it trains it.
    rows = [row for row in json.loads(data.read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    arguments = (model, tmp_path / "text.json", tmp_path / "run", replace(OPTIONS, **ways), {"method": "full"})
    assert together(2, train_all, *arguments) == [1, 1]
    assert Run.open(tmp_path / "run").info["status"] == "failed"
    assert not Run.open(tmp_path / "run").history()


def test_processes_train_on_text_alone(model: Path, data: Path, tmp_path: Path) -> None:
    # Every record with an image is too long for this limit: the one that stands in is text, too.
    options = replace(OPTIONS, max_length=20, epochs=1)
    train(model, data, tmp_path / "one", options, {"method": "full"})
    assert together(2, train, model, data, tmp_path / "two", options, {"method": "full"}) == [0, 0]
    info = Run.open(tmp_path / "two").info["training"]
    assert (info["samples"], info["left_out"], info["groups"].keys()) == (4, 6, {"layers"})
    one, two = ([loss for loss in losses(tmp_path / name) if loss is not None] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    assert len(losses(tmp_path / "two")) == 3 > len(two)  # the longest, with images, come first


def test_sharding_is_for_several_processes(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(striate.UserError, match="start them with torchrun"):
        train(model, data, tmp_path / "run", replace(OPTIONS, shard=True), {"method": "full"})


def test_records_that_cannot_be_used_do_not_hold_up_the_others(model: Path, data: Path, tmp_path: Path) -> None:
    # Too long for this limit are those with a image and a long answer: half a process's batches become empty.
    options = replace(OPTIONS, max_length=25)
    train(model, data, tmp_path / "one", options, {"method": "full"})
    left_out = Run.open(tmp_path / "one").skipped()
    assert len(left_out) in range(2, 8)
    assert together(2, train, model, data, tmp_path / "two", options, {"method": "full"}) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [loss is None for loss in two] == [loss is None for loss in one]  # steps without any answer left
    assert list(filter(None, two)) == pytest.approx(list(filter(None, one)), rel=1e-5)
    noted = Run.open(tmp_path / "two").skipped()
    assert sorted(noted, key=str) == sorted(left_out, key=str)


def test_a_bad_record_stops_all(model: Path, data: Path, tmp_path: Path) -> None:
    rows = json.loads(data.read_text())
    rows[1]["image"] = "missing.png"
    bad = data.with_name("bad.json")
    bad.write_text(json.dumps(rows))
    started = start(2, train, model, bad, tmp_path / "run", OPTIONS, {"method": "full"})
    assert finish(started) == [1, 1]  # an error each; none waits
    assert Run.open(tmp_path / "run").info["status"] == "failed"


def test_a_signal_to_one_saves_all(model: Path, data: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=20)
    assert together(2, train, model, data, tmp_path / "whole", options, {"method": "full"}) == [0, 0]
    started = start(2, train, model, data, tmp_path / "run", options, {"method": "full"})
    wait_for(tmp_path / "run" / "log.jsonl", started[0])
    os.kill(started[1].pid, signal.SIGTERM)
    assert finish(started) == [1, 1]
    run = Run.open(tmp_path / "run")
    assert run.info["status"] == "interrupted"
    assert 0 < len(run.history()) < 60
    assert together(2, train, model, data, run.path, options, {"method": "full", "resume": "auto"}) == [0, 0]
    assert len(run.history()) == 60
    assert losses(run.path) == losses(tmp_path / "whole")
    assert changed(weights(tmp_path / "whole"), weights(run.path)) == set()


def train_in_a_group(*arguments: Any) -> None:
    """Train as a scheduler starts a job: in a process group of its own."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # not that of these tests, whose server would be in the group
    train(*arguments)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_does_not_end_data_workers(
    model: Path, data: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    many = data.with_name("many.json")
    many.write_text(json.dumps(40 * json.loads(data.read_text())))
    options = replace(OPTIONS, epochs=1, workers=2, save_steps=1000)
    started = start(1, train_in_a_group, model, many, tmp_path / "run", options, {"method": "full"})
    wait_for(tmp_path / "run" / "log.jsonl", started[0])
    os.killpg(started[0].pid, sent)
    assert finish(started) == [1]
    run = Run.open(tmp_path / "run")
    assert run.info["status"] == "interrupted"
    assert last_saved(run.state) == run.state / f"step-{len(run.history())}"


def scored(model: Path, data: Path, out: Path) -> None:
    """One process of two measurements."""
    score(model, data=data, out=out / "score", options=ReadOptions(batch=2, device="cpu", on_bad_record="skip"))
    revert(
        model,
        backbone=str(model),
        groups="each",
        visual=data,
        out=out / "revert",
        options=ReadOptions(batch=2, device="cpu"),
    )


def test_two_processes_score_as_one(model: Path, data: Path, tmp_path: Path) -> None:
    assert together(1, scored, model, data, tmp_path / "one") == [0]  # a process, too: as many threads
    assert together(2, scored, model, data, tmp_path / "two") == [0, 0]
    for file in ("score/scores.json", "revert/results.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    figures = {file.name for file in (tmp_path / "one" / "score" / "figures").iterdir()}
    assert {file.name for file in (tmp_path / "two" / "score" / "figures").iterdir()} == figures


def test_shares_interleave_into_the_original_order() -> None:
    class Others(Rank):
        def gather(self, mine: Any) -> Any:
            return [list(Rank(number, 3).share(range(8))) for number in range(3)]

    assert list(Rank(1, 3).share(range(8))) == [1, 4, 7]
    assert Others(1, 3).interleave([1, 4, 7]) == list(range(8))


def test_a_dummy_example_has_no_labels(model: Path, data: Path) -> None:
    vlm = striate.load(model)
    examples = Examples(read(data).records, vlm.processor)
    batches = DummyCollator.of(examples, pad_id=0)
    assert len(batches([examples[1]])) == 1  # has a image
    alone = batches([])  # more processes than micro-batches
    both = batches([examples[0]])
    assert (len(alone), len(both)) == (1, 2)
    assert bool((alone.labels == -100).all())
    assert bool(alone.image_mask.any())
    assert int((both.labels != -100).sum()) == int((examples[0].labels != -100).sum())
