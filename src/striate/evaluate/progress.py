"""How far an evaluation has come: saved batch by batch to go on from, shared by the processes of a launch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from striate.data import Record, RecordError, Skipped
from striate.data.record import Cell, ImageSource
from striate.evaluate.prediction import Prediction, predict
from striate.processes import Rank
from striate.run import Run, model_folder
from striate.vlm import Vlm

Found = dict[int, Prediction | Skipped]


def merged(rank: Rank, mine: Found) -> Found:
    """What all processes found, in each of them; every process has to call this equally often."""
    return {index: one for part in rank.gathered(mine) for index, one in part.items()}


def identity(model: str | Path, records: Sequence[Record], **options: Any) -> dict[str, Any]:
    """What makes two evaluations the same one: model, records and `options`, as JSON has them.

    A model folder is known by names, sizes and times of its files, records by all that they say and the names of
    their images.
    """
    folder = Path(model_folder(model))
    files = sorted(file for pattern in ("*.json", "*.safetensors") for file in folder.glob(pattern))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = hashlib.sha256()
    for record in records:
        said.update(
            repr(replace(record, images=tuple(_named(image) for image in record.images))).encode(errors="replace")
        )
    return {
        "model": str(model),
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest(),
        "records": said.hexdigest(),
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
    """Ask all records that `run` has no prediction of yet: what was found, in their order, and the seconds it took.

    Only the first process has a `run`; each batch is saved there as it comes. `options` are those of `predict`.

    Raises:
        RecordError: a record cannot be used, with `stop`.
        KeyboardInterrupt: says how many are saved.
    """
    saved = run.begin_predictions(dict(evaluation)) if run else []
    known = merged(rank, {index: one for batch in saved for index, one in _restored(batch)})
    seconds, began = sum(batch["seconds"] for batch in saved), time.monotonic()
    share = (rank.number, rank.of)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("eval", total=len(records), completed=len(known))
        try:
            for mine in predict(vlm, records, known=frozenset(known), share=share, **options):
                found = merged(rank, mine)
                for one in found.values():
                    if stop and isinstance(one, Skipped):
                        raise RecordError(one.source, one.reason)
                known |= found
                took, began = time.monotonic() - began, time.monotonic()
                seconds += took
                if run:
                    run.append_predictions(_saved(found, took))
                bar.update(task, completed=len(known))
        except KeyboardInterrupt:
            answered = f"stopped with {len(known)} of {len(records)} records answered and saved"
            raise KeyboardInterrupt(f"{answered}; the same command goes on") from None
    return [known[index] for index in sorted(known)], seconds


def _saved(found: Found, seconds: float) -> dict[str, Any]:
    """One batch as a line of JSON."""
    kinds = {"predictions": Prediction, "skipped": Skipped}
    return {"seconds": round(seconds, 3)} | {
        name: [[index, asdict(one)] for index, one in found.items() if isinstance(one, kind)]
        for name, kind in kinds.items()
    }


def _restored(batch: Mapping[str, Any]) -> list[tuple[int, Prediction | Skipped]]:
    """The inverse of `_saved`."""
    predictions = [
        (index, Prediction(**fields | {"answers": tuple(fields["answers"]), "images": tuple(fields["images"])}))
        for index, fields in batch["predictions"]
    ]
    return [*predictions, *((index, Skipped(**fields)) for index, fields in batch["skipped"])]


def _named(image: ImageSource) -> str:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, Cell):
        return f"{image.column} {image.index} of row {image.row}"
    return str(image)
