"""What the demo shows while models are tuned side by side, each in a process of its own: a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from striate.console import console
from striate.runs.run import Run
from striate.studies.sweep.cell import last_step

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total} steps{task.fields[loss]}"),
    TimeRemainingColumn(),
)


class Bars:
    """Shows the steps, the loss and the time left of runs that train; one line for good when a run has trained."""

    def __init__(self, runs: Sequence[Path], steps: int, *, on: bool) -> None:
        self.shown = Progress(*COLUMNS, console=console(), transient=True, disable=not on)
        self.tasks = {path: self.shown.add_task(path.name, start=False, total=steps, loss="") for path in runs}

    def __enter__(self) -> Bars:
        self.shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shown.stop()

    def show(self) -> None:
        """Bring what is shown up to date."""
        for path, task in list(self.tasks.items()):
            training = Run(path).info.get("training") if path.is_dir() else None
            if training is not None:
                self._finish(path, training)
            elif step := last_step(path):
                self.shown.start_task(task)
                self.shown.update(task, completed=step["step"], loss=f"  loss {step['loss']:.2f}")

    def _finish(self, path: Path, training: dict[str, float]) -> None:
        self.shown.remove_task(self.tasks.pop(path))
        if not self.shown.disable:
            self.shown.console.print(
                f"{path.name:8} {training['seconds']:6.1f} s  {training['peak_memory_gb']:5.2f} GB  "
                f"{training['trainable_parameters']:,} parameters trained, loss {last_step(path)['loss']:.2f}"
            )
