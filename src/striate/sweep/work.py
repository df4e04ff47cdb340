"""The work of one cell, in this process: tune, evaluate, prune, evaluate, from wherever it stopped before."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

from striate.errors import UserError
from striate.evaluate import evaluate
from striate.options import call_arguments
from striate.prune import prune
from striate.run import INFO, Run
from striate.sweep.cell import FAILED, FINISHED, INTERRUPTED, RUNNING, Cell
from striate.sweep.plan import Plan, Recipe
from striate.sweep.sheet import Values
from striate.train import tune
from striate.vlm import first_line


def work(plan: Plan, recipe: Recipe, *, redo: bool = False, progress: bool = False) -> None:
    """Do what is left of a cell. Waits for another process that works on it.

    Raises:
        UserError: its folders hold something else and `redo` does not replace it, or a verb refuses.
    """
    cell = recipe.cell
    cell.lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.lock):
        for folder, why in list(plan.foreign(recipe)):
            if not redo:
                raise UserError(f"{folder} holds another run: {why}; --redo replaces it")
            shutil.rmtree(folder)
        cell.update(status=RUNNING, error="", made_from=plan.made_from(recipe))
        with _noting(cell):
            tuned, *pruned = cell.runs
            _tuned(tuned, recipe.tune, progress)
            _evaluated(tuned, recipe.eval, progress)
            for folder, values in zip(pruned, recipe.prunings, strict=True):
                _pruned(tuned, folder, values, progress)
                _evaluated(folder, recipe.eval, progress)


def _free() -> None:
    """Give the memory of one verb back before the next: the Trainer leaves cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tuned(out: Path, values: Values, progress: bool) -> None:
    """Go on from the last saved state; without one, start anew.

    What the cell is made from has been compared; a change of code alone is noted in the run.
    """
    if not (out / INFO).is_file():
        shutil.rmtree(out, ignore_errors=True)
    wanted = values | {"out": out, "resume": "auto", "force": True}
    tune(**call_arguments(tune, wanted) | {"progress": progress})
    _free()


def _evaluated(run: Path, values: Values, progress: bool) -> None:
    if Run(run).results is None:
        evaluate(**call_arguments(evaluate, values | {"model": run, "out": None}) | {"progress": progress})
        _free()


def _pruned(tuned: Path, out: Path, values: Values, progress: bool) -> None:
    if not _finished(out):
        shutil.rmtree(out, ignore_errors=True)
        wanted = values | {"model": tuned, "out": out, "dry_run": False}
        prune(**call_arguments(prune, wanted) | {"progress": progress})


def _finished(run: Path) -> bool:
    return Run(run).info.get("status") == FINISHED


@contextmanager
def _noting(cell: Cell) -> Iterator[None]:
    """Note how the work inside ends."""
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
