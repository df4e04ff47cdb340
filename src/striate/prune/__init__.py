"""Drop decoder layers that do not see, prove that nothing else changed, and hand back a plain checkpoint.

Bypass is the meaning, cut is the act: before anything is saved, the model that skips the layers, the model without them
and the new checkpoint as `transformers` loads it have to agree bit for bit.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING

from striate.data import Record, read
from striate.errors import UserError
from striate.prune.bypass import bypass, cut
from striate.prune.card import pruned_card
from striate.prune.choice import Amount, Calibration, Criterion
from striate.prune.healing import CARD, What, healed
from striate.prune.numbering import Numbering
from striate.prune.plan import Pruning, Wish, planned
from striate.prune.proof import Inputs, probes, prove_cut, prove_saved
from striate.prune.protected import protected
from striate.prune.stream import stored
from striate.prune.surgery import CONFIG, MAP, Surgery
from striate.region import FILE as REGION_FILE
from striate.region import Region
from striate.run import Run, model_folder
from striate.score.sampling import Sample, Sampling
from striate.score.table import Scores
from striate.train import TUNE, TrainOptions
from striate.vlm import check_config, first_line, load

__all__ = [
    "Amount",
    "Criterion",
    "Numbering",
    "Pruning",
    "Surgery",
    "bypass",
    "cut",
    "cut_checkpoint",
    "protected",
    "prune",
]

PARTIAL = ".checkpoint.partial"
ADAPTER = "adapter_config.json"


def prune(
    model: str | Path,
    *,
    out: Path | None = None,
    region: str | None = None,
    remove: str | None = None,
    by: str = "angular_distance",
    layers: str | None = None,
    data: Path | None = None,
    images: Path | None = None,
    scores: Path | None = None,
    samples: int = 64,
    iterative: bool = False,
    dry_run: bool = False,
    heal: Path | None = None,
    heal_layers: What = "region",
    heal_distillation: float = 0.0,
    allow_urls: bool = False,
    progress: bool = False,
    options: TrainOptions = TUNE,
) -> Run | Pruning:
    """Cut decoder layers outside the region out of a checkpoint, after a proof that nothing else changes.

    The proof: skipped at run time, cut in memory, and cut on disk and loaded again by plain transformers, the layers
    leave the same model, bit for bit in float32, with an image and without, with a cache and without. One model is in
    memory at a time; weights are streamed from file to file.

    Args:
        model: a model folder, a run folder or a hub id.
        out: the run folder to write; the pruned model is in its checkpoint.
        region: the layers that must stay, in any form of a region; default: the region.json in the model's folder.
        remove: how many layers go: 4, 10% (of all), until:1% (before perplexity on the data rises by more).
        by: what they are chosen by, the least important first: any score, block (runs of neighbours by angular
            distance), bypass_perplexity (one by one, each time the layer that is missed least), or random.
        layers: the layers that go, instead: 9,13.
        data: records with answers, to measure the score and perplexity on; the proof takes its prompts from them.
        images: the folder that image paths are relative to; default: the folder of the data.
        scores: scores.json or a run folder, to take the score from instead of measuring it.
        samples: records to measure, drawn at random from those with an answer.
        iterative: measure the score again after every cut.
        dry_run: write nothing, show the plan and what it is expected to do.
        heal: records to tune what is left on, for a short while after the cut.
        heal_layers: what heals: the region, the neighbours of the cuts, or the projector alone; with it the projector.
        heal_distillation: share of the healing loss, up to 1, that is learnt from the uncut model's probabilities
            instead of the records' answers; above 0 both models are in memory.
        allow_urls: fetch images given as URLs.
        progress: show a progress bar.
        options: how to heal; measuring too takes its seed, micro_batch, max_length, on_bad_record, device and attn.

    Returns:
        The run, or with `dry_run` the plan.

    Raises:
        UserError: bad input, or the proof failed: names the layers and the reason. Nothing is written then.
    """
    asked = dict(locals())
    began, settings = time.monotonic(), asked.pop("options")
    wish = Wish(region, remove, layers)
    if not dry_run:
        _check_out(out)
    if not 0 <= heal_distillation <= 1:
        raise UserError(f"--heal-distillation {heal_distillation}: a share from 0 to 1 was expected")
    if heal_distillation and heal is None:
        raise UserError("--heal-distillation says how to heal: give records with --heal")
    if heal is not None:
        read(heal, images=images, allow_urls=allow_urls, on_bad=settings.on_bad_record)
    source = _checkpoint(model)
    criterion = Criterion(by, iterative, None if scores is None else Scores.load(scores), settings.seed)
    if layers is None:
        criterion.check(data=data is not None)
    sampling = _sampling(samples, allow_urls, settings)
    sample = None if data is None else sampling.draw(data, images)
    pruning = _plan(wish, criterion, source, sampling, sample, progress, settings)
    if dry_run:
        return pruning
    assert out is not None
    recorded = json.loads(json.dumps({**asked, **vars(settings)}, default=str))
    run = Run.create(out, verb="prune", options=recorded, seed=settings.seed, parent=str(model))
    run.update(seconds=round(time.monotonic() - began, 3))
    with _all_or_nothing(run.path), run.recording():
        _operate(run, source, pruning, sample, settings)
    if heal is not None:
        run.update(status="running")
        with run.recording():
            healed(
                run, pruning, data=heal, images=images, allow_urls=allow_urls, what=heal_layers, progress=progress,
                teacher=source if heal_distillation else None, distillation=heal_distillation, options=settings,
            )  # fmt: skip
    return run


def cut_checkpoint(
    source: Path,
    folder: Path,
    numbers: Numbering,
    *,
    records: Sequence[Record] = (),
    prompts: Mapping[str, Inputs] | None = None,
    options: TrainOptions = TUNE,
) -> None:
    """Write a checkpoint without some of its decoder layers into a new folder, proved equal to bypassing them.

    Args:
        source: a model folder; it is only read.
        folder: the folder to write, which must not be there yet. An error leaves nothing; a kill leaves what does not
            load, or, while it is loaded for the last step of the proof, all of it: give it its name afterwards.
        numbers: the layers that go.
        records: where the prompts of the proof are taken from.
        prompts: the prompts themselves, by name, as the model takes them; default: see `probes`.
        options: its device, attn and max_length count.

    Raises:
        UserError: the proof failed; names the layers and the reason. Or the folder cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: name a new folder")
    _check_space(source, folder)
    packed = "quantization_config" in json.loads((source / CONFIG).read_bytes())
    dtype = "auto" if packed else "float32"  # packed weights have no other type
    with _enough_memory(dtype):
        vlm = load(source, dtype=dtype, device=options.device, attn=options.attn)
        device, surgery = vlm.device, Surgery.of(vlm, source, numbers)
        prompts = probes(vlm, records, max_length=options.max_length) if prompts is None else prompts
        expected = prove_cut(vlm, numbers, prompts)
        del vlm
        _free()  # the next model takes its place
        with _all_or_nothing(folder):
            surgery.write(source, folder)
            prove_saved(folder, expected, prompts, numbers=numbers, device=device, dtype=dtype, attn=options.attn)


