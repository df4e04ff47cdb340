"""The verb `eval`: evaluate a model on records or on a harness's tasks, and write the results into a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from striate.data import Record, RecordError, Skipped, read
from striate.distributed import init_distributed
from striate.errors import UserError, at_least
from striate.evaluation import Prediction, Results, harness, resolve, sample_tasks
from striate.routing import load
from striate.runs.evaluating_progress import complete, identity
from striate.runs.run import Run, check_place, place


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
        samples: most records per task, sampled at random; default: all.
        batch: records per forward pass; the results do not depend on it.
        max_new_tokens: most tokens per answer.
        max_length: most tokens per record, image tokens included, or per window of plain text.
        seed: random seed of `samples`.
        device: device to run on, such as cpu or cuda:0; default: the GPU if there is one.
        dtype: dtype of the model: auto (that of the checkpoint), float32, bfloat16 or float16.
        allow_urls: download images given as URLs.
        on_bad_record: stop, or list a bad record in skipped.jsonl and continue.
        progress: show a progress bar.

    Returns:
        The content of results.json: `summary`, "seconds" of inference, "data", number of records "skipped", the five
        most frequent reasons and their counts ("left_out"), number of "empty" answers.

    Raises:
        UserError: `out` is missing or holds another evaluation, a task or metric is unknown, a record is bad, or all
            are.
    """
    options = dict(locals())
    at_least(1, samples=samples, batch=batch, max_new_tokens=max_new_tokens, max_length=max_length)
    if data is None:
        if not tasks:
            raise UserError("--data FILE is required, or tasks of a harness: --tasks lm:NAME lmms:NAME")
        return evaluate_tasks(
            model, tasks, out=out, task_path=task_path, samples=samples, batch=batch, device=device, dtype=dtype
        )
    if task_path is not None:
        raise UserError("--task-path is for tasks of the harnesses: leave out --data")
    rank = init_distributed(device)
    if rank.first:
        _check(model, out)  # before the work
    files = [data] if isinstance(data, str | Path) else list(data)
    records, skipped, notes = _read(files, images, split, allow_urls, on_bad_record)
    records = sample_tasks(records, tasks=tasks, samples=samples, seed=seed)
    lengths = {"max_new_tokens": max_new_tokens, "max_length": max_length}
    evaluation = identity(model, records, **lengths, dtype=str(dtype), on_bad_record=on_bad_record)
    if rank.first:
        _check(model, out, evaluation)
    vlm = load(model, device=device, dtype=dtype)
    _ = vlm.processor  # whether it fits the model, before anything is written
    with _open_run(model, out, options) if rank.first else nullcontext() as run:
        answers, seconds = complete(
            vlm, records, run, evaluation=evaluation, rank=rank, stop=on_bad_record == "stop",
            progress=progress and rank.first, batch=batch, **lengths,
        )  # fmt: skip
        skipped += [one for one in answers if isinstance(one, Skipped)]
        predictions = [one for one in answers if isinstance(one, Prediction)]
        if not predictions:
            why = f": {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise UserError(f"none of the {len(skipped)} records can be used{why}")
        results = Results(tuple(predictions), tuple(skipped), seconds, max_length).to_json()
        results |= {"data": ", ".join(map(str, files))}
        if run:
            for note in (*notes, *vlm.notes):
                run.warn(note)
            run.skip(*({"source": one.source, "reason": one.reason} for one in skipped))
            run.write_predictions(map(asdict, predictions))
            run.write_results(results)  # last: a run with results counts as evaluated
    return results


def evaluate_tasks(
    model: str | Path,
    names: str | Sequence[str],
    *,
    out: Path | None = None,
    task_path: Path | None = None,
    samples: int | None = None,
    batch: int = 16,
    seed: int = harness.SEED,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval and lmms-eval.

    Args:
        model: a model folder, a run folder or a hub id.
        names: tasks, in the form that `harness.tasks` parses.
        out: the run folder to write; default: the results go into the run that `model` is.
        task_path: a folder with your own YAML tasks, which override the harness's of the same name.
        samples: number of questions per task, the first ones; default: all.
        batch: questions per forward pass.
        seed: random seed of the few-shot examples.
        device: device to run on, such as cpu or cuda:0; default: the GPU if there is one.
        dtype: dtype of the model: auto (that of the checkpoint), float32, bfloat16 or float16.

    Returns:
        The content of results.json, the return value of `harness.ask`.

    Raises:
        UserError: `out` is missing, a harness is not installed or fails, a task is unknown.
    """
    options = dict(locals())
    at_least(1, samples=samples, batch=batch)
    rank = init_distributed(device)
    if rank.first:
        check_place(model, out)  # before the work
    requested = harness.tasks(names)
    managers = harness.open_tasks(requested, task_path)
    vlm = load(model, device=device, dtype=dtype)
    _ = vlm.processor  # whether it fits the model, before anything is written
    if not rank.first:
        with TemporaryDirectory() as folder:  # only the first process keeps its files
            return harness.ask_open(
                vlm, requested, managers, Path(folder), samples=samples, batch=batch, seed=seed, rank=rank
            )
    with place(model, out, verb="eval", options=options) as run:
        results = harness.ask_open(
            vlm, requested, managers, run.path, samples=samples, batch=batch, seed=seed, rank=rank
        )
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
        raise UserError(f"{other}: give the same again to resume it, or choose another folder")


@contextmanager
def _open_run(model: str | Path, out: Path | None, options: dict[str, Any]) -> Iterator[Run]:
    """The run that results are written into: the interrupted one in `out`, else as in `place`."""
    run = _interrupted(out)
    if run is None:
        with place(model, out, verb="eval", options=options) as new:
            yield new
        return
    with run.recording(options=options):
        yield run


def _read(
    files: Sequence[str | Path], images: Path | None, split: str, allow_urls: bool, on_bad: Literal["stop", "skip"]
) -> tuple[list[Record], list[Skipped], list[str]]:
    """The records of all files, the skipped records, and notes on anything else that was not read."""
    records: list[Record] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for file in files:
        found = read(file, images=images, split=split, allow_urls=allow_urls, on_bad=on_bad)
        skipped += found.skipped
        notes += found.notes
        for record in found:
            try:
                records.append(resolve(record))
            except RecordError as error:
                if on_bad == "stop":
                    raise
                skipped.append(error.skipped)
    return records, skipped, notes
