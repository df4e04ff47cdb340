"""The log of a training, written into its run folder and shown on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from striate.console import console
from striate.data import Skipped
from striate.errors import UserError
from striate.runs.run import Run
from striate.train.watch import Log


class RunLog(Log):
    """Writes one line per step into the run; with `bar`, shows a progress bar, and the notes above it."""

    def __init__(self, run: Run, *, bar: bool, report_to: str = "none") -> None:
        super().__init__()
        self.run, self.report_to = run, report_to
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console(), transient=True, disable=not bar)
        self.task = self.bar.add_task("", start=False)
        self.tracker: Any = None

    def begin(self, done: int, total: int, notes: Sequence[str]) -> None:
        """Show the bar, and load the history of a resumed run."""
        self.history = [entry for entry in self.run.history() if entry["step"] <= done]
        for one in self.run.skipped() if done else ():
            self.skipped[one["source"]] = Skipped(**one, too_long="--max-length" in one["reason"])
        self.tracker = _tracker(self.report_to, self.run)
        self.bar.start()
        for note in notes if not self.bar.disable else ():
            self.bar.console.print(note, style="dim")
        self.bar.start_task(self.task)
        self.bar.update(self.task, total=total, completed=done, description=escape(self.run.path.name))

    def step(self, entry: dict[str, Any]) -> None:
        """Write the step's line, move the bar, feed the trackers."""
        super().step(entry)
        self.run.log(entry)
        loss = entry["loss"]
        if self.tracker and loss is not None:
            self.tracker.log({name: entry[name] for name in ("loss", "lr", "grad_norm")}, step=entry["step"])
        text = "no answers" if loss is None else f"loss {loss:.3f}"
        self.bar.update(self.task, completed=entry["step"], description=text)

    def skip(self, record: Skipped) -> None:
        """List the record in skipped.jsonl."""
        if record.source not in self.skipped:
            self.run.skip({"source": record.source, "reason": record.reason})
        super().skip(record)

    def warn(self, text: str) -> None:
        """Add the warning to the run, and show it above the bar."""
        super().warn(text)
        if not self.bar.disable:
            self.bar.console.print(f"warning: {text}", style="yellow")
        with suppress(UserError):  # the warning may be about a full disk
            self.run.warn(text)

    def end(self) -> None:
        """Remove the bar."""
        self.bar.stop()
        if self.tracker:
            self.tracker.end_training()
            self.tracker = None


def _tracker(report_to: str, run: Run) -> Any:
    """An `Accelerator` with the trackers of that name (tensorboard, wandb, ...); None for "none"."""
    if report_to == "none":
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=report_to, project_dir=str(run.path))
    accelerator.init_trackers(run.path.name)
    return accelerator
