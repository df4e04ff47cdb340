"""A grid of runs, tuned, evaluated and pruned cell by cell; finished cells are skipped."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from striate.errors import at_least, need
from striate.studies.sweep.cell import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    NOT_STARTED,
    RUNNING,
    Cell,
    cells,
    last_line,
    write_plan,
)
from striate.studies.sweep.display import Forecast, Outcome, Watch

if TYPE_CHECKING:
    from striate.studies.sweep.executor import Executor
    from striate.studies.sweep.plan import Recipe, SweepPlan

__all__ = ["Cell", "Forecast", "Outcome", "cells", "sweep"]

PAUSE = 0.3  # seconds between polls of running cells


def sweep(
    file: Path,
    *,
    executor: Literal["local", "ray", "print"] = "local",
    workers: int | None = None,
    only: str | None = None,
    redo: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> Outcome:
    """Tune, evaluate and prune a model once for every cell of a grid; finished cells are skipped.

    A cell is one process. A finished one is recognized by the files of its model, its data, all its options and
    the version of striate (not the content of images). The same command continues interrupted cells.

    Args:
        file: the sweep, in YAML: model, data, images, out, eval (options of eval), tune (options of tune), prune
            (options of prune: the tuned model is pruned, and that evaluated too), and grid, the options of tune that
            vary, such as {region: [all, "uniform:25%"], seed: [0, 1]}, or of prune (prune.remove). Paths start from the
            current folder.
        executor: local, processes of this machine; ray, a Ray cluster whose machines see the same files (RAY_ADDRESS;
            default: one on this machine), with a CPU core and, where there are any, a GPU for each cell; print, nothing
            but one command per unfinished cell, for a shell or a scheduler.
        workers: cells at a time; default: one for each GPU, else one; with Ray as many as it has room for.
        only: do this one cell, in this process.
        redo: replace runs that were made from other data, options or models.
        dry_run: show the plan; times and memory are from cells that have finished (`striate cost` predicts the
            first).
        progress: show the cells while they run.

    Returns:
        The cells as they ended; with `dry_run` or `executor="print"` as they are, and the forecast or the commands.

    Raises:
        UserError: the file is invalid, or a folder holds another run; nothing has run then.
        KeyboardInterrupt: stopped; the same command continues.
    """
    # Late: these import torch, which `cells` does not need.
    from striate.studies.sweep.executor import command, executor_of
    from striate.studies.sweep.plan import forecast, num_records, num_steps, read_plan

    at_least(1, workers=workers)
    if executor == "ray":
        need("ray", "--executor ray", extra="ray")
    plan = read_plan(file, workers=workers or 1)
    if only is not None:
        return Outcome(file, (_run_one(plan, plan.recipe(only), redo, progress),))
    plan.check_folders(redo=redo)
    waiting = [recipe.cell for recipe in plan.recipes if not plan.finished(recipe)]
    if executor == "print":
        write_plan(plan.sheet.out, plan.about, plan.cells)
        return Outcome(file, plan.cells, commands=tuple(command(file, cell.name, redo=redo) for cell in waiting))
    records = num_records(plan)
    if dry_run:
        return Outcome(file, plan.cells, forecast(plan, records))
    steps = {recipe.cell.name: num_steps(recipe, records) for recipe in plan.recipes}
    with executor_of(file, ray=executor == "ray", workers=workers, redo=redo) as chosen:
        write_plan(plan.sheet.out, plan.about, plan.cells)
        with Watch(plan.cells, steps, on=progress) as watch:
            _run_all(plan, waiting, chosen, watch)
    return Outcome(file, tuple(cell.refresh() for cell in plan.cells))


def _run_one(plan: SweepPlan, recipe: Recipe, redo: bool, progress: bool) -> Cell:
    """Do one cell in this process."""
    from striate.studies.sweep.executor import work

    try:
        work(plan, recipe, redo=redo, progress=progress)
    finally:
        write_plan(plan.sheet.out, plan.about, plan.cells)
    return recipe.cell.refresh()


def _run_all(plan: SweepPlan, cells: Sequence[Cell], executor: Executor, watch: Watch) -> None:
    """Keep the executor busy until all cells have ended; Ctrl-C stops them orderly, a second one at once."""
    waiting, running = deque(cells), dict[str, Cell]()
    try:
        while waiting or running:
            while waiting and executor.has_room:
                cell = waiting.popleft()
                running[cell.name] = cell
                cell.update(status=NOT_STARTED, error="")  # whatever its status was
                executor.start(cell)
            _poll(plan, running, executor, watch)
    except KeyboardInterrupt:
        _stop(plan, running, executor, watch)
        done = sum(cell.refresh().status == FINISHED for cell in plan.cells)
        again = shlex.join(["striate", "sweep", str(plan.sheet.file)])
        raise KeyboardInterrupt(
            f"stopped with {done} of {len(plan.cells)} cells finished; go on with: {again}"
        ) from None


def _poll(plan: SweepPlan, running: dict[str, Cell], executor: Executor, watch: Watch) -> None:
    """See which cells have ended, note what happened to them, and wait a little."""
    ended = list(executor.poll())
    for name, status in ended:
        cell = running.pop(name)
        if status and cell.note.status in (NOT_STARTED, RUNNING):  # it crashed, or never started its work
            line = last_line(cell.log)
            cell.update(status=FAILED, error=f"its process ended with status {status}{': ' * bool(line)}{line}")
    if ended:
        write_plan(plan.sheet.out, plan.about, plan.cells)
    watch.show()
    if running:
        time.sleep(PAUSE)


def _stop(plan: SweepPlan, running: dict[str, Cell], executor: Executor, watch: Watch) -> None:
    """Let every cell save what it has; its process decides when it is done."""
    watch.print("stopping: every cell finishes its step and saves; Ctrl-C again stops at once")
    stopped = list(running.values())
    try:
        executor.interrupt()
        while running:
            for name, _ in list(executor.poll()):
                running.pop(name)
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        executor.kill()
    for cell in stopped:
        if cell.note.status == RUNNING:
            cell.update(status=INTERRUPTED)
    write_plan(plan.sheet.out, plan.about, plan.cells)
