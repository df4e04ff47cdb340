"""Runs set side by side: what each one measured, and how much of the reference's accuracy it kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate, Mark
from striate.region import Region
from striate.report.arms import Arm, arms, treatment
from striate.report.folders import Found, found
from striate.report.pairing import PERPLEXITY, Answers, Kept, paired, processor, unpaired
from striate.report.unlike import unlike
from striate.run import INFO, Run

if TYPE_CHECKING:
    from striate.evaluate.statistics import Interval
    from striate.score.table import Scores

MODALITIES = ("visual", "text")
NOTHING = "–"  # what was not measured
# Verbs that look at layers and leave no accuracy.
LAYERWISE = {"score": "layer scores only", "revert": "layers put back only"}


@dataclass(frozen=True, eq=False)
class Row:
    """One run as it is compared. What was not measured is None; accuracies are shares of 1.

    `records` is the same for runs that were asked the same questions; `treatment` for runs that differ only in the
    seed. `reference` is the name of the run that `kept` is about. `values` is the place in the grid of a sweep.
    """

    name: str
    run: Run
    info: Mapping[str, Any]
    region: Region | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str = ""
    answers: Answers = field(default_factory=lambda: Answers({}))
    records: str = ""
    processor: str = ""
    treatment: str = ""
    visual: Estimate | None = None
    text: Estimate | None = None
    kept: Kept | None = None
    reference: str = ""
    values: tuple[tuple[str, str], ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    spikes: tuple[tuple[float, float], ...] = ()
    scores: Scores | None = None
    reverted: Mapping[str, plot.Reverted] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def training(self, name: str) -> float | None:
        """A number from the account of the training in run.json."""
        value = (self.info.get("training") or {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def pruned(self) -> Mapping[str, Any]:
        """What a pruning did, as run.json has it; empty for other runs."""
        return self.info.get("prune") or {}

    def names(self, modality: str) -> list[str]:
        """The tasks of a modality that have an accuracy."""
        return [n for n, task in self.tasks.items() if task["modality"] == modality and task["metric"] != PERPLEXITY]


@dataclass(frozen=True)
class Comparison:
    """Runs, and the one among them that the others are compared with."""

    rows: tuple[Row, ...]
    reference: Row

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The runs, those that differ only in the seed put together."""
        return arms(self.rows)

    @property
    def whole(self) -> Arm:
        """The arm of the reference."""
        return next(arm for arm in self.arms if self.reference in arm.rows)

    @cached_property
    def comparable(self) -> tuple[Row, ...]:
        """The runs with results that are set against the reference, or against its twin of another seed.

        While the reference has no results: those on the first run's records.
        """
        measured = [row for row in self.rows if row.tasks]
        if self.reference.tasks:
            names = {row.name for row in self.whole.rows}
            return tuple(row for row in measured if row.reference in names)
        first = next(iter(measured), self.reference)
        return tuple(row for row in measured if not difference(row, first))

    @property
    def comparable_arms(self) -> tuple[Arm, ...]:
        """The arms of which every run with results is comparable."""
        return tuple(arm for arm in self.arms if arm.measured and set(arm.measured) <= {*self.comparable})

    @cached_property
    def style(self) -> dict[str, Mark]:
        """How each arm is drawn; the runs of an arm are drawn alike."""
        return plot.marks([arm.name for arm in self.arms], self.whole.name)


def compare(runs: Sequence[Path], reference: Path | None = None) -> Comparison:
    """Read runs, and folders of runs, and set them against `reference`.

    By default that is the first that tuned all layers, else the first. A run of another seed, or on other records, is
    set against the run that differs from the reference in that alone, where there is one. Retention is that of the
    mean over visual tasks; see `Kept`. The mean of T tasks has the standard error sqrt(sum of s_t^2) / T.
    Raises `UserError` when there is no run, or a folder holds none.
    """
    if not runs:
        raise UserError("a report needs at least one run folder")
    listed = found([*runs, *([reference] if reference else [])])
    rows = _distinct([_read(one) for one in listed])
    chosen = next((row for row in rows if str(row.region) == "all" and not row.pruned), rows[0])
    if reference:
        place = Path(reference).resolve()
        chosen = next((row for row in rows if row.run.path.resolve() == place), None) or _refuse(reference)
    compared = tuple(_against(row, _counterpart(row, chosen, rows)) for row in rows)
    return Comparison(compared, compared[rows.index(chosen)])


def _refuse(reference: Path) -> Row:
    raise UserError(f"{reference} is a folder of runs: name one run as the reference")


def _read(one: Found) -> Row:
    """A run as far as it can be read: one that is broken gets a note, and the report goes on."""
    run, name = Run(one.path), one.path.resolve().name
    if one.status and not (run.path / INFO).is_file():  # a sweep has not come to it
        return Row(name, run, {}, values=one.values, notes=(one.status or "not started",))
    try:
        return replace(_row(name, run), values=one.values)
    except UserError as error:
        return Row(name, run, {}, values=one.values, notes=("broken", str(error)))
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # JSON, but not what striate writes
        return Row(name, run, {}, values=one.values, notes=("broken", f"its files are not as expected: {error!r}"))


