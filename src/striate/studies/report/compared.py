"""Runs as they are compared: found in folders, sweeps and folders of runs, and read with what they measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate
from striate.region import Region
from striate.runs.run import INFO, SKIPPED, Run
from striate.studies.report.pairing import PERPLEXITY, Predictions, Retention, processor
from striate.studies.report.treatment import treatment

if TYPE_CHECKING:
    from striate.evaluation.statistics import Interval
    from striate.scores.table import Scores


MODALITIES = ("visual", "text")
LONG = ("rouge_l", "share_named")  # metrics of answers with several facts
NOTHING = "–"  # what was not measured
# Verbs that measure layers, not accuracy.
LAYERWISE = {"score": "layer scores only", "revert": "layers reverted only"}


SWEEP = "sweep.json"
BELOW = [f"{'[!.]*/' * depth}{INFO}" for depth in (1, 2, 3)]  # of runs below a folder, none of it hidden


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """One run as it is compared. What was not measured is None; accuracies are in 0..1.

    `records` is equal for runs on the same questions; `treatment` is equal for runs that differ only in the seed.
    `reference` is the name of the run that `kept` compares with. `values` are the options of the cell of a sweep.
    """

    name: str
    run: Run
    info: Mapping[str, Any]
    region: Region | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str = ""
    predictions: Predictions = field(default_factory=lambda: Predictions({}))
    records: str = ""
    processor: str = ""
    treatment: str = ""
    kept: Retention | None = None
    reference: str = ""
    values: tuple[tuple[str, str], ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    spikes: tuple[tuple[float, float], ...] = ()
    scores: Scores | None = None
    reverted: Mapping[str, plot.RevertProfile] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def visual(self) -> Estimate | None:
        """The mean over visual tasks."""
        return self.mean("visual")

    @cached_property
    def text(self) -> Estimate | None:
        """The mean over text tasks."""
        return self.mean("text")

    @property
    def share(self) -> float | None:
        """What it keeps of its reference's visual accuracy, 1 for all."""
        if self.visual and self.reference == self.name:
            return 1.0
        return self.kept.share.value if self.kept else None

    def task(self, name: str) -> Estimate | None:
        """What it measured in a task."""
        return estimate(self.tasks[name]) if name in self.tasks else None

    def training(self, name: str) -> float | None:
        """A number of "training" in run.json; None if it is missing or not finite."""
        value = (self.info.get("training") or {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def pruned(self) -> Mapping[str, Any]:
        """What a pruning did, as run.json has it; empty for other runs."""
        return self.info.get("prune") or {}

    def names(self, modality: str) -> list[str]:
        """The tasks of a modality that have an accuracy; of "long" those with long answers about images."""
        chosen = {n: t for n, t in self.tasks.items() if t["metric"] != PERPLEXITY}
        if modality == "long":
            return [n for n, task in chosen.items() if task["modality"] == "visual" and task["metric"] in LONG]
        return [n for n, task in chosen.items() if task["modality"] == modality]

    def mean(self, modality: str) -> Estimate | None:
        """The mean over these tasks. That of T tasks has the standard error sqrt(sum of s_t^2) / T."""
        parts = [estimate(self.tasks[name]) for name in self.names(modality)]
        if not parts:
            return None
        return Estimate(
            sum(one.value for one in parts) / len(parts), math.hypot(*(one.stderr for one in parts)) / len(parts)
        )


def read_run(one: RunFolder) -> ComparedRun:
    """Read a run; a broken one gets a note instead of an error."""
    run, name = Run(one.path), one.path.resolve().name
    if one.status and not (run.path / INFO).is_file():  # a cell of a sweep that has not started
        return ComparedRun(name, run, {}, values=one.values, notes=(one.status or "not started",))
    try:
        return replace(_compared_run(name, run), values=one.values)
    except UserError as error:
        return ComparedRun(name, run, {}, values=one.values, notes=("broken", str(error)))
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # JSON, but not what striate writes
        return ComparedRun(
            name, run, {}, values=one.values, notes=("broken", f"its files are not as expected: {error!r}")
        )


def _compared_run(name: str, run: Run) -> ComparedRun:
    info, results, skipped = run.info, run.results or {}, len(run.skipped())
    tasks = results.get("tasks") or {}
    notes = [str(info["status"])] if info["status"] != "finished" else []
    notes += [LAYERWISE.get(info["verb"], "not evaluated")] if not tasks else []
    notes += [f"{skipped} record{'s' * (skipped > 1)} left out, listed in {SKIPPED}"] if skipped else []
    notes += info.get("warnings", [])
    history = run.history()
    spikes = tuple((entry["step"], entry["loss"]) for entry in history if "spike" in entry)
    notes += [f"{len(spikes)} loss spike{'s' * (len(spikes) > 1)}"] if spikes else []
    name, region = str(info.get("name") or name), run.region
    predictions = Predictions.of(run.predictions())
    return ComparedRun(
        name,
        run,
        info,
        region=region,
        tasks=tasks,
        data=str(results.get("data", "")),
        predictions=predictions,
        records=predictions.fingerprint() if predictions.complete(tasks) else "",
        processor=processor(run),
        treatment=treatment(name, info, region),
        scores=_scores(run),
        reverted={kind: plot.RevertProfile.from_json(found) for kind, found in (results.get("reverted") or {}).items()},
        curve=tuple((entry["step"], entry["loss"]) for entry in history if entry.get("loss") is not None),
        spikes=spikes,
        notes=tuple(notes),
    )


def _scores(run: Run) -> Scores | None:
    saved = run.scores
    if saved is None:
        return None
    from striate.scores.table import Scores  # late: brings in torch

    return Scores.from_json(saved)


def estimate(task: Mapping[str, Any]) -> Estimate:
    """What a task of results.json measured."""
    stderr = task.get("stderr")
    return Estimate(task["value"], math.nan if stderr is None else stderr)


def difference(row: ComparedRun, other: ComparedRun) -> str:
    """Why the results of two runs cannot be compared; empty when they can.

    The records themselves decide where predictions.jsonl has all of them, else the name of the data.
    """
    if _questions(row) != _questions(other):
        return f"evaluated on other tasks or another number of records than {other.name}: not compared"
    named = f"evaluated on {row.data}, {other.name} on {other.data}: not compared"
    if not (row.records and other.records):
        return named if row.data != other.data else ""
    if row.records != other.records:
        return named if row.data != other.data else f"evaluated on other records than {other.name}: not compared"
    if row.processor and other.processor and row.processor != other.processor:
        return f"its processor prepares images or prompts differently from that of {other.name}: not compared"
    return ""


def _questions(row: ComparedRun) -> dict[str, tuple[str, int]]:
    return {name: (task["metric"], task["n"]) for name, task in row.tasks.items()}


def interval(ends: Interval, digits: int = 1) -> str:
    """The ends of an interval of shares of 1 in percent, as "95.1 to 99.8"."""
    low, high = (f"{100 * end:.{digits}f}" if math.isfinite(end) else "∞" for end in (ends.low, ends.high))
    return f"{low} to {high}"


def percent(share: Estimate | None) -> str:
    """A share of 1 as "81.2 ± 1.1"."""
    if share is None:
        return NOTHING
    error = "" if math.isnan(share.stderr) else f" ± {100 * share.stderr:.1f}"
    return f"{100 * share.value:.1f}{error}"


def count(number: float) -> str:
    """1350000 as "1.35 M"."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def finite(value: float) -> float | str:
    """A number for a CSV file, empty where there is none."""
    return value if math.isfinite(value) else ""


class RunFolder(NamedTuple):
    """A run folder, and what a sweep says about it: its status where it left no run, and its place in the grid."""

    path: Path
    status: str = ""
    values: tuple[tuple[str, str], ...] = ()


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """All runs in `folders`, each once, in their order.

    Raises:
        UserError: a folder holds no run.
    """
    runs: dict[Path, RunFolder] = {}
    for folder in map(Path, folders):
        inside = list(_inside(folder))
        if not inside:
            raise UserError(
                f"{folder} is not a run folder and has none in it: a folder with {INFO} was expected",
                see="not-a-run-folder",
            )
        for one in inside:
            runs.setdefault(one.path.resolve(), one)
    return list(runs.values())


def _inside(folder: Path) -> Iterator[RunFolder]:
    if (folder / INFO).is_file():
        yield RunFolder(folder)
        return
    listed = list(_sweep_runs(folder))
    yield from listed
    known = {one.path.resolve() for one in listed}
    below = sorted(file.parent for pattern in BELOW for file in folder.glob(pattern))
    whole = [path for path in below if not {*path.parents} & {*below}]  # not the runs inside a run
    yield from (RunFolder(path) for path in whole if path.resolve() not in known)


def _sweep_runs(folder: Path) -> Iterator[RunFolder]:
    """The runs that sweep.json lists, made or not; none if the file cannot be read."""
    try:
        cells = json.loads((folder / SWEEP).read_bytes())["cells"]
        for cell in cells:
            values = tuple((str(key), _text(value)) for key, value in dict(cell.get("values") or {}).items())
            for name in cell.get("runs") or [cell["name"]]:
                yield RunFolder(folder / str(name), str(cell.get("status") or "not started"), values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
