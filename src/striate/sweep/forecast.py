"""How long the cells of a sweep will take and what memory: by those that have finished, else by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from striate.cost import Counts, Machine, Outline, Setup, Step, outline, this_machine
from striate.cost.outline import Dtype
from striate.data import Example, Examples, read
from striate.errors import UserError
from striate.run import Run
from striate.sweep.cell import FINISHED
from striate.sweep.display import Forecast, Row
from striate.sweep.plan import Plan, Recipe, num_steps
from striate.train.fitting import in_bfloat16
from striate.vlm import default_device

PROBES = 32  # records that are encoded to see how long they are


def forecast(plan: Plan, records: int) -> Forecast:
    """The cells, what they train, and what those take that are still to be done.

    `records` are there to train on.
    """
    finished = [recipe for recipe in plan.recipes if plan.finished(recipe)]
    arithmetic = Arithmetic(plan)
    rows = []
    for recipe in plan.recipes:
        done = recipe in finished
        status = FINISHED if done else recipe.cell.as_it_is().status
        row = Row(recipe.cell.name, status, str(recipe.region), recipe.trainable)
        if not done and finished:
            row = row._replace(seconds=predicted(recipe, finished, records), memory=_measured(recipe, finished))
        elif not done:
            seconds, memory = arithmetic.training(recipe, num_steps(recipe, records))
            row = row._replace(seconds=seconds, memory=memory, counted=memory is not None)
        rows.append(row)
    return Forecast(tuple(rows))


@dataclass
class Arithmetic:
    """What training the cells of a plan takes on this machine, from the model's config and a few records."""

    plan: Plan
    _kept: dict[Any, Any] = field(default_factory=dict)

    def training(self, recipe: Recipe, steps: int | None) -> tuple[float | None, float | None]:
        """Seconds of all steps, and bytes at the peak; None where they cannot be counted, or `steps` is not known."""
        try:
            step = self._step(recipe)
        except UserError:  # the cells say themselves what is wrong with a model or its records
            return None, None
        dtype = _dtype(recipe.tune)
        machine: Machine = self._once(("machine", dtype), lambda: this_machine(dtype))
        return (None if steps is None else steps * step.seconds(*machine.reached)), step.memory.peak

    def _step(self, recipe: Recipe) -> Step:
        tune, dtype = recipe.tune, _dtype(recipe.tune)
        sketch: Outline = self._once(("outline", dtype), lambda: outline(tune["model"], dtype=dtype))
        setup: Setup = self._once("lengths", lambda: _lengths(self.plan, sketch.vlm.processor))
        setup = replace(
            setup, method=tune["method"], projector=tune["projector"] != "freeze", rank=tune["rank"],
            checkpointing=tune["checkpointing"] == "all", batch=tune["batch"],
            micro_batch=min(tune["micro_batch"], tune["batch"]),
        )  # fmt: skip
        counts: Counts = self._once((setup, dtype), lambda: Counts(sketch, setup))
        return counts.step(recipe.region)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _dtype(tune: Mapping[str, Any]) -> Dtype:
    """Of a cell's matrix products on this machine."""
    device = torch.device(tune["device"]) if tune["device"] else default_device()
    return "bfloat16" if in_bfloat16(tune["dtype"], device) else "float32"


def _lengths(plan: Plan, processor: Any) -> Setup:
    """A setup with the mean number of image, text and answer tokens of some records, evenly spread over the data.

    Raises:
        UserError: none of them can be encoded.
    """
    sheet, tune = plan.sheet, plan.recipes[0].tune
    records = read(sheet.data, images=sheet.images, allow_urls=tune["allow_urls"], on_bad="skip").records
    some = records[:: max(1, len(records) // PROBES)][:PROBES]
    encoded = Examples(some, processor, max_length=tune["max_length"])
    examples = [found for found in map(encoded.__getitem__, range(len(some))) if isinstance(found, Example)]
    if not examples:
        raise UserError(f"{sheet.data}: no record can be encoded")
    images = fmean(int(example.image_mask.sum()) for example in examples)
    answers = fmean(int((example.labels >= 0).sum()) for example in examples)
    tokens = fmean(len(example.labels) for example in examples)
    return Setup(
        image_tokens=round(images), answer_tokens=max(1, round(answers)), text_tokens=round(tokens - images - answers)
    )


def _measured(recipe: Recipe, finished: Sequence[Recipe]) -> float | None:
    """Bytes at the peak of finished cells of the same region, on average."""
    alike = [Run(other.cell.runs[0]).info["training"] for other in finished if other.region == recipe.region]
    return 1e9 * fmean(training["peak_memory_gb"] for training in alike) if alike else None


def predicted(recipe: Recipe, finished: Sequence[Recipe], records: int) -> float | None:
    """Seconds that a cell takes: training by the record, all else as a whole, as finished cells took them on average.

    Cells of the same region count alone where there are any. None when no cell has finished, or the number of steps
    is not known. Loading the model is not in it.
    """
    alike = [other for other in finished if other.region == recipe.region] or finished
    steps = num_steps(recipe, records)
    if not alike or steps is None:
        return None
    return fmean(map(_seconds_a_record, alike)) * steps * recipe.tune["batch"] + fmean(map(_other_seconds, alike))


def _seconds_a_record(recipe: Recipe) -> float:
    training = Run(recipe.cell.runs[0]).info["training"]
    return training["seconds"] / max(1, training["samples"])


def _other_seconds(recipe: Recipe) -> float:
    """Of evaluating and pruning."""
    runs = [Run(folder) for folder in recipe.cell.runs]
    return sum((run.results or {}).get("seconds", 0.0) for run in runs) + sum(run.info["seconds"] for run in runs[1:])
