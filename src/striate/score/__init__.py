"""Where a language model sees: the layer scores, and what becomes of perplexity when layers are put back.

`score` measures any of `METRICS` over a sample of records; `revert` is the paper's Figure 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from striate import plot
from striate.errors import UserError
from striate.processes import Rank, launched
from striate.run import Run, check_place, place
from striate.score import weights
from striate.score.figures import figures, looks
from striate.score.metrics import METRICS, choose, measure
from striate.score.revert import Perplexity, Reversion, parse_groups
from striate.score.revert import revert as reverted
from striate.score.sampling import Sample, Sampling
from striate.score.table import Metric, Score, Scores, order, rank_correlation
from striate.vlm import load

__all__ = [
    "METRICS",
    "Metric",
    "Reversion",
    "Score",
    "Scores",
    "measure",
    "order",
    "rank_correlation",
    "revert",
    "score",
]


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
    """Layer scores of a model: where it looks at the image, where hidden states turn, which layers answers need.

    Writes scores.json and figures. A region can be chosen by them: `top:25%@RUN:block_influence`. A keyboard
    interrupt leaves what was measured until then, marked as partial.

    Args:
        model: a model folder, a run folder or a hub id.
        data: records with answers; scores of weights alone need none.
        images: the folder that image paths are relative to; default: the folder of the data.
        out: the run folder to write; default: the scores go into the run that `model` is.
        metrics: names of scores, separated by commas; default: all that can be had from what is given.
        backbone: the language model before visual training, for scores that compare with it.
        samples: records to measure, drawn at random from those with an answer.
        batch: records a forward pass; the scores do not depend on it.
        max_length: most tokens of a record, image tokens included; longer text is cut at its end.
        seed: of the draw of `samples`.
        device: cpu to stay off a GPU.
        dtype: auto (as saved), float32, bfloat16 or float16.
        allow_urls: fetch images given as URLs.
        on_bad_record: stop, or list it in skipped.jsonl and go on.
        progress: show a progress bar.

    Raises:
        UserError: nowhere to write, an unknown score, or one that needs data, images or a backbone that is not given;
            a bad record; a model whose weights are broken.
    """
    options = dict(locals())
    rank = launched(device)
    progress = progress and rank.first
    if rank.first:
        check_place(model, out)  # refused now, not after the work
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record, allow_urls)
    sample = Sample(()) if data is None else sampling.draw(data, images)
    names = choose(metrics, backbone=backbone is not None, data=data is not None, images=sample.has_images)
    found: dict[str, Score] = {}
    with _place(model, out, "score", options, rank) as run:
        try:
            of_weights = [name for name in names if name in weights.METRICS]
            if of_weights and backbone is not None:
                _keep(weights.weight_scores(model, backbone, names=of_weights), found, run, model)
            if len(of_weights) < len(names):
                vlm = load(model, device=device, dtype=dtype)
                batches = partial(sampling.shown, vlm, sample, progress=progress)
                for scores in measure(vlm, names, batches, backbone=backbone, rank=rank):
                    _keep(scores, found, run, model)
                if (
                    rank.first
                    and "image_attention" in names
                    and (picture := looks(vlm, sample.records, max_length=max_length))
                ):
                    plot.save(picture, run.figures, "image_attention_map")
        except KeyboardInterrupt:
            kept = f"what was measured is in {run.path}, marked as partial" if found else "nothing was measured yet"
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        finally:
            _list_skipped(run, sample)
        if rank.first:
            _finish(found, run, model)
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
    """Perplexity with groups of layers put back to the backbone: what they learnt (Wang et al. 2025, Figure 1, left).

    Writes results.json and a figure.

    Args:
        model: a model folder, a run folder or a hub id.
        backbone: the language model before visual training; a folder.
        groups: layers to put back: 8-15,16-23 (a group each), each (every layer alone), sliding:8.
        out: the run folder to write.
        visual: records with images and answers.
        text: records without images, or plain text.
        images: the folder that image paths are relative to; default: the folder of the data.
        samples: records of each set, drawn at random from those with an answer.
        batch: records a forward pass; the results do not depend on it.
        max_length: most tokens of a record, image tokens included; longer text is cut at its end.
        seed: of the draw of `samples`.
        device: cpu to stay off a GPU.
        dtype: auto (as saved), float32, bfloat16 or float16.
        allow_urls: fetch images given as URLs.
        on_bad_record: stop, or list it in skipped.jsonl and go on.
        progress: show a progress bar.

    Raises:
        UserError: no data, an unknown group, a backbone that does not match (names the tensor), a bad record.
    """
    options = dict(locals())
    rank = launched(device)
    progress = progress and rank.first
    if rank.first:
        check_place(model, out)
    sampling = Sampling(samples, batch, max_length, seed, on_bad_record, allow_urls)
    files = {kind: file for kind, file in (("visual", visual), ("text", text)) if file is not None}
    if not files:
        raise UserError("perplexity of what? give records with images (--visual), without (--text), or both")
    drawn = {kind: sampling.draw(file, images) for kind, file in files.items()}
    if "visual" in drawn and not drawn["visual"].has_images:
        raise UserError(f"none of the {len(drawn['visual'].records)} records of {visual} has an image (--visual)")
    vlm = load(model, device=device, dtype=dtype)
    layers = parse_groups(groups, vlm.depth)
    with _place(model, out, "revert", options, rank) as run:
        with ExitStack() as stack:
            streams = ((kind, sampling.shown(vlm, sample, kind, progress=progress)) for kind, sample in drawn.items())
            sets = {kind: stack.enter_context(closing(stream)) for kind, stream in streams}
            found = reverted(vlm, layers, backbone=backbone, sets=sets, rank=rank)
        for sample in drawn.values():
            _list_skipped(run, sample)
        results = {kind: _told(one) for kind, one in found.items()}
        run.write_results({"reverted": results})
        figure = plot.reverted({kind: plot.Reverted.from_json(one) for kind, one in results.items()})
        if rank.first:
            plot.save(figure, run.figures, "reverted")
    return run


def _place(
    model: str | Path, out: Path | None, verb: str, options: dict[str, Any], rank: Rank
) -> AbstractContextManager[Run]:
    """Where results go, as in `place`; what other processes than the first would write there goes nowhere."""
    return place(model, out, verb=verb, options=options) if rank.first else nullcontext(Run(Path(out or model)))


def _keep(scores: Iterable[Score], found: dict[str, Score], run: Run, model: str | Path) -> None:
    """Add to what was found; the run has it from then on, whatever happens next."""
    found |= {one.name: one for one in scores}
    if found:
        run.write_scores(_table(found, model, partial=True).to_json())


def _finish(found: Mapping[str, Score], run: Run, model: str | Path) -> None:
    scores = _table(found, model, partial=False)
    run.write_scores(scores.to_json())
    for drawn in figures(scores, run.region):
        plot.save(drawn.figure, run.figures, drawn.name)


def _save_looks(picture: plot.Figure | None, run: Run) -> None:
    if picture is not None:
        plot.save(picture, run.figures, "image_attention_map")


def _table(found: Mapping[str, Score], model: str | Path, *, partial: bool) -> Scores:
    in_order = {name: found[name] for name in METRICS if name in found}
    depth, samples = (max(sizes) for sizes in zip(*((len(s.values), s.n) for s in found.values()), strict=True))
    return Scores(str(model), depth, samples, in_order, partial)


def _told(found: Reversion) -> dict[str, Any]:
    """A reversion as results.json has it."""

    def told(one: Perplexity) -> dict[str, Any]:
        return {"value": one.value, "stderr": None if math.isnan(one.stderr) else one.stderr, "n": one.n}

    groups = {name: told(one) for name, one in found.groups.items()}
    return {"tuned": told(found.tuned), "groups": groups, "backbone": told(found.backbone)}


def _list_skipped(run: Run, sample: Sample) -> None:
    for one in sample.skipped:
        run.skip({"source": one.source, "reason": one.reason})
