"""A training that is killed, at any moment, again and again, ends in the weights of one that never was."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pico import pico_llava
from safetensors.torch import load_file
from test_train import write_data

from striate.run import LOG, Run
from striate.train import TrainOptions, tune

STEPS, SAVED_EVERY = 8, 2
OPTIONS = TrainOptions(
    batch=4, micro_batch=2, steps=STEPS, save_steps=SAVED_EVERY, learning_rate=1e-2, dtype="float32", device="cpu"
)
# Processes are forked from one that has imported everything: each starts in a moment.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["striate.train"])


def train(model: Path, data: Path, out: Path) -> None:
    """Begin the training, or go on with it."""
    tune(model, data=data, out=out, resume=(out / "run.json").is_file(), options=OPTIONS)


def process(*arguments: Path) -> Any:
    """The training in a process of its own, at work."""
    started = CONTEXT.Process(target=train, args=arguments)
    started.start()
    return started


def logged(run: Path) -> list[int]:
    """The steps in the order in which they were done, those done again too."""
    if not (run / LOG).is_file():
        return []
    return [json.loads(line)["step"] for line in (run / LOG).read_text().splitlines() if line.endswith("}")]


def weights(run: Path) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in load_file(run / "checkpoint" / "model.safetensors").items()}


def test_kills_at_any_moment(tmp_path: Path, amount: Callable[[int, int], int], bad_day: Callable[..., None]) -> None:
    draw = random.Random(0)
    model, data = pico_llava(tmp_path / "model"), write_data(tmp_path)
    whole = process(model, data, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    wanted, longest = weights(tmp_path / "whole"), Run.open(tmp_path / "whole").info["seconds"]
    kills, survived, again, number = amount(3, 30), 0, 0, 0
    while survived < kills:
        number += 1
        run, before = tmp_path / f"run-{number}", survived
        while (at_work := process(model, data, run)) and survived < kills:
            at_work.join(draw.uniform(0, 1.2 * longest))
            if at_work.exitcode is not None:
                break
            at_work.kill()
            at_work.join()
            survived += 1
        at_work.join()
        assert at_work.exitcode == 0, f"after {survived - before} kills"
        assert weights(run) == wanted
        steps = logged(run)
        assert set(steps) == set(range(1, STEPS + 1))
        repeats = [last - step + 1 for last, step in itertools.pairwise(steps) if step <= last]
        again = max([again, *repeats])
    bad_day("SIGKILL while training, at random moments", kills, survived, f"0; at most {again} steps done again")
    assert again <= SAVED_EVERY