def _row(name: str, run: Run) -> Row:
    info, results, skipped = run.info, run.results or {}, len(run.skipped())
    tasks = results.get("tasks") or {}
    notes = [str(info["status"])] if info["status"] != "finished" else []
    notes += [LAYERWISE.get(info["verb"], "not evaluated")] if not tasks else []
    notes += [f"{skipped} record{'s' * (skipped > 1)} left out"] if skipped else []
    notes += info.get("warnings", [])
    history = run.history()
    spikes = tuple((entry["step"], entry["loss"]) for entry in history if "spike" in entry)
    notes += [f"{len(spikes)} loss spike{'s' * (len(spikes) > 1)}"] if spikes else []
    name, region = str(info.get("name") or name), run.region
    answers = Answers.of(run.predictions())
    return Row(
        name,
        run,
        info,
        region=region,
        tasks=tasks,
        data=str(results.get("data", "")),
        answers=answers,
        records=answers.fingerprint() if answers.complete(tasks) else "",
        processor=processor(run),
        treatment=treatment(name, info, region),
        visual=_mean(tasks, "visual"),
        text=_mean(tasks, "text"),
        scores=_scores(run),
        reverted={kind: plot.Reverted.from_json(found) for kind, found in (results.get("reverted") or {}).items()},
        curve=tuple((entry["step"], entry["loss"]) for entry in history if entry.get("loss") is not None),
        spikes=spikes,
        notes=tuple(notes),
    )


def _scores(run: Run) -> Scores | None:
    saved = run.scores
    if saved is None:
        return None
    from striate.score.table import Scores  # late: brings in torch

    return Scores.from_json(saved)


def visual(row: Row) -> Estimate | None:
    """The mean over visual tasks."""
    return row.visual


def text(row: Row) -> Estimate | None:
    """The mean over text tasks."""
    return row.text


def share(row: Row) -> float | None:
    """What a run keeps of its reference's visual accuracy, 1 for all."""
    if row.visual and row.reference == row.name:
        return 1.0
    return row.kept.share.value if row.kept else None


def of_task(name: str) -> Callable[[Row], Estimate | None]:
    """A function that tells what a run measured in a task."""
    return lambda row: estimate(row.tasks[name]) if name in row.tasks else None


def of_training(name: str) -> Callable[[Row], float | None]:
    """A function that tells a number from the account of a run's training."""
    return lambda row: row.training(name)


def estimate(task: Mapping[str, Any]) -> Estimate:
    """What a task of results.json measured."""
    stderr = task.get("stderr")
    return Estimate(task["value"], math.nan if stderr is None else stderr)


def _mean(tasks: Mapping[str, Mapping[str, Any]], modality: str) -> Estimate | None:
    parts = [estimate(t) for t in tasks.values() if t["modality"] == modality and t["metric"] != PERPLEXITY]
    if not parts:
        return None
    values, errors = zip(*parts, strict=True)
    return Estimate(sum(values) / len(parts), math.hypot(*errors) / len(parts))


def _distinct(rows: list[Row]) -> list[Row]:
    """Tell runs of the same name apart: by the folder they are in, or else by a number."""
    for name in ("{0.run.path.parent.name}/{0.name}", "{0.name} ({1})"):
        names = [row.name for row in rows]
        rows = [
            replace(row, name=name.format(row, number)) if names.count(row.name) > 1 else row
            for number, row in enumerate(rows, start=1)
        ]
    return rows


def difference(row: Row, other: Row) -> str:
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
        return f"its processor prepares pictures or prompts in another way than that of {other.name}: not compared"
    return ""


def _questions(row: Row) -> dict[str, tuple[str, int]]:
    return {name: (task["metric"], task["n"]) for name, task in row.tasks.items()}


def _counterpart(row: Row, reference: Row, rows: Sequence[Row]) -> Row:
    """What the run is set against: the reference of its own seed, else the reference, else one on its records.

    A seed decides on the order of the data and more, and runs that share it differ less by chance.
    """
    if not row.tasks or not reference.tasks:
        return reference
    twins = [other for other in rows if other.tasks and other.treatment == reference.treatment]
    twins.sort(key=lambda twin: (_seed(twin) != _seed(row), twin is not reference))
    return next((twin for twin in twins if not difference(row, twin)), reference)


def _seed(row: Row) -> Any:
    return row.info.get("seed")


def _against(row: Row, reference: Row) -> Row:
    """The run with its retention, or with a note why it has none, and with notes on what else is not the same."""
    if row is not reference:
        row = replace(row, notes=(*row.notes, *unlike(row.info, reference.info, reference.name)))
    if not row.tasks or not reference.tasks:
        return row
    if why := difference(row, reference):
        return replace(row, notes=(*row.notes, why))
    if row is reference:
        return replace(row, reference=row.name)
    return replace(row, reference=reference.name, kept=_kept(row, reference))


def _kept(row: Row, reference: Row) -> Kept | None:
    tasks = row.names("visual")
    if row.visual is None or reference.visual is None:
        return None
    if row.records and row.records == reference.records:
        return paired(row.answers.scores(tasks), reference.answers.scores(tasks))
    return unpaired(row.visual, reference.visual)


def interval(found: Interval, digits: int = 1) -> str:
    """The ends of an interval of shares of 1 in percent, as "95.1 to 99.8"."""
    low, high = (f"{100 * end:.{digits}f}" if math.isfinite(end) else "∞" for end in (found.low, found.high))
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
