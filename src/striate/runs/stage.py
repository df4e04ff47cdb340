"""A training stage as a run: started, or resumed if nothing has changed that its result depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from striate.distributed import Rank
from striate.errors import UserError
from striate.runs.provenance import code, content_of, differences
from striate.runs.run import INFO, Run, versions
from striate.train.options import TrainOptions, check_launch

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
        changed = list(differences(_inputs(run.info), _inputs(self._description)))
        if changed and resume != "changed":
            raise UserError(
                f"{self.out} cannot be resumed with the same result: {'; '.join(changed)} (--resume changed does)",
                see="resume-refused",
            )
        for change in changed if not finished else ():
            run.warn(f"resumed although {change}")
        return run

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
