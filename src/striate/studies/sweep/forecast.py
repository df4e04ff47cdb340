"""Predicted time and memory of the cells of a sweep, from finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from striate.runs.run import Run
from striate.studies.sweep.cell import FINISHED
from striate.studies.sweep.display import Forecast, ForecastRow
from striate.studies.sweep.plan import Recipe, SweepPlan, num_steps


def forecast(plan: SweepPlan, records: int) -> Forecast:
    """The cells, what they train, and the time and memory of the unfinished ones; `records` is the size of the data."""
    finished = [recipe for recipe in plan.recipes if plan.finished(recipe)]
    rows = []
    for recipe in plan.recipes:
        done = recipe in finished
        status = FINISHED if done else recipe.cell.refresh().status
        row = ForecastRow(recipe.cell.name, status, recipe.layers, recipe.trainable)
        if not done:
            row = row._replace(seconds=predict(recipe, finished, records), memory=_measured_memory(recipe, finished))
        rows.append(row)
    return Forecast(tuple(rows))


def _measured_memory(recipe: Recipe, finished: Sequence[Recipe]) -> float | None:
    """Mean peak bytes of finished cells of the same region."""
    alike = [Run(other.cell.runs[0]).info["training"] for other in finished if other.region == recipe.region]
    return 1e9 * fmean(training["peak_memory_gb"] for training in alike) if alike else None


def predict(recipe: Recipe, finished: Sequence[Recipe], records: int) -> float | None:
    """Predicted seconds of a cell: mean training time per record and mean time of everything else of finished cells.

    Cells of the same region count alone where there are any. None when no cell has finished. Loading the model is
    not counted.
    """
    alike = [other for other in finished if other.region == recipe.region] or finished
    steps = num_steps(recipe, records)
    if not alike:
        return None
    return fmean(map(_seconds_per_record, alike)) * steps * recipe.tune["batch"] + fmean(map(_other_seconds, alike))


def _seconds_per_record(recipe: Recipe) -> float:
    training = Run(recipe.cell.runs[0]).info["training"]
    return training["seconds"] / max(1, training["samples"])


def _other_seconds(recipe: Recipe) -> float:
    """Seconds of evaluation and pruning."""
    runs = [Run(folder) for folder in recipe.cell.runs]
    return sum((run.results or {}).get("seconds", 0.0) for run in runs) + sum(run.info["seconds"] for run in runs[1:])
