"""The verb `eval`: evaluate a model on records or on a harness's tasks, and write the results into a run folder.

Progress is saved batch by batch, so that an evaluation can resume, and shared by the process group.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress

from striate.console import console
from striate.data import Record, RecordError, Skipped
from striate.data.record import DatasetImage, ImageSource
from striate.distributed import Rank, init_distributed
from striate.errors import UserError, at_least
from striate.evaluation import Prediction, Results, harness, predict, resolve_all, sample_tasks
from striate.runs.options import flat
from striate.runs.reading import ReadOptions
from striate.runs.run import Run, check_place, place
from striate.vlm import Vlm
from striate.vlm.reading import model_folder

EVAL = ReadOptions(samples=None, batch=16)


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    images: Path | None = None,
    split: str = "train",
    out: Path | None = None,
    tasks: str | Sequence[str] | None = None,
    task_path: Path | None = None,
    max_new_tokens: int = 32,
    progress: bool = False,
    options: ReadOptions = EVAL,
) -> dict[str, Any]:
    """Evaluate a model on records, task by task.

    Predictions are saved batch by batch: an interrupted evaluation is resumed by the same call, with the same results.
    With `accelerate launch` or torchrun each process evaluates its share on its own GPU, and the first one writes;
    results are equal to those of a single process.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers, or plain text for perplexity; one file or several. Default: the data of the
            harnesses' tasks (lm-eval and lmms-eval).
        images: the folder that image paths are relative to; default: the folder of the data.
        split: the split of a hub data set, or of OCR-VQA.
        out: the run folder to write, or one with an interrupted evaluation; default: the run that `model` is.
        tasks: names of tasks in the data, separated by commas; default: all. Without data: lm:mmlu,bbh (lm-eval),
            lmms:gqa,docvqa_val (lmms-eval), paper-visual or paper-text (the paper's benchmarks, as far as the harnesses
            have them); of the other options batch, device, dtype and samples (the first ones) apply to these.
        task_path: a folder with your own YAML tasks for the harnesses.
        max_new_tokens: most tokens per answer.
        progress: show a progress bar.
        options: how records and the model are read.

    Returns:
        The content of results.json: `summary`, "seconds" of inference, "data", number of records "skipped", the five
        most frequent reasons and their counts ("left_out"), number of "empty" answers.

    Raises:
        UserError: `out` is missing or holds another evaluation, a task or metric is unknown, a record is bad, or all
            are.
    """
    recorded = flat(locals())
    at_least(1, max_new_tokens=max_new_tokens)
    if data is None:
        if not tasks:
            raise UserError("--data FILE is required, or tasks of a harness: --tasks lm:NAME lmms:NAME")
        return evaluate_tasks(model, tasks, out=out, task_path=task_path, options=options)
    if task_path is not None:
        raise UserError("--task-path is for tasks of the harnesses: leave out --data")
    rank = init_distributed(options.device)
    if rank.first:
        _check(model, out)  # before the work
    files = [data] if isinstance(data, str | Path) else list(data)
    records, skipped, notes = _read(files, images, split, options)
    records = sample_tasks(records, tasks=tasks, samples=options.samples, seed=options.seed)
    lengths = {"max_new_tokens": max_new_tokens, "max_length": options.max_length}
    evaluation = identity(model, records, **lengths, dtype=options.dtype, on_bad_record=options.on_bad_record)
    if rank.first:
        _check(model, out, evaluation)
    vlm = options.model(model)
    _ = vlm.processor  # whether it fits the model, before anything is written
    with _open_run(model, out, recorded) if rank.first else nullcontext() as run:
        answers, seconds = complete(
            vlm, records, run, evaluation=evaluation, rank=rank, stop=options.on_bad_record == "stop",
            progress=progress and rank.first, batch=options.batch, **lengths,
        )  # fmt: skip
        evaluated = Results.of(answers, skipped, seconds, options.max_length)
        results = evaluated.to_json() | {"data": ", ".join(map(str, files))}
        if run:
            for note in (*notes, *vlm.notes):
                run.warn(note)
            run.skip(*({"source": one.source, "reason": one.reason} for one in evaluated.skipped))
            run.write_predictions(map(asdict, evaluated.predictions))
            run.write_results(results)  # last: a run with results counts as evaluated
    return results


def evaluate_tasks(
    model: str | Path,
    names: str | Sequence[str],
    *,
    out: Path | None = None,
    task_path: Path | None = None,
    options: ReadOptions = EVAL,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval and lmms-eval.

    Args:
        model: a model folder, a run folder or a hub id.
        names: tasks, in the form that `harness.tasks` parses.
        out: the run folder to write; default: the results go into the run that `model` is.
        task_path: a folder with your own YAML tasks, which override the harness's of the same name.
        options: of these batch, device, dtype and samples (the first questions of each task).

    Returns:
        The content of results.json, the return value of `harness.ask`.

    Raises:
        UserError: `out` is missing, a harness is not installed or fails, a task is unknown.
    """
    recorded = flat(locals()) | {"seed": harness.SEED}  # of the few-shot examples
    rank = init_distributed(options.device)
    check_place(model, out)  # before the work
    requested = harness.tasks(names)
    managers = harness.open_tasks(requested, task_path)
    vlm = options.model(model)
    _ = vlm.processor  # whether it fits the model, before anything is written
    ask = partial(harness.ask, vlm, requested, managers, samples=options.samples, batch=options.batch, rank=rank)
    if not rank.first:
        with TemporaryDirectory() as folder:  # only the first process keeps its files
            return ask(folder=Path(folder))
    with place(model, out, verb="eval", options=recorded) as run:
        results = ask(folder=run.path)
        run.write_predictions(())  # removes the predictions of an earlier evaluation
        run.write_results(results)
    return results


