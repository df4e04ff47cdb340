"""The verbs `score` and `revert`: measure layer scores and perplexities, and write them into a run folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from striate import plot
from striate.data import read
from striate.distributed import Rank, init_distributed
from striate.errors import UserError, at_least
from striate.routing import load
from striate.runs.run import Run, check_place, place
from striate.scores import assemble_scores, choose, measure, parse_groups, revert_samples, weights
from striate.scores.figures import attention_overlay, figures
from striate.scores.revert import Perplexity, Reversion
from striate.scores.sampling import RecordSample, Sampling
from striate.scores.table import Score
from striate.vlm.devices import check_device


def score(
    model: str | Path,
    *,
    data: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
    metrics: str | Sequence[str] = "all",
    backbone: str | None = None,
    samples: int = 64,
    batch: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    allow_urls: bool = False,
    on_bad_record: Literal["stop", "skip"] = "stop",
    progress: bool = False,
) -> Run:
    """Layer scores of a model: attention to the image, change of hidden states, importance for the answers.

    Writes scores.json and figures. A region can be chosen by scores: `top:25%@RUN:block_influence`. After a keyboard
    interrupt the scores measured so far are kept, marked as partial.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers; not needed for scores of weights alone.
        images: the folder that image paths are relative to; default: the folder of the data.
        out: the run folder to write; default: the run that `model` is.
        metrics: names of scores, separated by commas; default: all that the other arguments allow.
        backbone: the language model before visual training, for scores that compare with it.
        samples: number of records to measure on, sampled at random from the records with an answer.
        batch: records per forward pass; the scores do not depend on it.
        max_length: most tokens per record, image tokens included; longer text is truncated at its end.
        seed: random seed of `samples`.
        device: device to run on, such as cpu or cuda:0; default: the GPU if there is one.
        dtype: dtype of the model: auto (that of the checkpoint), float32, bfloat16 or float16.
        allow_urls: download images given as URLs.
        on_bad_record: stop, or list a bad record in skipped.jsonl and continue.
        progress: show a progress bar.

    Raises:
        UserError: `out` is missing, a score is unknown or needs data, images or a backbone, a record is bad, the
            model's weights are corrupted.
    """
    options = dict(locals())
    at_least(1, samples=samples, batch=batch, max_length=max_length)
    rank = init_distributed(device)
    progress = progress and rank.first
    if rank.first:
        check_place(model, out)  # before the work
    if device:
        check_device(device)
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record)
    read_from = partial(read, images=images, allow_urls=allow_urls, on_bad=on_bad_record)
    sample = RecordSample(()) if data is None else sampling.draw(read_from(data))
    names = choose(metrics, backbone=backbone is not None, data=data is not None, images=sample.has_images)
    scores: dict[str, Score] = {}
    with _open_run(model, out, "score", options, rank) as run:
        try:
            of_weights = [name for name in names if name in weights.METRICS]
            if of_weights and backbone is not None:
                _add(weights.weight_scores(model, backbone, names=of_weights), scores, run, model)
            if len(of_weights) < len(names):
                vlm = load(model, device=device, dtype=dtype)
                for note in vlm.notes if rank.first else ():
                    run.warn(note)
                batches = partial(sampling.show_batches, vlm, sample, progress=progress)
                for new in measure(vlm, names, batches, backbone=backbone, rank=rank):
                    _add(new, scores, run, model)
                if rank.first and "image_attention" in names:
                    attention_map = attention_overlay(vlm, sample.records, max_length=max_length)
                    if attention_map:
                        plot.save(attention_map, run.figures, "image_attention_map")
        except KeyboardInterrupt:
            kept = f"the scores so far are in {run.path}, marked as partial" if scores else "nothing was measured yet"
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        finally:
            _list_skipped(run, sample)
        if rank.first:
            _finish(scores, run, model)
    return run


def revert(
    model: str | Path,
    *,
    backbone: str,
    groups: str | Sequence[str],
    out: Path,
    visual: Path | None = None,
    text: Path | None = None,
    images: Path | None = None,
    samples: int = 64,
    batch: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    allow_urls: bool = False,
    on_bad_record: Literal["stop", "skip"] = "stop",
    progress: bool = False,
) -> Run:
    """Perplexity with groups of layers reverted to the backbone (Wang et al. 2025, Figure 1, left).

    Writes results.json and a figure.

    Args:
        model: a model folder, a run folder or a hub id.
        backbone: the language model before visual training; a folder.
        groups: groups of layers to revert: 8-15,16-23 (two groups), each (every layer alone), sliding:8.
        out: the run folder to write.
        visual: records with images and answers.
        text: records without images, or plain text.
        images: the folder that image paths are relative to; default: the folder of the data.
        samples: number of records per data set, sampled at random from the records with an answer.
        batch: records per forward pass; the results do not depend on it.
        max_length: most tokens per record, image tokens included; longer text is truncated at its end.
        seed: random seed of `samples`.
        device: device to run on, such as cpu or cuda:0; default: the GPU if there is one.
        dtype: dtype of the model: auto (that of the checkpoint), float32, bfloat16 or float16.
        allow_urls: download images given as URLs.
        on_bad_record: stop, or list a bad record in skipped.jsonl and continue.
        progress: show a progress bar.

    Raises:
        UserError: data is missing, a group is unknown, the backbone does not match (names the tensor), a record is bad.
    """
    options = dict(locals())
    at_least(1, samples=samples, batch=batch, max_length=max_length)
    rank = init_distributed(device)
    progress = progress and rank.first
    if rank.first:
        check_place(model, out)
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record)
    files = {kind: file for kind, file in (("visual", visual), ("text", text)) if file is not None}
    if not files:
        raise UserError("--visual or --text is required: records with images, records without, or both")
    read_from = partial(read, images=images, allow_urls=allow_urls, on_bad=on_bad_record)
    subsets = {kind: sampling.draw(read_from(file)) for kind, file in files.items()}
    if "visual" in subsets and not subsets["visual"].has_images:
        raise UserError(f"none of the {len(subsets['visual'].records)} records of {visual} has an image (--visual)")
    vlm = load(model, device=device, dtype=dtype)
    layers = parse_groups(groups, vlm.depth)
    with _open_run(model, out, "revert", options, rank) as run:
        for note in vlm.notes if rank.first else ():
            run.warn(note)
        reversions = revert_samples(vlm, layers, sampling, subsets, backbone=backbone, rank=rank, progress=progress)
        for sample in subsets.values():
            _list_skipped(run, sample)
        results = {kind: _to_json(one) for kind, one in reversions.items()}
        run.write_results({"reverted": results})
        figure = plot.revert_profiles({kind: plot.RevertProfile.from_json(one) for kind, one in results.items()})
        if rank.first:
            plot.save(figure, run.figures, "reverted")
    return run


def _open_run(
    model: str | Path, out: Path | None, verb: str, options: dict[str, Any], rank: Rank
) -> AbstractContextManager[Run]:
    """The run that results are written into, as in `place`; only the first process writes."""
    return place(model, out, verb=verb, options=options) if rank.first else nullcontext(Run(Path(out or model)))


def _add(new: Iterable[Score], scores: dict[str, Score], run: Run, model: str | Path) -> None:
    """Add new scores to `scores`, and write all of them, so that an interrupt does not lose them."""
    scores |= {score.name: score for score in new}
    if scores:
        run.write_scores(assemble_scores(scores, model, partial=True).to_json())


def _finish(scores: dict[str, Score], run: Run, model: str | Path) -> None:
    table = assemble_scores(scores, model)
    run.write_scores(table.to_json())
    for plotted in figures(table, run.region):
        plot.save(plotted.figure, run.figures, plotted.name)


def _to_json(reversion: Reversion) -> dict[str, Any]:
    """A reversion, for results.json."""

    def entry(one: Perplexity) -> dict[str, Any]:
        return {"value": one.value, "stderr": None if math.isnan(one.stderr) else one.stderr, "n": one.n}

    groups = {name: entry(one) for name, one in reversion.groups.items()}
    return {"tuned": entry(reversion.tuned), "groups": groups, "backbone": entry(reversion.backbone)}


def _list_skipped(run: Run, sample: RecordSample) -> None:
    for note in sample.notes:
        run.warn(note)
    run.skip(*({"source": one.source, "reason": one.reason} for one in sample.skipped))
