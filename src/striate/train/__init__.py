"""The two stages of visual training, `align` and `tune`, on a model in memory.

Full fine-tuning keeps the trained weights in float32 and all frozen weights in the checkpoint's dtype; GEMMs run in
bfloat16 where the device supports it natively. LoRA adapters are merged at the end. Either way the model has the
checkpoint's dtypes afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from striate import routing
from striate.data import Record, Records
from striate.distributed import Rank, init_distributed
from striate.errors import UserError, check_choices
from striate.region import Layers, Region
from striate.train.adapter import adapt, lora_config
from striate.train.fit import Trained, fit, in_bfloat16
from striate.train.loss import answer_nll
from striate.train.measured import find_layers
from striate.train.memory import full_tuning_fits
from striate.train.optimizer import Group, Named
from striate.train.options import ALIGN, TUNE, TrainOptions, check_launch
from striate.train.precision import Before, cast, cast_for_training, quantize_frozen_layers, restore
from striate.train.records import log_skipped, num_samples, sample_records
from striate.train.saved import last_saved
from striate.train.watch import Log
from striate.vlm import Selection, Vlm, select
from striate.vlm.devices import default_device

__all__ = [
    "ALIGN",
    "TUNE",
    "TrainOptions",
    "Trained",
    "align",
    "answer_nll",
    "check_images",
    "check_tuning",
    "find_layers",
    "in_bfloat16",
    "last_saved",
    "lora_config",
    "num_samples",
    "sample_records",
    "tune",
]

Projector = Literal["train", "freeze"]
Method = Literal["auto", "full", "lora"]


def align(
    vlm: Vlm,
    records: Iterable[Record],
    *,
    tower: bool = False,
    route: Layers | None = None,
    options: TrainOptions = ALIGN,
    log: Log | None = None,
    state: str | Path | None = None,
) -> Trained:
    """Stage 1: train the projector alone, so that image features mean something to the language model.

    Args:
        vlm: the model, which is trained in place.
        records: the training records.
        tower: train the vision encoder too, for one with fresh weights.
        route: the layers that image tokens pass through: a region in any form, or `auto:25%` (see `find_layers`);
            default: all layers.
        options: how to train.
        log: receives every step; default: a new one, in the result.
        state: the folder for saved states, the last of which is resumed; default: no states are saved.

    Raises:
        UserError: bad input; the model cannot be routed; the step-1 audit failed; more than 1 % of the records are bad.
    """
    rank, state = init_distributed(options.device), Path(state) if state else None
    check_launch(options, rank)
    _check_merged(vlm)
    records = Records.of(records)
    check_images(records)
    log = log_skipped(records, options, log or Log())
    region, chosen_route = find_layers(vlm, records, "none", route, options=options, rank=rank, state=state)
    _replace_route(vlm, chosen_route, log)
    before = _prepare(vlm, region, options)
    try:
        named = named_parameters(vlm, select(vlm, region, tower=tower))
        _cast(vlm, options)
        rate = _or_default(options.learning_rate, 1e-3)
        rates = {"projector": _or_default(options.projector_learning_rate, rate), "tower": rate}
        groups = {part: Group(parameters, rates[part]) for part, parameters in named.items()}
        trained = fit(
            vlm, vlm.model, region, records, groups, options, route=chosen_route, rank=rank, log=log, state=state
        )  # fmt: skip
    except BaseException:
        _finish(vlm, vlm.model, before, None, options)
        raise
    _finish(vlm, vlm.model, before, None if trained.stopped and state else trained, options)
    return trained


def tune(
    vlm: Vlm,
    records: Iterable[Record],
    *,
    region: Layers = "uniform:25%",
    route: Layers | None = None,
    modules: str = "all",
    samples: int | str | None = None,
    method: Method = "auto",
    projector: Projector = "train",
    rank: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    options: TrainOptions = TUNE,
    log: Log | None = None,
    state: str | Path | None = None,
) -> Trained:
    """Stage 2: visual instruction tuning of a region of the decoder's layers, and of the projector.

    Args:
        vlm: the model, which is trained in place.
        records: the training records.
        region: the layers to train: a region in any form, their numbers, or `auto:25%` (measured, see `find_layers`).
        route: the layers that image tokens pass through: a region in any form, `same` (the trained layers and layer 0),
            or `auto:25%` (measured, see `find_layers`); default: all layers. See `striate.route`.
        modules: the matrices of these layers that train: all, or some of attention, mlp, gate_up, down, qkv, o,
            separated by commas.
        samples: number (500) or share (25%) of the records to train on, sampled at random by the seed; smaller subsets
            are contained in larger ones; default: all.
        method: full fine-tuning, LoRA, or auto: full where its optimizer states fit into memory, else LoRA.
        projector: train or freeze the projector.
        rank: of LoRA.
        alpha: of LoRA; its updates are scaled by alpha / rank.
        dropout: of LoRA.
        options: how to train.
        log: receives every step; default: a new one, in the result.
        state: the folder for saved states, the last of which is resumed; default: no states are saved.

    Raises:
        UserError: bad input; the model cannot be routed; the step-1 audit failed; more than 1 % of the records are bad.
    """
    process, state = init_distributed(options.device), Path(state) if state else None
    check_launch(options, process)
    _check_merged(vlm)
    check_tuning(method=method, projector=projector, rank=rank, alpha=alpha, dropout=dropout)
    records = Records.of(records)
    subset = sample_records(records, samples, seed=options.seed)
    log = log_skipped(records, options, log or Log())
    chosen, chosen_route = find_layers(vlm, subset, region, route, options=options, rank=process, state=state)
    plan = select(vlm, chosen, modules=modules, projector=projector == "train")
    _replace_route(vlm, chosen_route, log)
    before = _prepare(vlm, chosen, options)
    network: Any = vlm.model
    try:
        if method == "full" or (method == "auto" and _full_tuning_fits(plan, options, process)):
            named, rate = named_parameters(vlm, plan), 2e-5
        else:
            lora = {"rank": rank, "alpha": alpha, "dropout": dropout}
            network, named = adapt(vlm, chosen, modules=plan.modules, projector=projector == "train", **lora)
            rate = 2e-4
        _cast(vlm, options)
        rates = {
            "layers": _or_default(options.learning_rate, rate),
            "projector": _or_default(options.projector_learning_rate, 2e-5),
        }
        groups = {part: Group(parameters, rates[part]) for part, parameters in named.items()}
        trained = fit(
            vlm, network, chosen, subset, groups, options, modules=plan.modules, route=chosen_route, rank=process,
            log=log, state=state,
        )  # fmt: skip
    except BaseException:
        _finish(vlm, network, before, None, options)
        raise
    _finish(vlm, network, before, None if trained.stopped and state else trained, options)
    return trained


def _check_merged(vlm: Vlm) -> None:
    """Raise `UserError` for a model with adapters of another trainer: it could not be saved after the training."""
    if getattr(vlm.model, "peft_config", None):
        raise UserError(
            "the model has adapters that are not merged: call merge_and_unload() of the peft model first",
            see="unmerged-adapters",
        )


def _replace_route(vlm: Vlm, route: Region | None, log: Log) -> None:
    """Turn the route of the model's checkpoint off, and log what is unusual about the one to train with."""
    before = routing.read_route(vlm.model.config)
    routing.unroute(vlm.model)
    if before and not route:
        log.warn(f"the checkpoint was routed through {before} and is not any more: --route {before} keeps its route")
    if route and 0 not in route:
        log.warn(f"layer 0, which images need most, is not in the route {route}")


