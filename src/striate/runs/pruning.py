"""The verb `prune`: choose layers, remove them from a checkpoint, heal the rest, and write a run folder.

Healing is a short tune after layers were removed (Gromov et al. 2024, section 3.2).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING

from striate.data import read
from striate.errors import UserError, first_line
from striate.prune import all_or_nothing, cut_checkpoint
from striate.prune.choice import Calibration, Criterion
from striate.prune.plan import PruneRequest, Pruning, plan_pruning
from striate.prune.surgery import CONFIG, MAP, WEIGHT_FILES
from striate.region import FILE as REGION_FILE
from striate.roundtrip import free_memory
from striate.routing import load, read_route
from striate.runs.card import CARD, add_text, healing_text, pruning_text
from striate.runs.options import Only, flat
from striate.runs.run import Run
from striate.runs.training import tune
from striate.scores.sampling import RecordSample, Sampling
from striate.scores.table import Scores
from striate.train import TUNE, TrainOptions
from striate.vlm.reading import check_config, model_folder

PARTIAL = ".checkpoint.partial"
HEALING_OPTIONS = Only("steps batch micro_batch learning_rate max_length seed device attn")


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
    dry_run: bool = False,
    heal: Path | None = None,
    heal_layers: HealLayers = "region",
    progress: bool = False,
    options: Annotated[TrainOptions, HEALING_OPTIONS] = TUNE,
) -> Pruning:
    """Remove decoder layers outside the region from a checkpoint, and verify that nothing else changes.

    Verified: skipping the layers at run time, removing them in memory, and loading the pruned checkpoint with plain
    transformers give the same logits and text, bit for bit in float32, with and without an image, with and without a
    cache. One model is in memory at a time; weights are streamed from file to file.

    Args:
        model: a model folder, a run folder or a hub id.
        out: the run folder to write; the pruned model is in its checkpoint.
        region: the layers to keep, in any form of a region; default: the region.json in the model's folder, and its
            route.
        remove: how many layers to remove: 4, 10% (of all), until:1% (as many as raise perplexity on the data by at most
            1 %).
        by: the criterion, the least important layers are removed first: any score, block (consecutive layers, by
            angular distance), bypass_perplexity (one by one, each time the layer that raises perplexity least), or
            random.
        layers: the layers to remove, instead of a criterion: 9,13.
        data: records with answers, for the score and the perplexity; verification takes its prompts from them.
        images: the folder that image paths are relative to; default: the folder of the data.
        scores: scores.json or a run folder with the score, instead of measuring it.
        samples: number of records to measure on, sampled at random from the records with an answer.
        dry_run: write nothing, show the plan and its predicted effect.
        heal: records for a short tune after the removal, with these few options; for all of them prune, then
            `striate tune` the pruned run.
        heal_layers: the layers to heal: the region, the neighbors of removed layers, or none but the projector, which
            is always trained.
        progress: show a progress bar.
        options: training options of the healing; seed, micro_batch, max_length, on_bad_record, device and attn apply to
            measuring, too.

    Returns:
        The layers that are removed, and the effect that this was predicted to have.

    Raises:
        UserError: bad input, or verification failed; names the layers and the reason, and nothing is written.
    """
    arguments, began = dict(locals()), time.monotonic()
    request = PruneRequest(region, remove, layers)
    if not dry_run:
        _check_out(out)
    read_from = partial(read, images=images, on_bad=options.on_bad_record)
    if heal is not None:
        read_from(heal)
    source = _checkpoint(model)
    criterion = Criterion(by, None if scores is None else Scores.load(scores), options.seed)
    if layers is None:
        criterion.check(data=data is not None)
    sampling = Sampling(samples, options.micro_batch, options.max_length, options.seed, options.on_bad_record)
    sample = None if data is None else sampling.draw(read_from(data))
    pruning = _choose(request, criterion, source, sampling, sample, progress, options)
    if dry_run:
        return pruning
    assert out is not None
    recorded = json.loads(json.dumps(flat(arguments), default=str))
    run = Run.create(out, verb="prune", options=recorded, seed=options.seed, parent=str(model))
    run.update(seconds=round(time.monotonic() - began, 3))
    with all_or_nothing(run.path), run.recording():
        _cut(run, source, pruning, sample, options)
    if heal is not None:
        with run.recording():
            heal_checkpoint(
                run, pruning, data=heal, images=images, layers=heal_layers, progress=progress,
                options=options,
            )  # fmt: skip
    return pruning


def _cut(run: Run, source: Path, pruning: Pruning, sample: RecordSample | None, options: TrainOptions) -> None:
    """Write the run: skipped records, the pruned checkpoint and its description."""
    for one in sample.skipped if sample else ():
        run.skip({"source": one.source, "reason": one.reason})
    partial, parent = run.path / PARTIAL, run.info["parent"]
    records = sample.records if sample else ()
    for note in cut_checkpoint(source, partial, pruning.numbers, records=records, options=options):
        run.warn(note)
    cut, route = pruning.to_json(parent), read_route(check_config(str(partial)))
    pruning.region.save(partial / REGION_FILE, route)
    (partial / MAP).write_text(json.dumps(cut, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    add_text(partial, run.info, pruning_text(cut, parent=parent))
    os.replace(partial, run.checkpoint)
    run.write_region(pruning.region, route)
    run.update(prune=cut)


def _choose(
    request: PruneRequest, criterion: Criterion, source: Path, sampling: Sampling, sample: RecordSample | None,
    progress: bool, options: TrainOptions,
) -> Pruning:  # fmt: skip
    """Choose the layers with a model in the checkpoint's dtype, which is freed at the end."""
    vlm = load(source, device=options.device, attn=options.attn)
    calibration = None if sample is None else Calibration(vlm, sampling, sample, progress)
    pruning = plan_pruning(request, criterion, vlm, source, calibration)
    del vlm, calibration
    free_memory()
    return pruning


