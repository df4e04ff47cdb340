"""The route to train with, from what `--route` says."""

from __future__ import annotations

import torch

from striate import routing
from striate.data import Records
from striate.distributed import Rank
from striate.errors import UserError
from striate.region import Region, rank_layers, region_by_score
from striate.scores import score
from striate.train.options import TrainOptions
from striate.vlm import Vlm
from striate.vlm.devices import default_device

METRIC, SAMPLES = "layer_contribution", 32


def find_route(
    vlm: Vlm, records: Records, route: Region | str | None, region: Region, *, options: TrainOptions, rank: Rank
) -> Region | None:
    """The route to train with; None where image tokens pass through all layers.

    `auto:25%` takes layer 0 and the layers that contribute most to the image tokens of 32 records, by
    `layer_contribution` (ShortV, 2025), so that with layer 0 there are a quarter of the layers. Anything else is
    what `striate.routing.resolve` accepts.

    Raises:
        UserError: an unknown form, another depth, or an empty region; `auto` without images or with weights that are
            not on one device yet.
    """
    size = routing.auto_size(route, vlm.depth)
    if size is None:
        return routing.resolve(route, region)
    if options.shard or options.frozen_layers != "as_saved":
        raise UserError(
            f"--route {route} measures the model on one device, where --shard and --frozen-layers nf4 never have it: "
            f"score it first, then --route top:25%@RUN:{METRIC}"
        )
    routing.unroute(vlm.model)  # in a layer outside its route, image tokens would contribute nothing
    torch.nn.Module.to(vlm.model, options.device or default_device())
    measured = score(
        vlm, records, metrics=METRIC, samples=SAMPLES, batch=options.micro_batch, max_length=options.max_length,
        seed=options.seed, on_bad_record="skip",
    )  # fmt: skip
    ranked = rank_layers(measured[METRIC].values, measured[METRIC].direction)
    found = region_by_score("top", size, sorted(ranked, key=bool), METRIC)  # layer 0 comes first
    first = rank.gather(found.layers)[0]  # devices round differently, and all processes need one route
    return routing.resolve(Region(first, vlm.depth, str(route)), region)
