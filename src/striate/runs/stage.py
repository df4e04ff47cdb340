"""A training stage as a run: started, or resumed if nothing has changed that its result depends on; and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from striate.console import console
from striate.data import Skipped
from striate.distributed import Rank
from striate.errors import UserError
from striate.runs.environment import versions
from striate.runs.provenance import code, content_of, differences
from striate.runs.run import INFO, Run
from striate.train.options import TrainOptions, check_launch
from striate.train.watch import Log

Resume = bool | Literal["auto", "changed"]
IRRELEVANT = ("save_steps", "workers", "report_to", "skip_nonfinite")  # options that no trained weight depends on
PATHS = {"model": None, "data": "train"}  # arguments that name files, with the split that is read


@dataclass(frozen=True)
class Stage:
    """A stage: its verb, its run folder, the arguments of the verb by name, the training options."""

    verb: str
    out: Path
    arguments: Mapping[str, Any]
    options: TrainOptions
    rank: Rank

    def previous(self, resume: Resume) -> Run | None:
        """The run to resume, None to start a new one; with "auto", the run in the folder if there is one.

        A finished run is returned with "auto" only: then there is nothing to do.

        Raises:
            UserError: there is nothing to resume; something has changed, without "changed"; an option is not supported
                here.
        """
        check_launch(self.options, self.rank)
        run = self._previous(resume) if self.rank.first else None
        return self.rank.gather(run)[0]  # the first process looks before it writes anything

    def _previous(self, resume: Resume) -> Run | None:
        if not resume or (resume == "auto" and not (Path(self.out) / INFO).is_file()):
            Run.check_free(self.out)
            return None
        run = Run.open(self.out)
        finished = run.info["status"] == "finished"
        if finished and resume != "auto":
            raise UserError(f"{self.out} is finished: there is nothing to resume", see="folder-in-use")
        self.check_same(run, _inputs(run.info), _inputs(self._description), resume)
        return run

    def check_same(self, run: Run, before: Mapping[str, Any], now: Mapping[str, Any], resume: Resume) -> None:
        """Compare what the result of a resumed run depends on, by name, with what it was before.

        Raises:
            UserError: something has changed, without "changed"; with it, each change becomes a warning of the run.
        """
        changed = list(differences(before, now))
        if changed and resume != "changed":
            raise UserError(
                f"{self.out} cannot be resumed with the same result: {'; '.join(changed)} (--resume changed does)",
                see="resume-refused",
            )
        for change in changed:
            run.warn(f"resumed although {change}")

    @contextmanager
    def recording(self, previous: Run | None) -> Iterator[Run]:
        """The run, new or resumed, which records how the work inside ends; the first process writes it."""
        if self.rank.first and not previous:
            options, content = self._description["options"], self._description["content"]
            parent = str(self.arguments["model"])
            Run.create(
                self.out, verb=self.verb, options=options, seed=self.options.seed, parent=parent, content=content
            )
        self.rank.wait()
        run = Run.open(self.out)
        with run.recording(**(self._description if previous else {})):
            yield run

    @cached_property
    def _description(self) -> dict[str, Any]:
        """The fields of run.json that the result of the run depends on."""
        return {
            "verb": self.verb,
            "options": json.loads(json.dumps({**self.arguments, **vars(self.options)}, default=str)),
            "content": {
                "code": code(),
                **{
                    f"{name} {file}".rstrip(): digest
                    for name, split in PATHS.items()
                    if (path := self.arguments.get(name)) is not None
                    for file, digest in content_of(path, split=split).items()
                },
            },
            "versions": versions(),
        }


def _inputs(info: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a run.json that the result depends on, by name: the content of files, not their paths."""
    options = {name: value for name, value in info["options"].items() if name not in (*IRRELEVANT, *PATHS)}
    return {"verb": info["verb"], **options, **info.get("content", {}), **info["versions"]}


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