def _prepare(vlm: Vlm, region: Region, options: TrainOptions) -> Before:
    """Quantize frozen layers (`--frozen-layers nf4`) and move the model to its device; with `shard`, `fit` moves it.

    Returns what the model was before.
    """
    _ = vlm.processor  # tried on the model before trained weights have another dtype
    torch.manual_seed(options.seed)  # of adapters
    bf16 = in_bfloat16(options.dtype, _device(options))
    before = Before.of(vlm.model, bf16=bf16)
    if options.shard:
        return before
    if not bf16:
        vlm.model.float()
    device = _device(options)
    if options.frozen_layers == "nf4":
        dtype = torch.bfloat16 if bf16 else torch.float32
        before.linear.update(quantize_frozen_layers(vlm, region, dtype, device))
    torch.nn.Module.to(vlm.model, device)
    return before


def _cast(vlm: Vlm, options: TrainOptions) -> None:
    """Cast the weights for training; with `shard`, `fit` casts each unit as it shards it."""
    if not options.shard:
        cast_for_training(vlm.model, bf16=in_bfloat16(options.dtype, _device(options)))


def _finish(vlm: Vlm, network: Any, before: Before, trained: Trained | None, options: TrainOptions) -> None:
    """Merge adapters, restore frozen weights bit for bit and all dtypes to those of the checkpoint, set its route.

    Without a result, after an error or where the state was saved, adapters are taken off and the route of before is
    turned on again, so that the model can be trained again, or resumed; weights that were trained in place stay so.
    """
    if trained is None and options.shard:  # no process has the whole model
        return
    restore(vlm.model, before)
    if network is not vlm.model:
        network.merge_and_unload() if trained else network.unload()
    cast(vlm.model, before.dtypes)
    vlm.model.eval()
    if trained:
        routing.write_route(vlm.model.config, trained.route)
    routing.open_route(vlm)


def _device(options: TrainOptions) -> torch.device:
    return torch.device(options.device) if options.device else default_device()


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def check_tuning(*, method: str, projector: str, rank: int, alpha: int, dropout: float) -> None:
    """Raise `UserError` for options that `tune` does not accept, before any work."""
    check_choices(get_type_hints(tune), {"method": method, "projector": projector})
    for name, value, valid, expected in (
        ("rank", rank, rank >= 1, "at least 1"),
        ("alpha", alpha, alpha > 0, "more than 0"),
        ("dropout", dropout, 0 <= dropout < 1, "a share of at least 0 and below 1"),
    ):
        if not valid:
            raise UserError(f"--{name} {value}: {expected} was expected")


def check_images(records: Records) -> None:
    """Raise `UserError` when no record has an image: the projector trains on images only."""
    if not records.has_images:
        raise UserError("no record has an image, which the projector needs to learn; text alone is for tune")


def _full_tuning_fits(plan: Selection, options: TrainOptions, rank: Rank) -> bool:
    """Whether full fine-tuning fits on the device of every process: all processes train by one method."""
    own = plan.trainable // (rank.world_size if options.shard else 1)
    return all(rank.gather(full_tuning_fits(own, _device(options), options.optimizer)))


def trainable_parameters(vlm: Vlm, plan: Selection) -> dict[str, Named]:
    """The parameters of a plan by part, cast to float32: bfloat16 would round small updates away."""
    named = named_parameters(vlm, plan)
    for parameters in named.values():
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
    return named


def named_parameters(vlm: Vlm, plan: Selection) -> dict[str, Named]:
    """The parameters of a plan by part."""
    parameters = dict(vlm.model.named_parameters())
    parts = {"layers": plan.layers, "projector": plan.projector, "tower": plan.tower}
    return {part: {name: parameters[name] for name in names} for part, names in parts.items() if names}
