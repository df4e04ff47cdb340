"""The two stages of visual training, `align` and `tune`: two presets of one function on the Hugging Face `Trainer`.

Full tuning keeps the trained weights in float32 while everything frozen stays in the checkpoint's own type; matrix
products run in bfloat16 where the device has units for it. LoRA is merged before saving. Either way the result is a
plain checkpoint in the type that the model came in.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import set_seed

from striate.data import Example, Examples, Records, collate, read
from striate.errors import UserError
from striate.processes import launched
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.run import Run
from striate.train.adapter import adapt, lora_config
from striate.train.card import model_card
from striate.train.fitting import fit, in_bfloat16, need_bitsandbytes
from striate.train.loss import Teacher, answer_nll
from striate.train.memory import full_tuning_fits
from striate.train.nf4 import bring_back, hold_in_nf4
from striate.train.options import ALIGN, TUNE, TrainOptions
from striate.train.saved import check_room, last_saved
from striate.train.selection import drawn, num_drawn
from striate.train.stage import Resume, Stage
from striate.train.trainer import MOST_SKIPPED, Group, Named
from striate.vlm import Plan, Vlm, default_device, load

__all__ = ["ALIGN", "TUNE", "TrainOptions", "align", "answer_nll", "last_saved", "lora_config", "num_drawn", "tune"]


def align(
    model: str | Path,
    *,
    data: Path,
    out: Path,
    images: Path | None = None,
    allow_urls: bool = False,
    tower: bool = False,
    resume: Resume = False,
    force: bool = False,
    progress: bool = False,
    options: TrainOptions = ALIGN,
) -> Run:
    """Stage 1: train the projector alone, so that image features mean something to the language model.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records: JSON, JSONL, Parquet, a folder of these or a hub data set.
        out: the run folder to write.
        images: the folder that image paths are relative to; default: the folder of the data.
        allow_urls: fetch images given as URLs.
        tower: train the vision encoder too, for a fresh one.
        resume: go on with the run in `out` that was stopped; auto: where there is one, else begin.
        force: resume although data, model, code or options are not as they were.
        progress: show a progress bar.
        options: how to train.

    Raises:
        UserError: bad input; the step-1 audit failed; more than 1 % of the records are bad.
    """
    asked = {"model": model, "data": data, "images": images, "allow_urls": allow_urls, "tower": tower}
    stage = Stage("align", out, asked, options, launched(options.device))
    before = stage.before(resume, force=force)
    if before and before.info["status"] == "finished":
        return before
    vlm, saved_as = _open_model(model, options)
    region = Region((), vlm.depth, "none")
    records = read(data, images=images, allow_urls=allow_urls, on_bad=options.on_bad_record)
    with stage.recording(before) as run:
        _check_records(records, run)
        check_room(run.path, vlm.model.num_parameters() * saved_as.itemsize)
        plan = vlm.train_only(region, tower=tower)
        _place(vlm, region, options)
        named = in_full(vlm, plan)
        rate = options.learning_rate or 1e-3
        groups = {"projector": Group(named["projector"], options.projector_learning_rate or rate)}
        if tower:
            groups["tower"] = Group(_reached(vlm, records, named["tower"]), rate)
        fit(vlm, vlm.model, run, records, groups, options, progress=progress)
        if stage.rank.first:
            _save(vlm, run, region, saved_as, options)
    return run


def tune(
    model: str | Path,
    *,
    data: Path,
    out: Path,
    images: Path | None = None,
    allow_urls: bool = False,
    region: str = "uniform:25%",
    samples: int | str | None = None,
    method: Literal["auto", "full", "lora"] = "auto",
    projector: str = "train",
    rank: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    teacher: str | None = None,
    distillation: float = 0.5,
    resume: Resume = False,
    force: bool = False,
    progress: bool = False,
    options: TrainOptions = TUNE,
) -> Run:
    """Stage 2: visual instruction tuning of a region of the decoder's layers, and of the projector.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records: JSON, JSONL, Parquet, a folder of these or a hub data set.
        out: the run folder to write.
        images: the folder that image paths are relative to; default: the folder of the data.
        allow_urls: fetch images given as URLs.
        region: the layers to train, in any form of a region (all, 0,4,8-11, uniform:25%, last:8, ...).
        samples: how many of the records to train on, 500 or 25%, drawn by the seed whatever the region; the records
            of a smaller draw are among those of a larger one; default: all.
        method: full weights, LoRA, or auto: full where its optimiser states fit into memory, else LoRA.
        projector: train it, freeze it, or train it for a share of the steps (30%) and freeze it then: other results.
        rank: of LoRA.
        alpha: of LoRA; its updates are scaled by alpha / rank.
        dropout: of LoRA.
        teacher: a model whose probabilities of the answers' tokens are learnt as well; it stays in memory.
        distillation: the teacher's share of the loss, above 0 and up to 1.
        resume: go on with the run in `out` that was stopped; auto: where there is one, else begin.
        force: resume although data, model, code or options are not as they were.
        progress: show a progress bar.
        options: how to train.

    Raises:
        UserError: bad input; the step-1 audit failed; more than 1 % of the records are bad.
    """
    lora = {"rank": rank, "alpha": alpha, "dropout": dropout}
    asked: dict[str, Any] = {"model": model, "data": data, "images": images, "allow_urls": allow_urls}
    asked |= {"region": region, "samples": samples and str(samples), "method": method, "projector": projector, **lora}
    asked |= {"teacher": teacher, "distillation": distillation if teacher else None}
    share = _projector_share(projector)
    stage = Stage("tune", out, asked, options, launched(options.device))
    before = stage.before(resume, force=force)
    if before and before.info["status"] == "finished":
        return before
    vlm, saved_as = _open_model(model, options)
    chosen = Region.parse(region, vlm.depth)
    records = read(data, images=images, allow_urls=allow_urls, on_bad=options.on_bad_record)
    part = drawn(records, samples, seed=options.seed)
    with stage.recording(before) as run:
        run.write_region(chosen)
        _check_records(records, run)
        check_room(run.path, vlm.model.num_parameters() * saved_as.itemsize)
        plan = vlm.train_only(chosen, projector=share > 0)
        _place(vlm, chosen, options)
        own = plan.trainable // (stage.rank.of if options.shard else 1)
        if method == "full" or (method == "auto" and full_tuning_fits(own, _device(options), options.optimizer)):
            network: Any = vlm.model
            named, rate = in_full(vlm, plan), 2e-5
        else:
            network, named = adapt(vlm, chosen, projector=share > 0, **lora)
            rate = 2e-4
        rates = {"layers": options.learning_rate or rate, "projector": options.projector_learning_rate or 2e-5}
        groups = {part: Group(parameters, rates[part]) for part, parameters in named.items()}
        taught = None if teacher is None else _teacher(teacher, vlm, distillation, options)
        fit(vlm, network, run, part, groups, options, progress=progress, teacher=taught, projector_share=share)
        if network is not vlm.model:
            network.merge_and_unload()
        if stage.rank.first:
            _save(vlm, run, chosen, saved_as, options)
    return run


def _open_model(model: str | Path, options: TrainOptions) -> tuple[Vlm, torch.dtype]:
    """The model, ready to train, and the type that its checkpoint is to be saved in again."""
    set_seed(options.seed)
    in_nf4 = options.frozen_layers == "nf4"
    if in_nf4:
        need_bitsandbytes("--frozen-layers nf4")
    vlm = load(model, device="cpu" if in_nf4 or options.shard else options.device, attn=options.attn)
    saved_as = vlm.model.dtype
    if not in_bfloat16(options.dtype, _device(options)):
        vlm.model.float()
    return vlm, saved_as


def _device(options: TrainOptions) -> torch.device:
    return torch.device(options.device) if options.device else default_device()


def _place(vlm: Vlm, region: Region, options: TrainOptions) -> None:
    """Hold frozen layers as asked, and bring the model to its device; one to be sharded goes there in parts, later."""
    device = torch.device("cpu") if options.shard else _device(options)
    if options.frozen_layers == "nf4":
        dtype = torch.bfloat16 if in_bfloat16(options.dtype, device) else torch.float32
        hold_in_nf4(vlm, region, dtype, device)
    torch.nn.Module.to(vlm.model, device)


def _projector_share(projector: str) -> float:
    """The share of the steps in which the projector trains, in [0, 1]."""
    if projector in ("train", "freeze"):
        return float(projector == "train")
    number = projector.removesuffix("%")
    share = float(number) / 100 if projector.endswith("%") and number.replace(".", "", 1).isdigit() else 0.0
    if not 0 < share <= 1:
        raise UserError(f"projector {projector!r}: train, freeze or a share of the steps such as 30% was expected")
    return share


def _teacher(model: str, student: Vlm, share: float, options: TrainOptions) -> Teacher:
    """The teacher, which has to read the same tokens as the student."""
    if not 0 < share <= 1:
        raise UserError(f"distillation {share}: the teacher's share of the loss was expected, above 0 and up to 1")
    vlm = load(model, device=options.device, attn=options.attn)
    vlm.model.eval()
    if vlm.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise UserError(f"{model} cannot teach this model: its tokenizer has other tokens")
    return Teacher(vlm, share)


def in_full(vlm: Vlm, plan: Plan) -> dict[str, Named]:
    """The parameters of a plan, by part, in float32: bfloat16 would round small updates away."""
    parameters = dict(vlm.model.named_parameters())
    for name in plan.names:
        parameters[name].data = parameters[name].data.float()
    parts = {"layers": plan.layers, "projector": plan.projector, "tower": plan.tower}
    return {part: {name: parameters[name] for name in names} for part, names in parts.items() if names}


def _reached(vlm: Vlm, records: Records, tower: Named) -> Named:
    """The tower's parameters that answers depend on. LLaVA reads an inner layer: what lies above it never trains."""
    examples = Examples(records.records, vlm.processor)
    with_image = (examples[index] for index, record in enumerate(records.records) if record.images)
    probe = next((example for example in with_image if isinstance(example, Example)), None)
    if probe is None:
        raise UserError("no record has a readable image: a tower cannot be trained on this data")
    batch = collate([probe], pad_id=vlm.pad_token_id).to(vlm.device)
    with torch.autocast(vlm.device.type, torch.bfloat16, enabled=vlm.model.dtype != torch.float32):
        loss = answer_nll(vlm, vlm.model, batch).sum()
    gradients = torch.autograd.grad(loss, list(tower.values()), allow_unused=True)
    reached = {name: p for (name, p), gradient in zip(tower.items(), gradients, strict=True) if gradient is not None}
    for name in tower.keys() - reached.keys():
        tower[name].requires_grad_(False)
    return reached


def _check_records(records: Records, run: Run) -> None:
    """List what was left out, and stop when that is too much or all."""
    run.skip(*({"source": record.source, "reason": record.reason} for record in records.skipped))
    total = len(records.records) + len(records.skipped)
    if len(records.skipped) > MOST_SKIPPED * total:
        first = records.skipped[0]
        raise UserError(
            f"{len(records.skipped)} of {total} records are bad, more than {MOST_SKIPPED:.0%}; "
            f"the first is {first.source}: {first.reason}"
        )


def _save(vlm: Vlm, run: Run, region: Region, dtype: torch.dtype, options: TrainOptions) -> None:
    """Write the plain checkpoint, with its card and region, and drop the state that only a resumed run needs."""
    if options.frozen_layers == "nf4":
        bring_back(vlm, region)
    for parameter in vlm.model.parameters():
        parameter.data = parameter.data.to(dtype)
    vlm.model.save_pretrained(run.checkpoint)
    vlm.processor.save_pretrained(run.checkpoint)
    region.save(run.checkpoint / REGION_FILE)
    (run.checkpoint / "README.md").write_text(model_card(run.info, region), encoding="utf-8")
    shutil.rmtree(run.state, ignore_errors=True)
