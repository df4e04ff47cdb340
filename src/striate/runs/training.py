"""The verbs `align` and `tune`: train a model on records, and write the result into a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from striate.data import Records, read
from striate.distributed import init_distributed
from striate.region import FILE as REGION_FILE
from striate.region import Region, auto_size
from striate.roundtrip import verify
from striate.runs.card import training_text, write_card
from striate.runs.options import Only
from striate.runs.run import Run
from striate.runs.stage import Resume, RunLog, Stage
from striate.train import (
    ALIGN,
    TUNE,
    Trained,
    TrainOptions,
    check_images,
    check_tuning,
    find_layers,
    sample_records,
)
from striate.train import align as align_model
from striate.train import tune as tune_model
from striate.train.precision import dtypes_of, size_in
from striate.train.saved import check_room
from striate.vlm import Vlm, load
from striate.vlm.modules import parse_modules

# The projector trains as LLaVA's does: AdamW's settings and the schedule keep their defaults.
PROJECTOR_OPTIONS = Only(
    "epochs steps batch micro_batch learning_rate max_length on_bad_record checkpointing frozen_layers shard workers "
    "seed device dtype attn report_to"
)


def align(
    model: str | Path,
    *,
    data: Path,
    out: Path,
    images: Path | None = None,
    tower: bool = False,
    route: str | None = None,
    resume: Resume = False,
    progress: bool = False,
    options: Annotated[TrainOptions, PROJECTOR_OPTIONS] = ALIGN,
) -> Run:
    """Stage 1: train the projector alone, so that image features mean something to the language model.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records: JSON, JSONL, Parquet, a folder of these or a hub data set.
        out: the run folder to write.
        images: the folder that image paths are relative to; default: the folder of the data.
        tower: train the vision encoder too, for one with fresh weights.
        route: the layers that image tokens pass through, in any form of a region, or auto:25% (those that contribute
            most to image tokens); default: all layers.
        resume: resume the interrupted run in `out`; auto: resume if there is one, else start; changed: resume although
            data, model, code or options have changed.
        progress: show a progress bar.
        options: training options.

    Raises:
        UserError: bad input; the step-1 audit failed; more than 1 % of the records are bad.
    """
    arguments = {"model": model, "data": data, "images": images, "tower": tower, "route": route}
    stage = Stage("align", out, arguments, options, init_distributed(options.device))
    previous = stage.previous(resume)
    if previous and previous.info["status"] == "finished":
        return previous
    vlm = _open_model(model, options)
    records = read(data, images=images, on_bad=options.on_bad_record)
    check_images(records)
    none = Region((), vlm.depth, "none")
    _, chosen_route = _find_layers(vlm, records, none, route, stage, previous, resume)
    with stage.recording(previous) as run:
        if chosen_route is not None:
            run.write_region(none, chosen_route)
        log = _begin(run, vlm, stage, progress=progress)
        trained = align_model(vlm, records, tower=tower, route=chosen_route, options=options, log=log, state=run.state)
        _end(run, trained, stage)
    return run


def tune(
    model: str | Path,
    *,
    data: Path,
    out: Path,
    images: Path | None = None,
    region: str = "uniform:25%",
    route: str | None = None,
    modules: str = "all",
    samples: int | str | None = None,
    method: Literal["auto", "full", "lora"] = "auto",
    projector: Literal["train", "freeze"] = "train",
    rank: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    resume: Resume = False,
    progress: bool = False,
    options: TrainOptions = TUNE,
) -> Run:
    """Stage 2: visual instruction tuning of a region of the decoder's layers, and of the projector.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records: JSON, JSONL, Parquet, a folder of these or a hub data set.
        out: the run folder to write.
        images: the folder that image paths are relative to; default: the folder of the data.
        region: the layers to train, in any form of a region (all, 0,4,8-11, uniform:25%, last:8, ...), or auto:25%:
            chosen by scores of the model and the data, measured first.
        route: the layers that image tokens pass through, in any form of a region; same: the region and layer 0;
            auto:25%: layer 0 and those that contribute most to image tokens, measured first; default: all layers.
        modules: the matrices of these layers that train: all, or some of attention, mlp, gate_up, down, qkv, o,
            separated by commas.
        samples: number (500) or share (25%) of the records to train on, sampled at random by the seed; smaller subsets
            are contained in larger ones; default: all.
        method: full fine-tuning, LoRA, or auto: full where its optimizer states fit into memory, else LoRA.
        projector: train or freeze the projector.
        rank: LoRA rank.
        alpha: LoRA alpha; updates are scaled by alpha / rank.
        dropout: LoRA dropout.
        resume: resume the interrupted run in `out`; auto: resume if there is one, else start; changed: resume although
            data, model, code or options have changed.
        progress: show a progress bar.
        options: training options.

    Raises:
        UserError: bad input; the step-1 audit failed; more than 1 % of the records are bad.
    """
    arguments: dict[str, Any] = {"model": model, "data": data, "images": images}
    modules = parse_modules(modules)
    arguments |= {"region": region, "route": route, "modules": modules, "samples": samples and str(samples)}
    arguments |= {"method": method, "projector": projector, "rank": rank, "alpha": alpha, "dropout": dropout}
    check_tuning(method=method, projector=projector, rank=rank, alpha=alpha, dropout=dropout)
    stage = Stage("tune", out, arguments, options, init_distributed(options.device))
    previous = stage.previous(resume)
    if previous and previous.info["status"] == "finished":
        return previous
    vlm = _open_model(model, options)
    if auto_size("--region", region, vlm.depth) is None:
        vlm.region_parameters(Region.parse(region, vlm.depth), modules)  # raises an error if they are not there
    records = read(data, images=images, on_bad=options.on_bad_record)
    subset = sample_records(records, samples, seed=options.seed)  # measured is what trains
    chosen, chosen_route = _find_layers(vlm, subset, region, route, stage, previous, resume)
    with stage.recording(previous) as run:
        run.write_region(chosen, chosen_route, modules=modules)
        log = _begin(run, vlm, stage, progress=progress)
        trained = tune_model(
            vlm, records, region=chosen, route=chosen_route, modules=modules, samples=samples, method=method,
            projector=projector, rank=rank, alpha=alpha, dropout=dropout, options=options, log=log, state=run.state,
        )  # fmt: skip
        _end(run, trained, stage)
    return run


def _open_model(model: str | Path, options: TrainOptions) -> Vlm:
    """Load the model; one to be quantized or sharded is moved to its device in parts, later."""
    in_parts = options.frozen_layers == "nf4" or options.shard
    device = "cpu" if in_parts else options.device
    vlm = load(model, device=device, attn=options.attn, dequantize=True, mapped=options.shard)
    _ = vlm.processor  # raises an error if it does not fit the model, before anything is written
    return vlm


def _find_layers(
    vlm: Vlm, records: Records, region: Region | str, route: str | None, stage: Stage, previous: Run | None,
    resume: Resume,
) -> tuple[Region, Region | None]:  # fmt: skip
    """The region and the route; those that a resumed run has measured stay, as a GPU rounds differently each time.

    Raises:
        UserError: the layers differ from those of the resumed run, as their scores or their file have changed.
    """
    layers = _keep_measured(previous, "region", region, vlm.depth) or region
    routed = _keep_measured(previous, "route", route, vlm.depth) or route
    found = find_layers(vlm, records, layers, routed, options=stage.options, rank=stage.rank)
    if previous is not None and previous.region is not None:
        before = {"region": previous.region, "route": previous.route}
        stage.check_same(previous, before, dict(zip(before, found, strict=True)), resume)
    return found


def _keep_measured(previous: Run | None, option: str, form: Region | str | None, depth: int) -> Region | None:
    """The layers that a resumed run has measured for the same `auto:25%`; None if there are none."""
    measured = auto_size(f"--{option}", form, depth) is not None
    if previous is None or not measured or previous.info["options"].get(option) != form:
        return None
    saved: Region | None = getattr(previous, option)
    return Region(saved.layers, depth, saved.origin or str(form)) if saved and saved.depth == depth else None


def _begin(run: Run, vlm: Vlm, stage: Stage, *, progress: bool) -> RunLog:
    """Start the log. Raises `UserError` when the trained model does not fit on the disk."""
    for note in vlm.notes if stage.rank.first else ():
        run.warn(note)
    check_room(run.path, size_in(vlm.model, dtypes_of(vlm.model)))
    return RunLog(run, bar=progress and stage.rank.first, report_to=stage.options.report_to)


def _end(run: Run, trained: Trained, stage: Stage) -> None:
    """Write the checkpoint with its card and region, verify it, and delete the saved states."""
    run.update(training=trained.to_json())
    if trained.stopped:
        steps = f"step {trained.steps} of {trained.total_steps}"
        raise KeyboardInterrupt(f"stopped and saved at {steps}; the same command with --resume continues")
    if not stage.rank.first:
        return
    trained.vlm.model.save_pretrained(run.checkpoint)
    trained.vlm.processor.save_pretrained(run.checkpoint)
    trained.region.save(run.checkpoint / REGION_FILE, trained.route, modules=trained.modules)
    text = training_text(run.info, trained.region, trained.route, modules=trained.modules)
    write_card(run.checkpoint, run.info, body=text)
    if note := verify(trained.vlm, run.checkpoint, attn=stage.options.attn, sharded=stage.options.shard):
        run.warn(note)
    shutil.rmtree(run.state, ignore_errors=True)
