"""Predicted time and memory of the cells of a sweep: from finished cells, else computed from the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from striate.data import Example, Examples, read
from striate.errors import UserError
from striate.runs.run import Run
from striate.studies.cost import Counts, FakeModel, Machine, Setup, Step, fake_model, this_machine
from striate.studies.cost.fake_model import Dtype
from striate.studies.sweep.cell import FINISHED
from striate.studies.sweep.display import Forecast, ForecastRow
from striate.studies.sweep.plan import Recipe, SweepPlan, num_steps
from striate.train.fit import in_bfloat16
from striate.vlm.devices import default_device

PROBES = 32  # records that are encoded to measure their length


def forecast(plan: SweepPlan, records: int) -> Forecast:
    """The cells, what they train, and the time and memory of the unfinished ones; `records` is the size of the data."""
    finished = [recipe for recipe in plan.recipes if plan.finished(recipe)]
    cost_model = CostModel(plan)
    rows = []
    for recipe in plan.recipes:
        done = recipe in finished
        status = FINISHED if done else recipe.cell.refresh().status
        row = ForecastRow(recipe.cell.name, status, str(recipe.region), recipe.trainable)
        if not done and finished:
            row = row._replace(seconds=predict(recipe, finished, records), memory=_measured_memory(recipe, finished))
        elif not done:
            seconds, memory = cost_model.training(recipe, num_steps(recipe, records))
            row = row._replace(seconds=seconds, memory=memory, counted=memory is not None)
        rows.append(row)
    return Forecast(tuple(rows))


@dataclass
class CostModel:
    """The computed cost of training the cells of a plan on this machine, from the model's config and a few records."""

    plan: SweepPlan
    _kept: dict[Any, Any] = field(default_factory=dict)

    def training(self, recipe: Recipe, steps: int) -> tuple[float | None, float | None]:
        """Seconds of all steps and peak bytes; None if they cannot be computed."""
        try:
            step = self._step(recipe)
        except UserError:  # running the cells reports what is wrong with a model or its records
            return None, None
        dtype = _dtype(recipe.tune)
        machine: Machine = self._once(("machine", dtype), lambda: this_machine(dtype))
        return steps * step.seconds(*machine.reached), step.memory.peak

    def _step(self, recipe: Recipe) -> Step:
        tune, dtype = recipe.tune, _dtype(recipe.tune)
        fake: FakeModel = self._once(("fake_model", dtype), lambda: fake_model(tune["model"], dtype=dtype))
        setup: Setup = self._once("lengths", lambda: _lengths(self.plan, fake.vlm.processor))
        setup = replace(
            setup, method=tune["method"], projector=tune["projector"] != "freeze", rank=tune["rank"],
            checkpointing=tune["checkpointing"] == "all", batch=tune["batch"],
            micro_batch=min(tune["micro_batch"], tune["batch"]),
        )  # fmt: skip
        counts: Counts = self._once((setup, dtype), lambda: Counts(fake, setup))
        return counts.step(recipe.region)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _dtype(tune: Mapping[str, Any]) -> Dtype:
    """The dtype of a cell's matmuls on this machine."""
    device = torch.device(tune["device"]) if tune["device"] else default_device()
    return "bfloat16" if in_bfloat16(tune["dtype"], device) else "float32"


def _lengths(plan: SweepPlan, processor: Any) -> Setup:
    """A setup with the mean number of image, text and answer tokens of some records, evenly spread over the data.

    Raises:
        UserError: none of them can be encoded.
    """
    sheet, tune = plan.sheet, plan.recipes[0].tune
    records = read(sheet.data, images=sheet.images, allow_urls=tune["allow_urls"], on_bad="skip").records
    some = records[:: max(1, len(records) // PROBES)][:PROBES]
    encoded = Examples(some, processor, max_length=tune["max_length"])
    examples = [one for one in map(encoded.__getitem__, range(len(some))) if isinstance(one, Example)]
    if not examples:
        raise UserError(f"{sheet.data}: no record can be encoded")
    images = fmean(int(example.image_mask.sum()) for example in examples)
    answers = fmean(int((example.labels >= 0).sum()) for example in examples)
    tokens = fmean(len(example.labels) for example in examples)
    return Setup(
        image_tokens=round(images), answer_tokens=max(1, round(answers)), text_tokens=round(tokens - images - answers)
    )


def _measured_memory(recipe: Recipe, finished: Sequence[Recipe]) -> float | None:
    """Mean peak bytes of finished cells of the same region."""
    alike = [Run(other.cell.runs[0]).info["training"] for other in finished if other.region == recipe.region]
    return 1e9 * fmean(training["peak_memory_gb"] for training in alike) if alike else None


def predict(recipe: Recipe, finished: Sequence[Recipe], records: int) -> float | None:
    """Predicted seconds of a cell: mean training time per record and mean time of everything else of finished cells.

    Cells of the same region count alone where there are any. None when no cell has finished. Loading the model is
    not counted.
    """
    alike = [other for other in finished if other.region == recipe.region] or finished
    steps = num_steps(recipe, records)
    if not alike:
        return None
    return fmean(map(_seconds_per_record, alike)) * steps * recipe.tune["batch"] + fmean(map(_other_seconds, alike))


def _seconds_per_record(recipe: Recipe) -> float:
    training = Run(recipe.cell.runs[0]).info["training"]
    return training["seconds"] / max(1, training["samples"])


def _other_seconds(recipe: Recipe) -> float:
    """Seconds of evaluation and pruning."""
    runs = [Run(folder) for folder in recipe.cell.runs]
    return sum((run.results or {}).get("seconds", 0.0) for run in runs) + sum(run.info["seconds"] for run in runs[1:])
