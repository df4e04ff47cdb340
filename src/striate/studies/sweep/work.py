"""The work of one cell, in this process: tune, evaluate, prune, evaluate, resumed where it stopped before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from striate.errors import UserError, first_line
from striate.roundtrip import free_memory
from striate.runs.evaluating import evaluate
from striate.runs.options import call_arguments
from striate.runs.pruning import prune
from striate.runs.run import INFO, Run
from striate.runs.training import tune
from striate.studies.sweep.cell import FAILED, FINISHED, INTERRUPTED, RUNNING, Cell
from striate.studies.sweep.plan import Recipe, SweepPlan
from striate.studies.sweep.sheet import Values


def work(plan: SweepPlan, recipe: Recipe, *, redo: bool = False, progress: bool = False) -> None:
    """Run the unfinished steps of a cell. Waits while another process holds its lock.

    Raises:
        UserError: its folders hold another run and `redo` is off, or a verb raises it.
    """
    cell = recipe.cell
    cell.lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.lock):
        for folder, why in list(plan.foreign(recipe)):
            if not redo:
                raise UserError(f"{folder} holds another run: {why}; --redo replaces it", see="folder-in-use")
            shutil.rmtree(folder)
        cell.update(status=RUNNING, error="", made_from=plan.made_from(recipe))
        with _record_status(cell):
            tuned, *pruned = cell.runs
            _tune(tuned, recipe.tune, progress)
            _evaluate(tuned, recipe.eval, progress)
            for folder, values in zip(pruned, recipe.prunings, strict=True):
                _prune(tuned, folder, values, progress)
                _evaluate(folder, recipe.eval, progress)


def _tune(out: Path, values: Values, progress: bool) -> None:
    """Resume from the last saved state; start anew without one.

    What the cell is made from has been compared; a change of code alone is noted in the run.
    """
    if _is_finished(out):
        return
    started = (out / INFO).is_file()
    if not started:
        shutil.rmtree(out, ignore_errors=True)
    wanted = values | {"out": out, "resume": "changed" if started else False}
    tune(**call_arguments(tune, wanted) | {"progress": progress})
    free_memory()


def _evaluate(run: Path, values: Values, progress: bool) -> None:
    if Run(run).results is None:
        evaluate(**call_arguments(evaluate, values | {"model": run, "out": None}) | {"progress": progress})
        free_memory()


def _prune(tuned: Path, out: Path, values: Values, progress: bool) -> None:
    if not _is_finished(out):
        shutil.rmtree(out, ignore_errors=True)
        wanted = values | {"model": tuned, "out": out, "dry_run": False}
        prune(**call_arguments(prune, wanted) | {"progress": progress})
        free_memory()


def _is_finished(run: Path) -> bool:
    return Run(run).info.get("status") == FINISHED


@contextmanager
def _record_status(cell: Cell) -> Iterator[None]:
    """Save how the work inside ends."""
    try:
        yield
    except KeyboardInterrupt:
        cell.update(status=INTERRUPTED)
        raise
    except BaseException as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        cell.update(status=FAILED, error=f"{kind}{first_line(error)}")
        raise
    cell.update(status=FINISHED)
