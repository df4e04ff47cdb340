"""Where cells run: processes of this machine, or a Ray cluster. One cell is one process, one command;
its work is to tune, evaluate, prune and evaluate, resumed where it stopped before."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from striate.errors import UserError, first_line
from striate.roundtrip import free_memory
from striate.runs.environment import machine
from striate.runs.evaluating import evaluate
from striate.runs.options import call_arguments
from striate.runs.pruning import prune
from striate.runs.run import INFO, Run
from striate.runs.training import tune
from striate.studies.sweep.cell import FAILED, FINISHED, INTERRUPTED, RUNNING, Cell
from striate.studies.sweep.plan import Recipe, SweepPlan
from striate.studies.sweep.sheet import Values

PROGRAM = (sys.executable, "-m", "striate")  # the console script, whatever folder it is installed in
STOPPED, CRASHED = 130, -1


def arguments(file: Path, name: str, *, redo: bool) -> list[str]:
    """The arguments of `striate` that run one cell."""
    return ["sweep", str(file), "--only", name, *(["--redo"] if redo else [])]


def command(file: Path, name: str, *, redo: bool) -> str:
    """A shell command that runs one cell."""
    return shlex.join(["striate", *arguments(file, name, redo=redo)])


@dataclass
class Local:
    """Processes of this machine, `workers` at a time, each with a GPU of its own or its share of the CPU's threads."""

    file: Path
    workers: int
    redo: bool
    gpus: Sequence[str] = field(default_factory=lambda: visible_gpus())
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Whether one more cell can start."""
        return len(self.running) < self.workers

    def start(self, cell: Cell) -> None:
        """Start a cell's process, in a session of its own: a terminal's Ctrl-C is for the sweep alone."""
        slot = min(set(range(self.workers)) - {slot for _, slot in self.running.values()})
        line = [*PROGRAM, *arguments(self.file, cell.name, redo=self.redo)]
        with _log(cell).open("ab") as log:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(slot),
                start_new_session=True,
            )  # fmt: skip
        self.running[cell.name] = process, slot

    def poll(self) -> Iterator[tuple[str, int]]:
        """Cells whose processes have ended."""
        for name, (process, _) in list(self.running.items()):
            if (status := process.poll()) is not None:
                del self.running[name]
                yield name, status

    def interrupt(self) -> None:
        """Interrupt every process, so that it saves and stops."""
        for process, _ in self.running.values():
            process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Stop every process at once."""
        for process, _ in self.running.values():
            process.kill()

    def _environment(self, slot: int) -> dict[str, str]:
        if self.gpus:
            return {**os.environ, "CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}
        return {"OMP_NUM_THREADS": str(max(1, machine()["cores"] // self.workers)), **os.environ}


def visible_gpus() -> list[str]:
    """The CUDA_VISIBLE_DEVICES values that select one GPU each."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        seen = takewhile(lambda name: name.strip() != "-1", named.split(","))  # CUDA ignores the rest
        return [name for name in seen if name.strip()] if torch.cuda.is_available() else []
    return [str(index) for index in range(torch.cuda.device_count())]


class CrashError(RuntimeError):
    """A cell's process was killed by a signal and may be retried."""


@dataclass
class Ray:
    """Tasks of a Ray cluster, whose machines see the same files under the same names."""

    file: Path
    workers: int | None
    redo: bool
    ray: Any
    task: Any
    running: dict[Any, str] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Whether one more cell can be submitted; Ray queues the cells that have to wait."""
        return self.workers is None or len(self.running) < self.workers

    def start(self, cell: Cell) -> None:
        """Submit a cell to Ray."""
        _log(cell)
        line = arguments(self.file, cell.name, redo=self.redo)
        self.running[self.task.remote(line, str(cell.log.absolute()), os.getcwd())] = cell.name

    def poll(self) -> Iterator[tuple[str, int]]:
        """Cells whose tasks have ended, after all retries."""
        if not self.running:
            return
        done, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        for task in done:
            yield self.running.pop(task), self._status(task)

    def interrupt(self) -> None:
        """Interrupt every process, so that it saves and stops."""
        for task in self.running:
            self.ray.cancel(task)

    def kill(self) -> None:
        """Stop every process at once."""
        for task in self.running:
            self.ray.cancel(task, force=True)

    def _status(self, task: Any) -> int:
        try:
            return self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            return STOPPED
        except self.ray.exceptions.RayError:
            return CRASHED


Executor = Local | Ray
"""Runs cells; `poll` yields the names of cells that have ended, with their exit status."""


@contextmanager
def executor_of(file: Path, *, ray: bool, workers: int | None, redo: bool) -> Iterator[Executor]:
    """The executor of a sweep file: a Ray cluster, or else this machine.

    Raises:
        UserError: Ray does not answer.
    """
    if not ray:
        yield Local(file, workers or max(1, len(visible_gpus())), redo)
        return
    cluster = _connect()
    gpus = min(1.0, cluster.cluster_resources().get("GPU", 0.0))
    task = cluster.remote(retry_exceptions=[CrashError], max_retries=1, num_cpus=1, num_gpus=gpus)(_process)
    try:
        yield Ray(file, workers, redo, cluster, task)
    finally:
        cluster.shutdown()


def _connect() -> Any:
    """Ray, connected to the cluster at RAY_ADDRESS, or to a new one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    import ray

    address = os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {first_line(error)}") from None
    return ray


def _process(line: list[str], log: str, folder: str) -> int:
    """One cell in a process of its own, on whatever machine this is; passes Ctrl-C on and waits for its end."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*PROGRAM, *line], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            status = process.wait()
    if status < 0:
        raise CrashError(f"ended by signal {-status}")
    return status


def _log(cell: Cell) -> Path:
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    return cell.log


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
                if not _is_finished(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    wanted = values | {"model": tuned, "out": folder, "dry_run": False}
                    prune(**call_arguments(prune, wanted) | {"progress": progress})
                    free_memory()
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