def _check_out(out: Path | None) -> None:
    if out is None:
        raise UserError("--out is required: a new run folder (or --dry-run, to show the plan only)")
    Run.check_free(out)


def _checkpoint(model: str | Path) -> Path:
    """The folder of a model, of a run or in the hub's cache.

    Raises:
        UserError: the folder has no model, adapters only, or custom code.
    """
    source = Path(model_folder(model))
    if not source.is_dir():
        try:
            source = Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"no model at {str(model)!r}: expected a folder or a hub id ({first_line(error)})"
            ) from error
    config = _config(source)
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{source} is a model with custom code, which striate never runs: it cannot be pruned",
            see="untrusted-checkpoint",
        )
    check_config(str(source))
    return source


def _config(source: Path) -> dict[str, Any]:
    try:
        return json.loads((source / CONFIG).read_bytes())
    except FileNotFoundError:
        return {}  # `check_config` raises the error
    except (OSError, ValueError) as error:
        raise UserError(f"{source / CONFIG} cannot be read: {error}") from None


HealLayers = Literal["region", "neighbors", "projector"]


def heal_checkpoint(
    run: Run, pruning: Pruning, *, data: Path, images: Path | None, layers: HealLayers,
    progress: bool, options: TrainOptions,
) -> None:  # fmt: skip
    """Tune the run's checkpoint, and replace it by the healed one at the end."""
    regions = {"region": str(pruning.region), "neighbors": str(pruning.numbers.neighbors), "projector": "none"}
    route = read_route(check_config(str(run.checkpoint)))
    tuned = tune(
        run.checkpoint, data=data, out=run.path / "heal", images=images, region=regions[layers],
        route=None if route is None else str(route),
        progress=progress, options=options,
    )  # fmt: skip
    for file in run.checkpoint.iterdir():  # the model's other files, and the description of the cut
        if file.is_file() and not WEIGHT_FILES.fullmatch(file.name):
            own = file.name in (CARD, MAP, REGION_FILE)
            if own or not (tuned.checkpoint / file.name).exists():
                shutil.copyfile(file, tuned.checkpoint / file.name)
    add_text(tuned.checkpoint, run.info, healing_text(tuned.info))
    _merge_into(run, tuned)


def _merge_into(run: Run, tuned: Run) -> None:
    """Move the healed checkpoint, its log and its skipped records into the run."""
    for entry in tuned.history():
        run.log(entry)
    for entry in tuned.skipped():
        run.skip(entry)
    for text in tuned.info.get("warnings", ()):
        run.warn(text)
    run.update(training=tuned.info["training"], healed=tuned.info["options"])
    unhealed = run.path / ".unhealed"
    run.checkpoint.rename(unhealed)
    tuned.checkpoint.rename(run.checkpoint)
    shutil.rmtree(unhealed)
    shutil.rmtree(tuned.path)
