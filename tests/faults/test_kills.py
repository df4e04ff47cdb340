"""A training that is killed, at any moment, again and again, ends in the weights of one that never was."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import CONTEXT
from pico import pico_llava
from plain import train_plainly
from safetensors.torch import load_file
from training import write_data

from striate.runs.run import LOG, Run
from striate.runs.training import tune
from striate.train import TrainOptions
from striate.train.saved import PART

STEPS, SAVED_EVERY = 8, 2
OPTIONS = TrainOptions(
    batch=4, micro_batch=2, steps=STEPS, save_steps=SAVED_EVERY, learning_rate=1e-2, dtype="float32", device="cpu"
)


def train(model: Path, data: Path, out: Path) -> None:
    """Begin the training, or go on with it."""
    tune(model, data=data, out=out, resume="auto", options=OPTIONS)


def train_by_trainer(model: Path, data: Path, out: Path) -> None:
    """The same by transformers' Trainer."""
    train_plainly(model, data, out, max_steps=STEPS, save_steps=SAVED_EVERY)


def process(work: Callable[..., None], *arguments: Path) -> Any:
    """The training in a process of its own, at work."""
    started = CONTEXT.Process(target=work, args=arguments)
    started.start()
    return started


def logged(run: Path) -> list[int]:
    """The steps in the order in which they were done, those done again too."""
    if not (run / LOG).is_file():
        return []
    return [json.loads(line)["step"] for line in (run / LOG).read_text().splitlines() if line.endswith("}")]


def weights(run: Path) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in load_file(run / "checkpoint" / "model.safetensors").items()}


def killed(work: Callable[..., None], *arguments: Path, kills: int, moment: Callable[[Any], None]) -> tuple[int, bool]:
    """A training, started again and again and killed at a `moment` up to so often: how often, and if it ended well."""
    for done in range(kills + 1):
        at_work = process(work, *arguments)
        if done < kills:
            moment(at_work)
        else:
            at_work.join()
        if at_work.exitcode is not None:
            return done, at_work.exitcode == 0
        at_work.kill()
        at_work.join()
    raise AssertionError


def test_kills_at_any_moment(
    tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    draw = random.Random(0)
    model, data = pico_llava(tmp_path / "model"), write_data(tmp_path)
    process(train, model, data, tmp_path / "whole").join()
    wanted, longest = weights(tmp_path / "whole"), Run.open(tmp_path / "whole").info["seconds"]

    def some_time(at_work: Any) -> None:
        at_work.join(draw.uniform(0, 1.2 * longest))

    kills, survived, again, number = amount(3, 30), 0, 0, 0
    while survived < kills:
        number += 1
        run = tmp_path / f"run-{number}"
        done, well = killed(train, model, data, run, kills=kills - survived, moment=some_time)
        assert well, f"after {done} kills"
        assert weights(run) == wanted
        survived += done
        steps = logged(run)
        assert set(steps) == set(range(1, STEPS + 1))
        again = max([again, *(last - step + 1 for last, step in itertools.pairwise(steps) if step <= last)])
    lost = f"0; at most {again} steps done again"
    by_trainer = _by_trainer(tmp_path, model, data, draw, amount(1, 10))
    note_fault("SIGKILL while training, at random moments", kills, survived, lost, by_trainer)
    assert again < 2 * SAVED_EVERY  # a state is written while the next steps are done


def _by_trainer(folder: Path, model: Path, data: Path, draw: random.Random, trainings: int) -> str:
    """How many trainings by the Trainer, killed once at random each, end in the weights of one that never was."""
    began = time.monotonic()
    process(train_by_trainer, model, data, folder / "plain").join()
    longest, wanted, ended, same = time.monotonic() - began, weights(folder / "plain"), 0, 0

    def some_time(at_work: Any) -> None:
        at_work.join(draw.uniform(0, longest))

    for number in range(trainings):
        run, kills = folder / f"plain-{number}", 0
        while not kills:  # it came to its end before
            shutil.rmtree(run, ignore_errors=True)
            kills, well = killed(train_by_trainer, model, data, run, kills=1, moment=some_time)
        ended += well
        same += well and weights(run) == wanted
    return f"of {trainings} killed once, {ended} came to an end, {same} of them in the same weights"


def test_kills_while_a_state_is_saved(
    tmp_path: Path, amount: Callable[[int, int], int], note_fault: Callable[..., None]
) -> None:
    model, data, run = pico_llava(tmp_path / "model"), write_data(tmp_path), tmp_path / "run"
    process(train, model, data, tmp_path / "whole").join()
    wanted, kills, hits, tries = weights(tmp_path / "whole"), amount(1, 5), 0, 0

    def half_saved(at_work: Any) -> None:
        while at_work.exitcode is None and not (run / "state" / PART).is_dir():
            time.sleep(0.0005)

    while hits < kills:
        tries += 1
        assert tries < 20 * kills, "no kill hit a save"
        shutil.rmtree(run, ignore_errors=True)
        at_work = process(train, model, data, run)
        half_saved(at_work)
        at_work.kill()
        at_work.join()
        hits += (run / "state" / PART).is_dir()
        process(train, model, data, run).join()
        assert weights(run) == wanted
    note_fault("SIGKILL while a state is being saved", kills, hits, "0; the state before it is whole")
