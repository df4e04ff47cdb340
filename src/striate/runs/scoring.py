"""The verbs `score` and `revert`: measure layer scores and perplexities, and write them into a run folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from striate import plot
from striate.distributed import init_distributed
from striate.errors import UserError
from striate.runs.options import flat
from striate.runs.reading import ReadOptions
from striate.runs.run import Run, check_place, place
from striate.scores import Scores, choose, parse_groups, revert_samples, scores_in_turn
from striate.scores.figures import attention_overlay, figures
from striate.scores.revert import Perplexity, Reversion
from striate.scores.sampling import RecordSample
from striate.vlm import Vlm
from striate.vlm.devices import check_device


def score(
    model: str | Path,
    *,
    data: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
    metrics: str | Sequence[str] = "all",
    backbone: str | None = None,
    by: Literal["task"] | None = None,
    progress: bool = False,
    options: ReadOptions = ReadOptions(),  # noqa: B008 (frozen)
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
        by: task: each score also over the records of every task alone, for regions such as
            `top:25%@RUN:layer_contribution:reading`.
        progress: show a progress bar.
        options: how records and the model are read.

    Raises:
        UserError: `out` is missing, a score is unknown or needs data, images or a backbone, no record has a task, a
            record is bad, the model's weights are corrupted.
    """
    recorded = flat(locals())
    rank = init_distributed(options.device)
    progress = progress and rank.first
    check_place(model, out)  # before the work
    if options.device:
        check_device(options.device)
    sample = RecordSample(()) if data is None else options.draw(options.records(data, images))
    names = choose(metrics, backbone=backbone is not None, data=data is not None, images=sample.has_images)
    table: Scores | None = None
    with place(model, out, verb="score", options=recorded) as run:
        open_model = cache(partial(_open_model, model, options, run))
        try:
            for table in scores_in_turn(
                model, open_model, names, options, sample, backbone=backbone, by=by, rank=rank, progress=progress
            ):
                run.write_scores(table.to_json())
            if rank.first and "image_attention" in names:
                attention_map = attention_overlay(open_model(), sample.records, max_length=options.max_length)
                if attention_map:
                    plot.save(attention_map, run.figures, "image_attention_map")
        except KeyboardInterrupt:
            kept = (
                f"the scores so far are in {run.path}, marked as partial"
                if table is not None
                else "nothing was measured yet"
            )
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        finally:
            _list_skipped(run, sample)
        for plotted in figures(table, run.region) if rank.first and table is not None else ():
            plot.save(plotted.figure, run.figures, plotted.name)
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
    progress: bool = False,
    options: ReadOptions = ReadOptions(),  # noqa: B008 (frozen)
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
        progress: show a progress bar.
        options: how records and the model are read.

    Raises:
        UserError: data is missing, a group is unknown, the backbone does not match (names the tensor), a record is bad.
    """
    recorded = flat(locals())
    rank = init_distributed(options.device)
    progress = progress and rank.first
    check_place(model, out)
    files = {kind: file for kind, file in (("visual", visual), ("text", text)) if file is not None}
    if not files:
        raise UserError("--visual or --text is required: records with images, records without, or both")
    subsets = {kind: options.draw(options.records(file, images)) for kind, file in files.items()}
    if "visual" in subsets and not subsets["visual"].has_images:
        raise UserError(f"none of the {len(subsets['visual'].records)} records of {visual} has an image (--visual)")
    vlm = options.model(model)
    layers = parse_groups(groups, vlm.depth)
    with place(model, out, verb="revert", options=recorded) as run:
        for note in vlm.notes:
            run.warn(note)
        reversions = revert_samples(vlm, layers, options, subsets, backbone=backbone, rank=rank, progress=progress)
        for sample in subsets.values():
            _list_skipped(run, sample)
        results = {kind: _to_json(one) for kind, one in reversions.items()}
        run.write_results({"reverted": results})
        figure = plot.revert_profiles({kind: plot.RevertProfile.from_json(one) for kind, one in results.items()})
        if rank.first:
            plot.save(figure, run.figures, "reverted")
    return run


def _open_model(model: str | Path, options: ReadOptions, run: Run) -> Vlm:
    vlm = options.model(model)
    for note in vlm.notes:
        run.warn(note)
    return vlm


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
