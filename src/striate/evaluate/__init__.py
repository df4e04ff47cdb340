"""Ask a model about records, score what it says with the field's metrics, sum up each task with its error."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from striate.data import Record, RecordError, Skipped, read
from striate.errors import UserError, nearest
from striate.evaluate import harness
from striate.evaluate.answers import Likelihood, answer, choose, likelihood
from striate.evaluate.prediction import Prediction, by_task, predict, resolve, summary
from striate.evaluate.progress import complete, identity
from striate.processes import launched
from striate.run import Run, check_place, place
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
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    images: Path | None = None,
    split: str = "train",
    out: Path | None = None,
    tasks: str | Sequence[str] | None = None,
    task_path: Path | None = None,
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

    Stopped half-way, the same call goes on where it was, to the same results: predictions are saved batch by
    batch. Started by `accelerate launch` or torchrun, each process asks its share on its own GPU, and the first
    one writes; results are those of a single process.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers, or plain text for perplexity; one file or several. Default: tasks of the
            harnesses lm-eval and lmms-eval, which bring their own.
        images: the folder that image paths are relative to; default: the folder of the data.
        split: of a hub data set, or of OCR-VQA.
        out: the run folder to write, or one whose evaluation was stopped; default: the run that `model` is.
        tasks: names of tasks in the data, separated by commas; default: all. Without data: lm:mmlu,bbh (lm-eval),
            lmms:gqa,docvqa_val (lmms-eval), paper-visual or paper-text (what both have of the paper's benchmarks);
            batch, device and dtype count for these, and samples takes the first so many.
        task_path: a folder of your own YAML tasks for the harnesses.
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
        UserError: nowhere to write, `out` holds another evaluation, an unknown task or metric, a bad record, or
            no good one.
    """
    options = dict(locals())
    if data is None:
        if not tasks:
            raise UserError("on what? give records with --data, or a harness's tasks: --tasks lm:NAME lmms:NAME")
        return harness.run(
            model, tasks, out=out, task_path=task_path, samples=samples, batch=batch, device=device, dtype=dtype
        )
    if task_path is not None:
        raise UserError("--task-path is for the harnesses' tasks, which are asked without --data")
    rank = launched(device)
    if rank.first:
        _check(model, out)  # refused now, not after the work
    files = [data] if isinstance(data, str | Path) else list(data)
    records, skipped = _read(files, images, split, allow_urls, on_bad_record)
    records = select(records, tasks=tasks, samples=samples, seed=seed)
    lengths = {"max_new_tokens": max_new_tokens, "max_length": max_length}
    evaluation = identity(model, records, **lengths, dtype=str(dtype), on_bad_record=on_bad_record)
    if rank.first:
        _check(model, out, evaluation)
    vlm = load(model, device=device, dtype=dtype)
    with _place(model, out, options) if rank.first else nullcontext() as run:
        found, seconds = complete(
            vlm, records, run, evaluation=evaluation, rank=rank, stop=on_bad_record == "stop",
            progress=progress and rank.first, batch=batch, **lengths,
        )  # fmt: skip
        skipped += [one for one in found if isinstance(one, Skipped)]
        predictions = [one for one in found if isinstance(one, Prediction)]
        if not predictions:
            why = f": {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise UserError(f"none of the {len(skipped)} records can be asked{why}")
        results = summary(predictions) | {
            "seconds": round(seconds, 3),
            "data": ", ".join(map(str, files)),
            "skipped": len(skipped),
        }
        if run:
            for one in skipped:
                run.skip({"source": one.source, "reason": one.reason})
            run.write_predictions(map(asdict, predictions))
            run.write_results(results)  # last: a run with results is evaluated
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


def _stopped(out: Path | None) -> Run | None:
    """The run in `out` if it is an evaluation that was stopped."""
    run = Run(Path(out)) if out else None
    return run if run and run.info.get("verb") == "eval" and run.unfinished else None


def _check(model: str | Path, out: Path | None, evaluation: Mapping[str, Any] | None = None) -> None:
    """Raise `UserError` when `_place` would refuse, or `out` holds the beginning of another evaluation."""
    run = _stopped(out)
    if run is None:
        check_place(model, out)
        return
    begun = run.unfinished or {}
    if evaluation and begun != evaluation:
        names = [name.replace("_", "-") for name in evaluation if begun.get(name) != evaluation[name]]
        unlike = f"{run.path} holds an unfinished evaluation with other {', '.join(names)}"
        raise UserError(f"{unlike}: give the same again to go on with it, or choose another folder")


@contextmanager
def _place(model: str | Path, out: Path | None, options: dict[str, Any]) -> Iterator[Run]:
    """Where results go: as in `place`, or the run in `out` whose evaluation was stopped."""
    run = _stopped(out)
    if run is None:
        with place(model, out, verb="eval", options=options) as new:
            yield new
        return
    run.update(status="running", options=options)
    with run.recording():
        yield run


def _read(
    files: Sequence[str | Path], images: Path | None, split: str, allow_urls: bool, on_bad: Literal["stop", "skip"]
) -> tuple[list[Record], list[Skipped]]:
    records: list[Record] = []
    skipped: list[Skipped] = []
    for file in files:
        found = read(file, images=images, split=split, allow_urls=allow_urls, on_bad=on_bad)
        skipped += found.skipped
        for record in found:
            try:
                records.append(resolve(record))
            except RecordError as error:
                if on_bad == "stop":
                    raise
                skipped.append(error.skipped)
    return records, skipped