def _interrupted(out: Path | None) -> Run | None:
    """The run in `out` if its evaluation was interrupted."""
    run = Run(Path(out)) if out else None
    return run if run and run.info.get("verb") == "eval" and run.unfinished else None


def _check(model: str | Path, out: Path | None, evaluation: Mapping[str, Any] | None = None) -> None:
    """Raise `UserError` when `_open_run` would fail, or `out` holds an interrupted evaluation of something else."""
    run = _interrupted(out)
    if run is None:
        check_place(model, out)
        return
    before = run.unfinished or {}
    if evaluation and before != evaluation:
        names = [name.replace("_", "-") for name in evaluation if before.get(name) != evaluation[name]]
        other = f"{run.path} holds an unfinished evaluation with other {', '.join(names)}"
        raise UserError(f"{other}: give the same again to resume it, or choose another folder", see="resume-refused")


@contextmanager
def _open_run(model: str | Path, out: Path | None, options: dict[str, Any]) -> Iterator[Run]:
    """The run that results are written into: the interrupted one in `out`, else as in `place`."""
    run = _interrupted(out)
    if run is None:
        with place(model, out, verb="eval", options=options) as new:
            yield new
    else:
        with run.recording(options=options):
            yield run


def _read(
    files: Sequence[str | Path], images: Path | None, split: str, options: ReadOptions
) -> tuple[list[Record], list[Skipped], list[str]]:
    """The records of all files, the skipped records, and notes on anything else that was not read."""
    found = [options.records(file, images, split=split) for file in files]
    records, unusable = resolve_all(chain.from_iterable(found), stop=options.on_bad_record == "stop")
    skipped = [bad for one in found for bad in one.skipped]
    return records, skipped + unusable, [note for one in found for note in one.notes]


Answers = dict[int, Prediction | Skipped]
"""By record index."""


def gather_answers(rank: Rank, own: Answers) -> Answers:
    """The answers of all processes, in each of them; every process has to call this equally often."""
    return {index: one for part in rank.gather(own) for index, one in part.items()}


def identity(model: str | Path, records: Sequence[Record], **options: Any) -> dict[str, Any]:
    """Identifies an evaluation, in JSON types: digests of model and records, and `options`.

    A model folder is identified by the names, sizes and modification times of its files, records by their content and
    the names of their images.
    """
    folder = Path(model_folder(model))
    files = sorted(file for pattern in ("*.json", "*.safetensors") for file in folder.glob(pattern))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = hashlib.sha256()
    for record in records:
        images = tuple(_image_name(image) for image in record.images)
        content.update(repr((replace(record, images=()), images)).encode(errors="replace"))
    return {
        "model": str(model),
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest(),
        "records": content.hexdigest(),
        **options,
    }


def complete(
    vlm: Vlm,
    records: Sequence[Record],
    run: Run | None,
    *,
    evaluation: Mapping[str, Any],
    rank: Rank,
    stop: bool,
    progress: bool,
    **options: int,
) -> tuple[list[Prediction | Skipped], float]:
    """Evaluate all records that have no prediction in `run` yet; the answers in record order, and the seconds it took.

    Only the first process has a `run`, into which each batch is saved. `options` are those of `predict`.

    Raises:
        RecordError: a record cannot be used, with `stop`.
        KeyboardInterrupt: its message states how many answers are saved.
    """
    saved = run.begin_predictions(dict(evaluation)) if run else []
    known = gather_answers(rank, {index: one for batch in saved for index, one in _from_json(batch)})
    seconds, began = sum(batch["seconds"] for batch in saved), time.monotonic()
    share = (rank.rank, rank.world_size)
    with Progress(console=console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("eval", total=len(records), completed=len(known))
        try:
            for own in predict(vlm, records, known=frozenset(known), share=share, **options):
                answers = gather_answers(rank, own)
                for one in answers.values():
                    if stop and isinstance(one, Skipped):
                        raise RecordError(one.source, one.reason)
                known |= answers
                took, began = time.monotonic() - began, time.monotonic()
                seconds += took
                if run:
                    run.append_predictions(_to_json(answers, took))
                bar.update(task, completed=len(known))
        except KeyboardInterrupt:
            saved_now = f"stopped with {len(known)} of {len(records)} records answered and saved"
            raise KeyboardInterrupt(f"{saved_now}; the same command resumes") from None
    return [known[index] for index in sorted(known)], seconds


def _to_json(answers: Answers, seconds: float) -> dict[str, Any]:
    """One batch, as a line of predictions.part.jsonl."""
    kinds = {"predictions": Prediction, "skipped": Skipped}
    return {"seconds": round(seconds, 3)} | {
        name: [[index, asdict(one)] for index, one in answers.items() if isinstance(one, kind)]
        for name, kind in kinds.items()
    }


def _from_json(batch: Mapping[str, Any]) -> list[tuple[int, Prediction | Skipped]]:
    """The inverse of `_to_json`."""
    predictions = [
        (index, Prediction(**fields | {"answers": tuple(fields["answers"]), "images": tuple(fields["images"])}))
        for index, fields in batch["predictions"]
    ]
    return [*predictions, *((index, Skipped(**fields)) for index, fields in batch["skipped"])]


def _image_name(image: ImageSource) -> str:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, DatasetImage):
        return f"{image.column} {image.index} of row {image.row}"
    return str(image)
