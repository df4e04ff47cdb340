"""A grid of choices, tuned, evaluated and pruned cell by cell; what is finished is never done again."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from striate.errors import UserError
from striate.sweep.cell import FAILED, FINISHED, INTERRUPTED, NOT_STARTED, RUNNING, Cell, cells, last_line, write_plan
from striate.sweep.display import Forecast, Outcome, Watch

if TYPE_CHECKING:
    from striate.sweep.executor import Executor
    from striate.sweep.plan import Plan, Recipe

__all__ = ["Cell", "Forecast", "Outcome", "cells", "sweep"]

PAUSE = 0.3  # seconds between looks at what runs


def sweep(
    file: Path,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    ray_cpus: float = 1.0,
    ray_gpus: float | None = None,
    ray_retries: int = 1,
    only: str | None = None,
    redo: bool = False,
    dry_run: bool = False,
    print_commands: bool = False,
    progress: bool = False,
) -> Outcome | Forecast | list[str]:
    """Tune, evaluate and prune a model once for every cell of a grid; finished cells are skipped.

    A cell is one process. A finished one is known by the content of what made it: the files of the model, the data, all
    options, the version of striate (pictures are not looked into). The same command goes on with what was interrupted.

    Args:
        file: the sweep, in YAML: model, data, images, out, eval (options of eval), tune (options of tune), prune
            (options of prune: the tuned model is pruned, and that evaluated too), and grid, the options of tune that
            vary, such as {region: [all, "uniform:25%"], seed: [0, 1]}, or of prune (prune.remove). Paths start from the
            current folder.
        executor: local, processes of this machine; or ray, a Ray cluster whose machines see the same files.
        workers: cells at a time; default: one for each GPU, else one; with Ray as many as it has room for.
        ray_address: a Ray cluster that runs; default: one of this machine, for this sweep.
        ray_cpus: CPU cores of a cell.
        ray_gpus: GPUs of a cell; default: 1 where the cluster has any.
        ray_retries: new tries of a cell whose process or machine broke down.
        only: do this one cell, in this process.
        redo: replace runs that were made from something else.
        dry_run: show the plan; the times are from cells that have finished.
        print_commands: print a line for each unfinished cell, for a shell or a scheduler.
        progress: show the cells while they run.

    Returns:
        The cells as they ended; with `dry_run` the plan; with `print_commands` the lines.

    Raises:
        UserError: something in the file is wrong, or a folder holds something else; names it. Nothing has run then.
        KeyboardInterrupt: stopped; what is half done can be gone on with.
    """
    # These bring in torch, which nobody needs who only asks for `cells`.
    from striate.sweep.executor import Resources, command, executor_of
    from striate.sweep.forecast import forecast
    from striate.sweep.plan import num_records, num_steps, read_plan

    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least one was expected")
    resources = Resources(ray_address, ray_cpus, ray_gpus, ray_retries)
    if executor == "local" and resources != Resources():
        raise UserError("--ray-address, --ray-cpus, --ray-gpus and --ray-retries are for --executor ray")
    plan = read_plan(file, workers=workers or 1)
    if only is not None:
        return Outcome(file, (_one(plan, plan.recipe(only), redo, progress),))
    plan.check_folders(redo=redo)
    waiting = [recipe.cell for recipe in plan.recipes if not plan.finished(recipe)]
    if print_commands:
        write_plan(plan.sheet.out, plan.about, plan.cells)
        return [command(file, cell.name, redo=redo) for cell in waiting]
    records = num_records(plan)
    if dry_run:
        return forecast(plan, records)
    steps = {recipe.cell.name: num_steps(recipe, records) for recipe in plan.recipes}
    on_ray = resources if executor == "ray" else None
    with executor_of(file, on_ray, workers=workers, redo=redo) as chosen:
        write_plan(plan.sheet.out, plan.about, plan.cells)
        with Watch(plan.cells, steps, on=progress) as watch:
            _carry_out(plan, waiting, chosen, watch)
    return Outcome(file, tuple(cell.as_it_is() for cell in plan.cells))


def _one(plan: Plan, recipe: Recipe, redo: bool, progress: bool) -> Cell:
    """Do one cell in this process."""
    from striate.sweep.work import work

    try:
        work(plan, recipe, redo=redo, progress=progress)
    finally:
        write_plan(plan.sheet.out, plan.about, plan.cells)
    return recipe.cell.as_it_is()


def _carry_out(plan: Plan, cells: Sequence[Cell], executor: Executor, watch: Watch) -> None:
    """Keep the executor busy until all cells have ended; Ctrl-C stops them orderly, a second one at once."""
    waiting, running = deque(cells), dict[str, Cell]()
    try:
        while waiting or running:
            while waiting and executor.has_room:
                cell = waiting.popleft()
                running[cell.name] = cell
                cell.update(status=NOT_STARTED, error="")  # whatever became of it before
                executor.start(cell)
            _look(plan, running, executor, watch)
    except KeyboardInterrupt:
        _stop(plan, running, executor, watch)
        done = sum(cell.as_it_is().status == FINISHED for cell in plan.cells)
        again = shlex.join(["striate", "sweep", str(plan.sheet.file)])
        raise KeyboardInterrupt(
            f"stopped with {done} of {len(plan.cells)} cells finished; go on with: {again}"
        ) from None


def _look(plan: Plan, running: dict[str, Cell], executor: Executor, watch: Watch) -> None:
    """See which cells have ended, note what happened to them, and wait a little."""
    ended = list(executor.ended())
    for name, status in ended:
        _note_end(running.pop(name), status)
    if ended:
        write_plan(plan.sheet.out, plan.about, plan.cells)
    watch.show()
    if running:
        time.sleep(PAUSE)


def _note_end(cell: Cell, status: int) -> None:
    """What its process could not note itself: that it broke down, or never came to start its work."""
    if status and cell.note.status in (NOT_STARTED, RUNNING):
        said = last_line(cell.log)
        cell.update(status=FAILED, error=f"its process ended with status {status}{': ' * bool(said)}{said}")


def _stop(plan: Plan, running: dict[str, Cell], executor: Executor, watch: Watch) -> None:
    """Let every cell save what it has; its process decides when it is done."""
    watch.say("stopping: every cell finishes its step and saves; Ctrl-C again stops at once")
    stopped = list(running.values())
    try:
        executor.interrupt()
        while running:
            for name, _ in list(executor.ended()):
                running.pop(name)
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        executor.kill()
    for cell in stopped:
        if cell.note.status == RUNNING:
            cell.update(status=INTERRUPTED)
    write_plan(plan.sheet.out, plan.about, plan.cells)
