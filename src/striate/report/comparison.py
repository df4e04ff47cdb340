"""Runs set side by side: what each one measured, and how much of the reference's accuracy it kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from striate import plot
from striate.errors import UserError
from striate.plot import Estimate, Mark
from striate.region import Region
from striate.run import Run

if TYPE_CHECKING:
    from striate.score.table import Scores

MODALITIES, PERPLEXITY = ("visual", "text"), "perplexity"
NOTHING = "–"  # what was not measured
# Verbs that look at layers and leave no accuracy.
LAYERWISE = {"score": "layer scores only", "revert": "layers put back only"}


@dataclass(frozen=True, eq=False)
class Row:
    """One run as it is compared. What was not measured is None; accuracies are shares of 1."""

    name: str
    run: Run
    info: Mapping[str, Any]
    region: Region | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str = ""
    visual: Estimate | None = None
    text: Estimate | None = None
    kept: Estimate | None = None
    curve: tuple[tuple[float, float], ...] = ()
    scores: Scores | None = None
    reverted: Mapping[str, plot.Reverted] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def training(self, name: str) -> float | None:
        """A number from the account of the training in run.json."""
        value = (self.info.get("training") or {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The cost as text: trainable parameters, training seconds, samples per second, peak memory in GB."""
        number, seconds = self.training("trainable_parameters"), self.training("seconds")
        speed, memory = self.training("samples_per_second"), self.training("peak_memory_gb")
        return (
            NOTHING if number is None else count(number),
            NOTHING if seconds is None else f"{seconds:,.1f}" if seconds < 10 else f"{seconds:,.0f}",
            NOTHING if speed is None else f"{speed:,.1f}",
            NOTHING if memory is None else f"{memory:.2f}",
        )


@dataclass(frozen=True)
class Comparison:
    """Runs, and the one among them that the others are compared with."""

    rows: tuple[Row, ...]
    reference: Row

    @property
    def comparable(self) -> tuple[Row, ...]:
        """The runs with results on the reference's records, or on the first run's while it has no results."""
        measured = [row for row in self.rows if row.tasks]
        first = self.reference if self.reference.tasks else next(iter(measured), self.reference)
        return tuple(row for row in measured if not _difference(row, first))

    @property
    def style(self) -> dict[str, Mark]:
        """How each run is drawn."""
        return plot.marks([row.name for row in self.rows], self.reference.name)


def compare(runs: Sequence[Path], reference: Path | None = None) -> Comparison:
    """Read runs and set them against `reference`: by default the first that tuned all layers, else the first.

    Retention is the ratio r = v / v0 of the visual means of a run and of the reference. With the standard
    errors s and s0, its own is r * sqrt((s / v)^2 + (s0 / v0)^2). That takes the two as independent; on the
    same questions they rise and fall together, so it is on the cautious side. The mean of T tasks has the
    standard error sqrt(sum of s_t^2) / T. Raises `UserError` when there is no run, or a folder holds none.
    """
    paths = {Path(path).resolve(): Path(path) for path in ([*runs, reference] if reference else runs)}
    if not paths:
        raise UserError("a report needs at least one run folder")
    rows = _distinct([_read(Run.open(path)) for path in paths.values()])
    chosen = next((row for row in rows if str(row.region) == "all"), rows[0])
    if reference:
        chosen = rows[list(paths).index(Path(reference).resolve())]
    compared = tuple(_against(row, chosen) for row in rows)
    return Comparison(compared, compared[rows.index(chosen)])


def _read(run: Run) -> Row:
    """A run as far as it can be read: one that is broken gets a note, and the report goes on."""
    name = run.path.resolve().name
    try:
        return _row(name, run)
    except UserError as error:
        return Row(name, run, {}, notes=("broken", str(error)))
    except (LookupError, TypeError, AttributeError) as error:  # JSON, but not what striate writes
        return Row(name, run, {}, notes=("broken", f"its files are not as expected: {error!r}"))


def _row(name: str, run: Run) -> Row:
    info, results, skipped = run.info, run.results or {}, len(run.skipped())
    tasks = results.get("tasks") or {}
    notes = [str(info["status"])] if info["status"] != "finished" else []
    notes += [LAYERWISE.get(info["verb"], "not evaluated")] if not tasks else []
    notes += [f"{skipped} record{'s' * (skipped > 1)} left out"] if skipped else []
    return Row(
        str(info.get("name") or name),
        run,
        info,
        region=run.region,
        tasks=tasks,
        data=str(results.get("data", "")),
        visual=_mean(tasks, "visual"),
        text=_mean(tasks, "text"),
        scores=_scores(run),
        reverted={kind: plot.Reverted.from_json(found) for kind, found in (results.get("reverted") or {}).items()},
        curve=tuple((entry["step"], entry["loss"]) for entry in run.history() if entry.get("loss") is not None),
        notes=tuple(notes),
    )


def _scores(run: Run) -> Scores | None:
    saved = run.scores
    if saved is None:
        return None
    from striate.score.table import Scores  # late: brings in torch

    return Scores.from_json(saved)


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


def _difference(row: Row, other: Row) -> str:
    """Why the results of two runs cannot be compared; empty when they can."""
    if row.data != other.data:
        return f"evaluated on {row.data}, {other.name} on {other.data}: not compared"
    if _questions(row) != _questions(other):
        return f"evaluated on other tasks or another number of records than {other.name}: not compared"
    return ""


def _questions(row: Row) -> dict[str, tuple[str, int]]:
    return {name: (task["metric"], task["n"]) for name, task in row.tasks.items()}


def _against(row: Row, reference: Row) -> Row:
    """The run with its retention, or with a note why it has none."""
    if not row.tasks or not reference.tasks:
        return row
    if difference := _difference(row, reference):
        return replace(row, notes=(*row.notes, difference))
    if not row.visual or not reference.visual or not reference.visual.value:
        return row
    if row is reference:
        return replace(row, kept=Estimate(1.0))
    (value, error), (whole, whole_error) = row.visual, reference.visual
    ratio = value / whole
    # error / whole is ratio * error / value, and holds for a value of zero as well
    return replace(row, kept=Estimate(ratio, math.hypot(error / whole, ratio * whole_error / whole)))


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
