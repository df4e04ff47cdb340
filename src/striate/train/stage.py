"""A stage of training as a run: begun, or taken up again where nothing has changed that would change its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from striate.content import code, content_of, differences
from striate.errors import UserError
from striate.processes import Rank
from striate.run import INFO, Run, versions
from striate.train.options import TrainOptions

Resume = bool | Literal["auto"]
# Nothing that is learnt depends on these.
FREE = ("save_steps", "workers", "report_to", "skip_nonfinite")
READ = ("model", "data", "teacher")  # arguments that lead to files


@dataclass(frozen=True)
class Stage:
    """What a stage is asked to do: its verb, its folder, the arguments of the verb by name, how to train."""

    verb: str
    out: Path
    asked: Mapping[str, Any]
    options: TrainOptions
    rank: Rank

    def before(self, resume: Resume, *, force: bool) -> Run | None:
        """The run to go on with, None where a new one begins; with "auto" that depends on what is there.

        A finished run comes back only with "auto": then there is nothing to do.

        Raises:
            UserError: there is nothing to resume; or, without `force`, something is not as it was.
        """
        found = self._before(resume, force) if self.rank.first else None
        return self.rank.gathered(found)[0]  # what the first process saw, before it writes anything

    def _before(self, resume: Resume, force: bool) -> Run | None:
        if not resume or (resume == "auto" and not (Path(self.out) / INFO).is_file()):
            Run.check_free(self.out)
            return None
        run = Run.open(self.out)
        finished = run.info["status"] == "finished"
        if finished and resume != "auto":
            raise UserError(f"{self.out} is finished: there is nothing to resume")
        changed = list(differences(_essence(run.info), _essence(self._described)))
        if changed and not force:
            raise UserError(
                f"{self.out} would not go on as it began: {'; '.join(changed)} (--force goes on all the same)"
            )
        for change in changed if not finished else ():
            run.warn(f"resumed although {change}")
        return run

    @contextmanager
    def recording(self, before: Run | None) -> Iterator[Run]:
        """The run, recording how the work inside ends; the first process makes it or takes it up again."""
        if self.rank.first and before:
            before.update(**self._described, status="running")
        elif self.rank.first:
            options, content = self._described["options"], self._described["content"]
            parent = str(self.asked["model"])
            Run.create(
                self.out, verb=self.verb, options=options, seed=self.options.seed, parent=parent, content=content
            )
        self.rank.wait()
        run = Run.open(self.out)
        with run.recording():
            yield run

    @cached_property
    def _described(self) -> dict[str, Any]:
        """What run.json says that decides how the run ends."""
        return {
            "verb": self.verb,
            "options": json.loads(json.dumps({**self.asked, **vars(self.options)}, default=str)),
            "content": {
                "code": code(),
                **{
                    f"{name} {file}".rstrip(): found
                    for name in READ
                    if (path := self.asked.get(name)) is not None
                    for file, found in content_of(path).items()
                },
            },
            "versions": versions(),
        }


def _essence(info: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a run.json on which its end depends, by name. Places do not matter, what is there does."""
    options = {name: value for name, value in info["options"].items() if name not in (*FREE, *READ)}
    return {"verb": info["verb"], **options, **info.get("content", {}), **info["versions"]}
