"""The run folder: the format in which every verb saves its results. Only this module knows the file names:

runs/<name>/
    run.json            verb, status, options, versions, seed, machine, timings, parent model or run, warnings,
                        digests of code, data and model
    region.json         the layers that were trained or kept, and the route
    scores.json         one value per layer and score
    log.jsonl           one line per training step
    results.json        accuracy by task
    predictions.jsonl   one line per evaluated record; predictions.part.jsonl until all are there
    skipped.jsonl       skipped records, with the reason
    checkpoint/         a plain Hugging Face model
    state/              saved states of an unfinished training run
    figures/
    explore.html        what each layer does with the images of a few records; its numbers are in explore.json
"""

from __future__ import annotations

import errno
import json
import numbers
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from striate.distributed import environment_rank
from striate.errors import UserError
from striate.region import FILE as REGION
from striate.region import SCORES, Region
from striate.runs.environment import machine, versions

INFO, RESULTS = "run.json", "results.json"
LOG, PREDICTIONS, SKIPPED = "log.jsonl", "predictions.jsonl", "skipped.jsonl"
PART = "predictions.part.jsonl"
UNMADE = {INFO, REGION, SKIPPED}  # all that a run has left that failed before it made anything
# A list of numbers, which is written on one line. A line break is never inside a string of JSON.
NUMBERS = re.compile(r"(?<=\[)\n[^\[\]{}\"]*(?=\])")


