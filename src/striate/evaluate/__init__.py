"""Ask a model about records, score what it says with the field's metrics, sum up each task with its error."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

from striate.data import Record, RecordError, Skipped, read
from striate.errors import UserError, nearest
from striate.evaluate.answers import Likelihood, answer, choose, likelihood
from striate.evaluate.prediction import Prediction, by_task, predict, resolve, summary
from striate.run import check_place, place
from striate.vlm import load

__all__ = [
    "Likelihood",
    "Prediction",
    "answer",
    "choose",
    "evaluate",
    "likelihood",
    "predict",
    "resolve",
    "select",
    "summary",
]


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    images: Path | None = None,
    out: Path | None = None,
    tasks: str | Sequence[str] | None = None,
    samples: int | None = None,
    batch: int = 16,
    max_new_tokens: int = 32,
    max_length: int = 2048,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    allow_urls: bool = False,
    on_bad_record: Literal["stop", "skip"] = "stop",
    progress: bool = False,
) -> dict[str, Any]:
    """Ask a model about records and score its answers, task by task.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers, or plain text for perplexity; one file or several.
        images: the folder that image paths are relative to; default: the folder of the data.
        out: the run folder to write; default: the results go into the run that `model` is.
        tasks: names of tasks, separated by commas; default: all.
        samples: most records of one task, drawn at random; default: all.
        batch: records answered together; the results do not depend on it.
        max_new_tokens: most tokens of an answer.
        max_length: most tokens of a record, image tokens included, or of a window of plain text.
        seed: of the draw of `samples`.
        device: cpu to stay off a GPU.
        dtype: auto (as saved), float32, bfloat16 or float16.
        allow_urls: fetch images given as URLs.
        on_bad_record: stop, or list it in skipped.jsonl and go on.
        progress: show a progress bar.

    Returns:
        The content of results.json: `summary`, "seconds" it took to ask, "data", number of records "skipped".

    Raises:
        UserError: nowhere to write, an unknown task or metric, a bad record, or no good one.
    """
    options = dict(locals())
    check_place(model, out)  # refused now, not after the work
    files = [data] if isinstance(data, str | Path) else list(data)
    records, skipped = _read(files, images, allow_urls, on_bad_record)
    records = select(records, tasks=tasks, samples=samples, seed=seed)
    vlm = load(model, device=device, dtype=dtype)
    began, predictions = time.monotonic(), dict[int, Prediction]()
    with place(model, out, verb="eval", options=options) as run:
        asked = predict(vlm, records, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length)
        bar = Console(stderr=True)
        for index, found in track(asked, "eval", total=len(records), console=bar, disable=not progress):
            if isinstance(found, Prediction):
                predictions[index] = found
            elif on_bad_record == "skip":
                skipped.append(found)
            else:
                raise RecordError(found.source, found.reason)
        if not predictions:
            why = f": {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise UserError(f"none of the {len(skipped)} records can be asked{why}")
        in_order = [predictions[index] for index in sorted(predictions)]
        results = summary(in_order) | {
            "seconds": round(time.monotonic() - began, 3),
            "data": ", ".join(map(str, files)),
            "skipped": len(skipped),
        }
        for one in skipped:
            run.skip({"source": one.source, "reason": one.reason})
        run.write_predictions(map(asdict, in_order))
        run.write_results(results)
    return results


def select(
    records: Sequence[Record],
    *,
    tasks: str | Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """The records of the named tasks, at most `samples` of each, in their order.

    The draw depends on the seed, the task's name and its number of records alone: it stays the same whatever
    other tasks are chosen. `records` are as `resolve` gives them.

    Raises:
        UserError: a task that no record has, or one that mixes metrics.
    """
    known = dict.fromkeys(record.task for record in records)
    listed = [tasks] if isinstance(tasks, str) else tasks or ()
    names = [name.strip() for one in listed for name in one.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"no task {nearest(name, known)}")
    groups = by_task(record for record in records if record.task in (names or known))
    for task, group in groups.items():
        if samples is not None and samples < len(group):
            drawn = random.Random(f"{seed} {task}").sample(range(len(group)), samples)
            groups[task] = [group[index] for index in sorted(drawn)]
    return [record for group in groups.values() for record in group]


def _read(
    files: Sequence[str | Path], images: Path | None, allow_urls: bool, on_bad: Literal["stop", "skip"]
) -> tuple[list[Record], list[Skipped]]:
    records: list[Record] = []
    skipped: list[Skipped] = []
    for file in files:
        found = read(file, images=images, allow_urls=allow_urls, on_bad=on_bad)
        skipped += found.skipped
        for record in found:
            try:
                records.append(resolve(record))
            except RecordError as error:
                if on_bad == "stop":
                    raise
                skipped.append(error.skipped)
    return records, skipped
