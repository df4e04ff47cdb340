"""A disk that fills up: saves wait, the run goes on; where nothing fits any more it stops, and goes on later."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from plain import train_plainly
from training import changed, weights

import striate
from striate.runs.run import Run
from striate.runs.stage import RunLog
from striate.runs.training import tune
from striate.train import TrainOptions, last_saved
from striate.train.saved import MARGIN

OPTIONS = TrainOptions(batch=4, micro_batch=2, steps=6, save_steps=2, learning_rate=1e-2, dtype="float32", device="cpu")
SIZE = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", place], check=False)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, *, but: int) -> Path:
    """Leave so many bytes free."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb") as file:  # the last page may be one too many
        file.write(bytes(shutil.disk_usage(disk).free - but))
    return ballast


def run(model: Path, data: Path, out: Path, options: TrainOptions = OPTIONS, **settings: Any) -> Run:
    return tune(model, data=data, out=out, region="all", method="full", options=options, **settings)


def test_no_room_for_a_state(
    model: Path, data: Path, disk: Path, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    whole = run(model, data, tmp_path / "whole")
    size = (model / "model.safetensors").stat().st_size
    ballast = fill(disk, but=size + MARGIN + 2**17)  # the model fits, a state of three times its size does not
    crowded = run(model, data, disk / "run")
    survived = changed(weights(whole.path), weights(crowded.path)) == set()
    warnings = crowded.info["warnings"]
    ballast.unlink()
    shutil.rmtree(disk / "run")
    fill(disk, but=size + MARGIN + 2**17)
    with pytest.raises(Exception, match=r"(?i)no space left|file write failed|unexpected pos"):
        train_plainly(model, data, disk / "plain", max_steps=6, save_steps=2)
    row = ("disk too full to save a state", 1, int(survived), "0; saves wait, with a warning")
    note_fault(*row, "an error at the first save ends it")
    assert survived
    assert len(warnings) == 3
    assert "no room" in warnings[0]
    assert last_saved(crowded.state) is None


def test_room_comes_back(model: Path, data: Path, disk: Path) -> None:
    ballast = fill(disk, but=(model / "model.safetensors").stat().st_size + MARGIN + 2**17)
    saved: list[Path | None] = []

    class Clean(RunLog):
        def step(self, entry: dict[str, Any]) -> None:  # before the step's state is saved
            super().step(entry)
            saved.append(last_saved(self.run.state))
            if entry["step"] == 3:
                ballast.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.runs.training.RunLog", Clean)
        patch.setattr(
            import_module("striate.train.fit"), "free_bytes", lambda _: 0
        )  # no room for a copy: written at once
        run(model, data, disk / "run", replace(OPTIONS, steps=6))
    assert [bool(one) for one in saved] == [False, False, False, False, True, True]


def test_nothing_fits_any_more(
    model: Path, data: Path, disk: Path, tmp_path: Path, note_fault: Callable[..., None]
) -> None:
    whole = run(model, data, tmp_path / "whole")

    class Fill(RunLog):
        def step(self, entry: dict[str, Any]) -> None:
            if entry["step"] == 4:
                fill(disk, but=0)
            super().step(entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("striate.runs.training.RunLog", Fill)
        with pytest.raises(striate.UserError, match=r"no space left to write .*: free some, then resume"):
            run(model, data, disk / "run")
    (disk / "ballast").unlink()
    resumed = run(model, data, disk / "run", resume="auto")
    survived = changed(weights(whole.path), weights(resumed.path)) == set()
    note_fault("disk full to the last byte while training", 1, int(survived), "0; stops, resumes from the last save")
    assert survived


def test_too_small_a_disk_is_reported_before_the_work(model: Path, data: Path, disk: Path) -> None:
    fill(disk, but=MARGIN)
    with pytest.raises(striate.UserError, match=r"the trained model takes 0.00 GB, and .* has 0.00 GB free"):
        run(model, data, disk / "run")
    assert not Run.open(disk / "run").history()