def _operate(run: Run, source: Path, pruning: Pruning, sample: Sample | None, options: TrainOptions) -> None:
    """Write the run: what was left out of the data, the checkpoint, and what was done to it."""
    for one in sample.skipped if sample else ():
        run.skip({"source": one.source, "reason": one.reason})
    partial, parent = run.path / PARTIAL, run.info["parent"]
    cut_checkpoint(source, partial, pruning.numbers, records=sample.records if sample else (), options=options)
    told = pruning.to_json(parent)
    _explain(partial, pruning.region, told, name=run.info["name"], parent=parent)
    os.replace(partial, run.checkpoint)
    run.write_region(pruning.region)
    run.update(prune=told)


def _sampling(samples: int, allow_urls: bool, options: TrainOptions) -> Sampling:
    return Sampling(
        samples, options.micro_batch, options.max_length, options.seed, options.on_bad_record, allow_urls
    )  # fmt: skip


def _plan(
    wish: Wish, criterion: Criterion, source: Path, sampling: Sampling, sample: Sample | None, progress: bool,
    options: TrainOptions,
) -> Pruning:  # fmt: skip
    """Choose the layers on a model in the checkpoint's own type; it is gone again when this returns."""
    vlm = load(source, device=options.device, attn=options.attn)
    calibration = None if sample is None else Calibration(vlm, sampling, sample, progress)
    pruning = planned(wish, criterion, vlm, source, calibration)
    del vlm, calibration
    _free()
    return pruning


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _enough_memory(dtype: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the proof needs the whole model in memory ({dtype}), which this device has not: try --device cpu"
        ) from error


def _explain(folder: Path, region: Region, told: dict[str, Any], *, name: str, parent: str) -> None:
    """Region, map and card, beside the weights."""
    region.save(folder / REGION_FILE)
    (folder / MAP).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = folder / CARD
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(pruned_card(before, told, name=name, parent=parent), encoding="utf-8")


def _check_out(out: Path | None) -> None:
    if out is None:
        raise UserError("where to? Name a run folder with --out, or see the plan with --dry-run")
    Run.check_free(out)


def _checkpoint(model: str | Path) -> Path:
    """The folder of a model, of a run or of the hub's cache.

    Raises:
        UserError: no model there, only adapters, or code of its own.
    """
    source = Path(model_folder(model))
    if (source / ADAPTER).is_file():
        raise UserError(
            f"{source} holds adapters that are not merged: merge them into the model first (peft: "
            "PeftModel.from_pretrained(base, adapters).merge_and_unload().save_pretrained(folder))"
        )
    if not source.is_dir():
        try:
            source = Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"no model at {str(model)!r}: expected a folder or a hub id ({first_line(error)})"
            ) from error
    config = _config(source)
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise UserError(f"{source} is a model with code of its own, which striate never runs: it cannot be pruned")
    check_config(str(source))
    return source


def _config(source: Path) -> dict[str, Any]:
    try:
        return json.loads((source / CONFIG).read_bytes())
    except FileNotFoundError:
        return {}  # `check_config` says so
    except (OSError, ValueError) as error:
        raise UserError(f"{source / CONFIG} cannot be read: {error}") from None


def _check_space(source: Path, folder: Path) -> None:
    """Refuse before the work what the disk has no room for."""
    place = next(parent for parent in folder.resolve().parents if parent.is_dir())
    needed, free = sum(shard.path.stat().st_size for shard in stored(source)), shutil.disk_usage(place).free
    if needed > free:
        sizes = f"up to {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
        raise UserError(f"no room for the checkpoint in {place}: {sizes}")


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """What fails inside leaves no folder behind; what the disk refuses is said in one line."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): nothing was kept") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
