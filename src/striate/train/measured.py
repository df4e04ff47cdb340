"""The region and the route to train with; `auto:25%` measures them on the model and the records first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from striate import routing
from striate.data import Records
from striate.distributed import Rank
from striate.errors import UserError
from striate.region import Layers, Region, auto_size, rank_layers, region_by_score
from striate.scores import Scores, score
from striate.scores.consensus import CHOOSING, choose_region
from striate.train.options import TrainOptions
from striate.train.saved import last_saved
from striate.vlm import Vlm
from striate.vlm.devices import default_device

ROUTING = "layer_contribution"
REGION_SAMPLES, ROUTE_SAMPLES = 64, 32


def find_layers(
    vlm: Vlm,
    records: Records,
    region: Layers,
    route: Layers | None,
    *,
    options: TrainOptions,
    rank: Rank,
    state: Path | None = None,
) -> tuple[Region, Region | None]:
    """The layers to train and the route to train with, None where image tokens pass through all layers.

    The region `auto:25%` takes a quarter, from each of as many equal stretches of the depth the layer that several
    scores of 64 records rank highest, where these agree; else `uniform:25%` (see
    `striate.scores.consensus.choose_region`). Anything else is what `Region.parse` accepts.

    The route `auto:25%` takes layer 0 and the layers that contribute most to the image tokens of 32 records, by
    `layer_contribution` (ShortV, 2025), so that with layer 0 there are a quarter of the layers. Anything else is what
    `striate.routing.resolve` accepts.

    Where `state`, the folder for saved states, has one to resume, the layers that were measured before it stay.

    Raises:
        UserError: an unknown form, another depth, or an empty route; `auto` without images or with weights that are not
            on one device yet.
    """
    region_size, route_size = auto_size("--region", region, vlm.depth), auto_size("--route", route, vlm.depth)
    if region_size:
        measure = partial(_find_region, vlm, records, str(region), region_size, options, rank)
        region = _keep_measured(state, "region", str(region), vlm.depth, measure, rank)
    chosen = Region.of(region, vlm.depth)
    if route_size:
        measure = partial(_find_route, vlm, records, str(route), route_size, options, rank)
        route = _keep_measured(state, "route", str(route), vlm.depth, measure, rank)
    return chosen, routing.resolve(route, chosen)


def _keep_measured(
    state: Path | None, option: str, form: str, depth: int, measure: Callable[[], Region], rank: Rank
) -> Region:
    """What was measured for this form before the saved state that is resumed; else measure, and note it there."""
    if state is None:
        return measure()
    file, resumed = state / f"{option}.json", last_saved(state) is not None
    if resumed and file.is_file():
        saved = Region.load(file)
        if saved.origin.partition(",")[0] == form and saved.depth == depth:
            return saved
    found = measure()
    if rank.first and not resumed:
        state.mkdir(parents=True, exist_ok=True)
        found.save(file)
    return found


def _find_region(vlm: Vlm, records: Records, region: str, size: str, options: TrainOptions, rank: Rank) -> Region:
    names = [name for name in CHOOSING if records.has_images or name != ROUTING]
    scores = _measure(vlm, records, names, f"--region {region}", REGION_SAMPLES, options)
    found, sureness = choose_region(list(scores.scores.values()), size, seed=options.seed)
    return Region(_agreed(found, rank), vlm.depth, f"{region}, {sureness}")


def _find_route(vlm: Vlm, records: Records, route: str, size: str, options: TrainOptions, rank: Rank) -> Region:
    measured = _measure(vlm, records, [ROUTING], f"--route {route}", ROUTE_SAMPLES, options)[ROUTING]
    ranked = rank_layers(measured.values, measured.direction)
    found = region_by_score("top", size, sorted(ranked, key=bool), ROUTING)  # layer 0 comes first
    return Region(_agreed(found, rank), vlm.depth, route)


def _measure(vlm: Vlm, records: Records, names: list[str], option: str, samples: int, options: TrainOptions) -> Scores:
    if options.shard or options.frozen_layers != "as_saved":
        form = option.split(" ")[0]
        raise UserError(
            f"{option} measures the model on one device, where --shard and --frozen-layers nf4 never have it: "
            f"score it first, then {form} top:25%@RUN:{ROUTING}"
        )
    routing.unroute(vlm.model)  # in a layer outside its route, image tokens would contribute nothing
    torch.nn.Module.to(vlm.model, options.device or default_device())
    return score(
        vlm, records, metrics=names, samples=samples, batch=options.micro_batch, max_length=options.max_length,
        seed=options.seed, on_bad_record="skip",
    )  # fmt: skip


def _agreed(found: Region, rank: Rank) -> tuple[int, ...]:
    """The layers that the first process found: devices round differently, and all processes need the same ones."""
    return rank.gather(found.layers)[0]
