"""The progress of an evaluation: saved batch by batch, so that it can resume, and shared by the process group."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from striate.console import console
from striate.data import Record, RecordError, Skipped
from striate.data.record import DatasetImage, ImageSource
from striate.distributed import Rank
from striate.evaluation.prediction import Prediction, predict
from striate.runs.run import Run
from striate.vlm import Vlm
from striate.vlm.reading import model_folder

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
