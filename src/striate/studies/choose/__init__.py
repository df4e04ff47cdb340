"""Propose what to train for one's own model, data and machine: region, modules, method and route, with the reasons.

The layers come from scores that are measured here, what fits from `cost`, the route from the answers' loss. Only what
was measured is claimed: that a region of these layers beats `uniform` at equal cost, no measurement has shown yet.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated

from striate.data import Example, Examples, Skipped
from striate.errors import UserError
from striate.routing import unroute
from striate.runs.options import Only
from striate.runs.reading import ReadOptions
from striate.scores import Scores, scores_in_turn
from striate.scores.consensus import CHOOSING, choose_region
from striate.scores.sampling import RecordSample, Sampling
from striate.studies.choose.choice import Choice, RouteLoss, route_loss
from striate.studies.choose.fitting import Budget, fit
from striate.studies.cost import Setup
from striate.vlm import Vlm

__all__ = ["Budget", "Choice", "choose", "propose"]


def choose(
    model: str,
    *,
    data: Path,
    images: Path | None = None,
    budget: str | None = None,
    gpu: str | None = None,
    out: Path | None = None,
    progress: bool = False,
    options: Annotated[ReadOptions, Only("samples batch on_bad_record device dtype")] = ReadOptions(),  # noqa: B008
) -> Choice:
    """Propose region, modules, method and route for a model, data and budget, with the reasons, as a recipe of `tune`.

    Measures layer scores and the loss with a route on a sample of the records, and predicts memory and time.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers.
        images: the folder that image paths are relative to; default: the folder of the data.
        budget: the most memory, time, or both of a training run: 24GB, 2h, 24GB,90min; default: the memory of the GPU,
            or what is free on this machine.
        gpu: the GPU to train on, of the table of `cost` (h100, a100-80gb, rtx-4090, ...); default: this machine.
        out: the recipe to write (plan.yaml), for `striate tune --config`.
        progress: show a progress bar.
        options: how records and the model are read.

    Raises:
        UserError: bad input, no budget that anything fits into, `out` exists already.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists already: name another --out, or remove it", see="folder-in-use")
    limits = Budget.parse(budget, gpu=gpu, device=options.device)
    records = options.records(data, images)
    sample = options.draw(records)
    choice = propose(
        options.model(model), sample, num_records=len(records), budget=limits, sampling=options, progress=progress
    )
    choice = choice.of(model=model, data=data, images=images)
    if out is not None:
        choice.save(out)
    return choice


def propose(
    vlm: Vlm,
    sample: RecordSample,
    *,
    num_records: int,
    budget: Budget,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    progress: bool = False,
) -> Choice:
    """What to train, for a model loaded from a folder and a sample of its `num_records` training records.

    Raises:
        UserError: a record cannot be used, or nothing fits into the budget.
    """
    unroute(vlm.model)
    # First, so that nothing is measured for a budget that nothing fits into.
    fitting = fit(vlm, _setup(vlm, sample, sampling), budget, num_records)
    scores = _measure(vlm, sample, sampling, progress=progress)
    region, sureness = choose_region(list(scores.scores.values()), len(fitting.region), seed=sampling.seed)
    fitting = fitting.of(region)
    batches = partial(sampling.show_batches, vlm, sample, "route", progress=progress)
    lost = route_loss(vlm, region, batches) if sample.has_images else RouteLoss(why="no record has an image")
    if lost.harmless:
        fitting = fitting.of(region, "same")
    return Choice(scores, fitting, sureness, lost, budget, num_records)


def _measure(vlm: Vlm, sample: RecordSample, sampling: Sampling, *, progress: bool) -> Scores:
    names = [name for name in CHOOSING if sample.has_images or name != "layer_contribution"]
    *_, scores = scores_in_turn(vlm.source, lambda: vlm, names, sampling, sample, backbone=None, progress=progress)
    return scores


def _setup(vlm: Vlm, sample: RecordSample, sampling: Sampling) -> Setup:
    """The mean numbers of tokens of the sample's records.

    Raises:
        UserError: no record can be used.
    """
    examples = Examples(sample.records, vlm.processor, max_length=sampling.max_length, truncate_text=True)
    encoded = [examples[index] for index in range(len(examples))]
    read = [example for example in encoded if isinstance(example, Example)]
    if not read:
        bad = next(one for one in encoded if isinstance(one, Skipped))
        raise UserError(
            f"none of the {len(encoded)} records can be used: {bad.source}: {bad.reason}", see="bad-records"
        )
    image, answer, every = (
        math.ceil(sum(numbers) / len(read))
        for numbers in zip(
            *((int(one.image_mask.sum()), int((one.labels >= 0).sum()), len(one)) for one in read), strict=True
        )
    )
    return Setup(image_tokens=image, answer_tokens=answer, text_tokens=max(0, every - image - answer))
