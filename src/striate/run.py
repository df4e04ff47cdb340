"""The run: one folder on disk that every verb writes and the report reads.

Only this module knows its file names:

runs/<name>/
    run.json            verb, status, options, versions, seed, machine, timings, parent model or run, warnings,
                        digests of code, data and model
    region.json         the layers that were trained or kept
    scores.json         one number per layer and score
    log.jsonl           one line a training step
    results.json        accuracy by task
    predictions.jsonl   one line an evaluated record; predictions.part.jsonl while some are missing
    skipped.jsonl       records left out, with the reason
    checkpoint/         a plain Hugging Face model
    state/              what a resumed training needs
    figures/
"""

from __future__ import annotations

import errno
import json
import numbers
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from striate.errors import UserError
from striate.region import FILE as REGION
from striate.region import SCORES, Region

INFO, RESULTS = "run.json", "results.json"
LOG, PREDICTIONS, SKIPPED = "log.jsonl", "predictions.jsonl", "skipped.jsonl"
PART = "predictions.part.jsonl"
# A list without texts or lists in it, which is to stand on one line. A line end is never inside a text of JSON.
NUMBERS = re.compile(r"(?<=\[)\n[^\[\]{}\"]*(?=\])")
PACKAGES = ("striate", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Run:
    """One run folder. Make it with `create` or `open`, which check the folder."""

    path: Path

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
        """Start a run in a new or empty folder, with status "running".

        `parent` is the model or run that it starts from, `content` has the digests of what it is made from. Raises
        `UserError` when the folder already holds something, or cannot be written.
        """
        run = cls(Path(path))
        with _writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        cls.check_free(path)
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
        """Raise `UserError` when the folder already holds something, before work whose result would go there."""
        run = cls(Path(path))
        with _writing(run.path):
            held = sorted(item.name for item in run.path.iterdir()) if run.path.exists() else []
        if held:
            raise UserError(f"{run.path} {run._content(held)}; choose another folder or remove this one")

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises `UserError` when the folder holds none."""
        run = cls(Path(path))
        if not (run.path / INFO).is_file():
            raise UserError(f"{run.path} is no run: a folder with a {INFO} in it was expected")
        return run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record how the work inside ends, "finished", "failed" or "interrupted", and the seconds it took.

        Work that sets another status itself (a training stopped half-way) keeps it.
        """
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
        """Where the trained model goes: a folder that `transformers` loads."""
        return self.path / "checkpoint"

    @property
    def state(self) -> Path:
        """Where a training keeps what it needs to be resumed."""
        return self.path / "state"

    @property
    def figures(self) -> Path:
        """Where figures go."""
        return self.path / "figures"

    @property
    def info(self) -> dict[str, Any]:
        """What ran: the content of run.json."""
        return self._read(INFO) or {}

    def update(self, **fields: Any) -> None:
        """Replace fields of `info`."""
        self._write(INFO, self.info | fields)

    def warn(self, text: str) -> None:
        """Keep a warning, once, for whoever reads about the run later."""
        warnings = self.info.get("warnings", [])
        if text not in warnings:
            self.update(warnings=[*warnings, text])

    @property
    def region(self) -> Region | None:
        """The layers that this run trained or kept; None when it has no region."""
        data = self._read(REGION)
        return None if data is None else Region.from_json(data)

    def write_region(self, region: Region) -> None:
        """Save the region; `Region.parse` accepts the run folder from then on."""
        self._write(REGION, region.to_json())

    @property
    def scores(self) -> dict[str, Any] | None:
        """Layer scores, as `striate.score.table.Scores.from_json` reads them; None when none were measured."""
        return self._read(SCORES)

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Save layer scores; a region such as `top:8@RUN:NAME` can be chosen by them from then on."""
        self._write(SCORES, scores)

    @property
    def results(self) -> dict[str, Any] | None:
        """Accuracy by task; None before the run was evaluated."""
        return self._read(RESULTS)

    def write_results(self, results: dict[str, Any]) -> None:
        """Save accuracy by task."""
        self._write(RESULTS, results)

    def log(self, entry: dict[str, Any]) -> None:
        """Add a training step: {"step", "loss", "lr", "seconds", ...}; "step" is required."""
        self._append(LOG, entry)

    def history(self) -> list[dict[str, Any]]:
        """The logged steps. Those that a resumed training repeated appear once, as it did them last."""
        steps: list[dict[str, Any]] = []
        for entry in self._lines(LOG):
            if steps and entry["step"] <= steps[-1]["step"]:
                steps = [earlier for earlier in steps if earlier["step"] < entry["step"]]
            steps.append(entry)
        return steps

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """What `begin_predictions` was told about an evaluation that has not come to its end; else None."""
        return next(self._lines(PART), None)

    def begin_predictions(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """Start an evaluation, or go on with it: the batches that it left when it was stopped.

        `evaluation` says what is evaluated and how. What another evaluation left is dropped.
        """
        if self.unfinished != evaluation:
            self._replace(PART, _line(evaluation))
        return list(self._lines(PART))[1:]

    def append_predictions(self, batch: dict[str, Any]) -> None:
        """Save a batch of an evaluation before the next is asked; a crash costs the batch that it tears."""
        self._append(PART, batch)

    def write_predictions(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Save one line for each evaluated record, which ends an evaluation that was begun."""
        self._replace(PREDICTIONS, "".join(_line(prediction) for prediction in predictions))
        with _writing(self.path / PART):
            (self.path / PART).unlink(missing_ok=True)

    def predictions(self) -> list[dict[str, Any]]:
        """The evaluated records; empty before the run was evaluated."""
        return list(self._lines(PREDICTIONS))

    def skip(self, *entries: dict[str, Any]) -> None:
        """Add records that were left out, {"source", "reason"}, unless they are listed already."""
        listed = set(map(_line, self.skipped()))
        for line, entry in {_line(entry): entry for entry in entries}.items():
            if line not in listed:
                self._append(SKIPPED, entry)

    def skipped(self) -> list[dict[str, Any]]:
        """The records that were left out."""
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
        """Write all of `text` to disk before it takes the place of `name`."""
        if _leaves_writing():
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

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        if _leaves_writing():
            return
        with _writing(self.path / name), open(self.path / name, "ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                file.seek(0)  # a line that a crash tore must not spoil the next
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(_encoded(_line(entry)))

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        file = self.path / name
        try:
            whole = file.read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn by a crash
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        for number, line in enumerate(whole, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}, is no JSON: {error}") from None


def model_folder(model: str | Path) -> str | Path:
    """The checkpoint of a run where a run folder is given; any other path or hub id as it came.

    Raises `UserError` when the run has no checkpoint.
    """
    if not (Path(model) / INFO).is_file():
        return model
    run = Run(Path(model))
    if not run.checkpoint.is_dir():
        raise UserError(
            f"{run.path} has no {run.checkpoint.name}/ "
            f"({run.info.get('verb')}, {run.info.get('status')}): choose a run that has saved a model"
        )
    return run.checkpoint


def check_place(model: str | Path, out: str | Path | None) -> None:
    """Raise `UserError` when `place` would refuse, before work whose result would go there."""
    if out is not None:
        Run.check_free(out)
        return
    try:
        Run.open(model)
    except UserError:
        raise UserError(f"{model} is no run to write results into: name a new one with --out") from None


@contextmanager
def place(model: str | Path, out: str | Path | None, *, verb: str, options: dict[str, Any]) -> Iterator[Run]:
    """Where results go: a new run in `out`, or the run that is the model, which keeps its own status and time.

    Raises `UserError` when `out` is taken, or not given and the model is no run.
    """
    check_place(model, out)
    if out is None:
        yield Run.open(model)
        return
    run = Run.create(out, verb=verb, options=options, seed=options.get("seed"), parent=str(model))
    with run.recording():
        yield run


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What this process runs on: {"platform", "cpu", "cores", "memory_gb" (10^9 bytes), "gpu"}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = getattr(os, "sysconf_names", {})  # none on Windows
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else None
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores,
        "memory_gb": pages and round(pages / 1e9, 1),
        "gpu": _gpu(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        import torch  # slow to import, and only needed for this question
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    return name if count == 1 else f"{count} x {name}"


def _leaves_writing() -> bool:
    """Whether this is one of several processes that were launched together, and not the first: that one writes."""
    return os.environ.get("RANK", "0") != "0"


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {target}: free some, then resume") from None
        raise UserError(f"{target} cannot be written: {error.strerror}") from None


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, default=_plain) + "\n"


def _encoded(text: str) -> bytes:
    # What is no Unicode (half a surrogate pair, from odd file names) becomes \udc80, JSON's own spelling.
    return text.encode("utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """What JSON has no word for: dataclasses as their fields, numpy numbers as numbers, the rest as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return str(value)
