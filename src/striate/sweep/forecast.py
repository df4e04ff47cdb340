"""How long the cells of a sweep will take, by those that have finished."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from striate.run import Run
from striate.sweep.cell import FINISHED
from striate.sweep.display import Forecast
from striate.sweep.plan import Plan, Recipe, num_steps


def forecast(plan: Plan, records: int) -> Forecast:
    """The cells, what they train, and how long those take that are still to be done.

    `records` are there to train on.
    """
    finished = [recipe for recipe in plan.recipes if plan.finished(recipe)]
    rows = []
    for recipe in plan.recipes:
        done = recipe in finished
        seconds = None if done else predicted(recipe, finished, records)
        status = FINISHED if done else recipe.cell.as_it_is().status
        rows.append((recipe.cell.name, status, str(recipe.region), recipe.trainable, seconds))
    return Forecast(tuple(rows))


def predicted(recipe: Recipe, finished: Sequence[Recipe], records: int) -> float | None:
    """Seconds that a cell takes: training by the record, all else as a whole, as finished cells took them on average.

    Cells of the same region count alone where there are any. None when no cell has finished, or the number of steps
    is not known. Loading the model is not in it.
    """
    alike = [other for other in finished if other.region == recipe.region] or finished
    steps = num_steps(recipe, records)
    if not alike or steps is None:
        return None
    return fmean(map(_seconds_a_record, alike)) * steps * recipe.tune["batch"] + fmean(map(_other_seconds, alike))


def _seconds_a_record(recipe: Recipe) -> float:
    training = Run(recipe.cell.runs[0]).info["training"]
    return training["seconds"] / max(1, training["samples"])


def _other_seconds(recipe: Recipe) -> float:
    """Of evaluating and pruning."""
    runs = [Run(folder) for folder in recipe.cell.runs]
    return sum((run.results or {}).get("seconds", 0.0) for run in runs) + sum(run.info["seconds"] for run in runs[1:])