@dataclass(frozen=True)
class Run:
    """One run folder; `create` or `open` it."""

    path: Path
    _listed: dict[int, set[str]] = field(default_factory=dict, repr=False, compare=False)
    """the lines of skipped.jsonl, by the file's size"""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        verb: str,
        options: dict[str, Any],
        seed: int | None = None,
        parent: str | None = None,
        content: dict[str, str] | None = None,
    ) -> Run:
        """Start a run in a new or empty folder, or in that of a run that failed before it made anything, with status
        "running".

        `parent` is the model or run that it starts from, `content` has the digests of its inputs.

        Raises:
            UserError: the folder is not empty or cannot be written.
        """
        run = cls(Path(path))
        with _writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        cls.check_free(path)
        for name in UNMADE:
            (run.path / name).unlink(missing_ok=True)
        script = Path(sys.argv[0])  # of `python -m striate` it is striate/__main__.py
        program = script.parent.name if script.name == "__main__.py" else script.name
        run._write(
            INFO,
            {
                "verb": verb,
                "status": "running",
                "name": run.path.resolve().name,
                "command": shlex.join([program, *sys.argv[1:]]),
                "options": options,
                "seed": seed,
                "parent": parent,
                **({"content": content} if content else {}),
                "started": datetime.now(UTC).isoformat(" ", "seconds"),
                "seconds": 0.0,
                "versions": versions(),
                "machine": machine(),
            },
        )
        return run

    @classmethod
    def check_free(cls, path: str | Path) -> None:
        """Raise `UserError` when the folder holds anything but a run that failed before it made anything."""
        run = cls(Path(path))
        with _writing(run.path):
            held = sorted(item.name for item in run.path.iterdir()) if run.path.exists() else []
        failed = INFO in held and run.info.get("status") == "failed" and UNMADE.issuperset(held)
        if held and not failed:
            raise UserError(
                f"{run.path} {run._content(held)}; choose another folder or remove this one", see="folder-in-use"
            )

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises `UserError` when the path is not a run folder."""
        run = cls(Path(path))
        if not (run.path / INFO).is_file():
            raise UserError(
                f"{run.path} is not a run folder: a folder with a {INFO} in it was expected", see="not-a-run-folder"
            )
        info = run._read(INFO)
        if not isinstance(info, dict) or not {"verb", "status"} <= info.keys():
            raise UserError(
                f"{run.path / INFO} is not that of a run: it has no verb and status", see="not-a-run-folder"
            )
        return run

    @contextmanager
    def recording(self, **fields: Any) -> Iterator[None]:
        """Set the status to "running", replace `fields` of `info`, and record how the work inside ends: "finished",
        "failed" or "interrupted", and the seconds it took.

        A status that the work itself sets (a training run that was stopped) is kept.
        """
        self.update(status="running", **fields)
        began, before = time.monotonic(), self.info.get("seconds", 0.0)
        status = "failed"
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            running = self.info.get("status") == "running"
            seconds = round(before + time.monotonic() - began, 3)
            self.update(seconds=seconds, **({"status": status} if running else {}))

    @property
    def checkpoint(self) -> Path:
        """The folder of the trained model, in the format of `transformers`."""
        return self.path / "checkpoint"

    @property
    def state(self) -> Path:
        """The folder of saved states, for resuming."""
        return self.path / "state"

    @property
    def figures(self) -> Path:
        """The folder of figures."""
        return self.path / "figures"

    @property
    def exploration(self) -> Path:
        """The page of `explore`."""
        return self.path / "explore.html"

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json."""
        return self._read(INFO) or {}

    def update(self, **fields: Any) -> None:
        """Replace fields of `info`."""
        self._write(INFO, self.info | fields)

    def warn(self, text: str) -> None:
        """Add a warning to run.json, once."""
        warnings = self.info.get("warnings", [])
        if text not in warnings:
            self.update(warnings=[*warnings, text])

    @property
    def region(self) -> Region | None:
        """The layers that this run trained or kept; None if it has no region."""
        data = self._read(REGION)
        return None if data is None else Region.from_json(data)

    @property
    def route(self) -> Region | None:
        """The layers that image tokens pass through, as saved with the region; None where they pass through all."""
        data = self._read(REGION) or {}
        return Region(tuple(data["route"]), data["depth"]) if "route" in data else None

    def write_region(self, region: Region, route: Region | None = None, *, modules: str = "all") -> None:
        """Save the region, with route and modules as in `to_json`; `Region.parse` accepts the run folder afterwards."""
        self._write(REGION, region.to_json(route, modules=modules))

    @property
    def scores(self) -> dict[str, Any] | None:
        """Layer scores, in the format of `striate.scores.table.Scores.from_json`; None if there are none."""
        return self._read(SCORES)

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Save layer scores; a region such as `top:8@RUN:NAME` can use them afterwards."""
        self._write(SCORES, scores)

    @property
    def results(self) -> dict[str, Any] | None:
        """Accuracy by task; None before the evaluation."""
        return self._read(RESULTS)

    def write_results(self, results: dict[str, Any]) -> None:
        """Save accuracy by task."""
        self._write(RESULTS, results)

    def log(self, entry: dict[str, Any]) -> None:
        """Add a training step: {"step", "loss", "lr", "seconds", ...}; "step" is required."""
        self._append(LOG, entry)

    def history(self) -> list[dict[str, Any]]:
        """The logged steps; of steps that a resumed run repeated, the last entry."""
        steps: list[dict[str, Any]] = []
        for entry in self._lines(LOG):
            if steps and entry["step"] <= steps[-1]["step"]:
                steps = [earlier for earlier in steps if earlier["step"] < entry["step"]]
            steps.append(entry)
        return steps

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """The argument of `begin_predictions` if that evaluation has not finished; else None."""
        return next(self._lines(PART), None)

    def begin_predictions(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """Start or resume an evaluation; the batches that are saved already.

        `evaluation` identifies the evaluation. The batches of any other are deleted.
        """
        if self.unfinished != evaluation:
            self._replace(PART, _line(evaluation))
        return list(self._lines(PART))[1:]

    def append_predictions(self, batch: dict[str, Any]) -> None:
        """Save a batch of an evaluation; a crash loses only the batch being written."""
        self._append(PART, batch)

    def write_predictions(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Save one line per evaluated record; the evaluation is finished then."""
        self._replace(PREDICTIONS, "".join(_line(prediction) for prediction in predictions))
        with _writing(self.path / PART):
            (self.path / PART).unlink(missing_ok=True)

    def predictions(self) -> list[dict[str, Any]]:
        """The evaluated records; empty before the evaluation."""
        return list(self._lines(PREDICTIONS))

    def skip(self, *entries: dict[str, Any]) -> None:
        """Add skipped records, {"source", "reason"}, unless they are listed already."""
        listed = self._listed.pop(self._size(SKIPPED), None)
        if listed is None:  # the first time, or another process has written
            listed = set(map(_line, self.skipped()))
        new = {line: entry for entry in entries if (line := _line(entry)) not in listed}
        self._append(SKIPPED, *new.values())
        listed.update(new)
        self._listed[self._size(SKIPPED)] = listed

    def skipped(self) -> list[dict[str, Any]]:
        """The skipped records."""
        return list(self._lines(SKIPPED))

    def _content(self, held: list[str]) -> str:
        if INFO not in held:
            return f"is not empty: it holds {', '.join(held[:3])}{' ...' if len(held) > 3 else ''}"
        info = self.info
        return f"holds another run: {info.get('verb')}, {info.get('status')}, started {info.get('started')}"

    def _read(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=_plain)
        self._replace(name, NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")

    def _replace(self, name: str, text: str) -> None:
        """Replace the file `name` atomically."""
        if not environment_rank().first:  # only the first process writes
            return
        part = self.path / f".{name}.{os.getpid()}"
        with _writing(self.path / name):
            try:
                with open(part, "wb") as file:
                    file.write(_encoded(text))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.path / name)
            finally:
                part.unlink(missing_ok=True)

    def _size(self, name: str) -> int:
        file = self.path / name
        return file.stat().st_size if file.exists() else 0

    def _append(self, name: str, *entries: dict[str, Any]) -> None:
        if not entries or not environment_rank().first:  # only the first process writes
            return
        with _writing(self.path / name), open(self.path / name, "ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                file.seek(0)  # remove a line that a crash left incomplete
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(_encoded("".join(map(_line, entries))))

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        file = self.path / name
        try:
            whole = file.read_bytes().split(b"\n")[:-1]  # without the line that a crash left incomplete
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        for number, line in enumerate(whole, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}, is not valid JSON: {error}") from None


def check_place(model: str | Path, out: str | Path | None) -> None:
    """Raise `UserError` when `place` would fail, before any work; only in the first process, which writes."""
    if not environment_rank().first:
        return
    if out is not None:
        Run.check_free(out)
        return
    try:
        Run.open(model)
    except UserError:
        raise UserError(
            f"{model} is not a run folder to write results into: name a new one with --out", see="not-a-run-folder"
        ) from None


@contextmanager
def place(model: str | Path, out: str | Path | None, *, verb: str, options: dict[str, Any]) -> Iterator[Run]:
    """The run that results are written into: a new one in `out`, or the model's own, which keeps its status and time.

    In the other processes of a group, which do not write, it may not exist.

    Raises:
        UserError: `out` is not empty, or is missing and the model is not a run folder.
    """
    check_place(model, out)
    if out is None or not environment_rank().first:
        yield Run(Path(out or model))
        return
    run = Run.create(out, verb=verb, options=options, seed=options.get("seed"), parent=str(model))
    with run.recording():
        yield run


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn errors of the file system into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {target}: free some, then resume", see="disk-full") from None
        raise UserError(f"{target} cannot be written: {error.strerror}") from None


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, default=_plain) + "\n"


def _encoded(text: str) -> bytes:
    # A lone surrogate (invalid Unicode, from undecodable file names) becomes \udc80, JSON's own escape.
    return text.encode("utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Convert values that JSON does not support: dataclasses to dicts, numpy numbers to numbers, the rest to text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return str(value)
