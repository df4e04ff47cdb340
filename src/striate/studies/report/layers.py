"""Layer scores on the page: heatmaps under the regions of the runs, rank correlations, figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from striate import plot
from striate.region import Region
from striate.studies.report.compared import ComparedRun, finite

if TYPE_CHECKING:
    from striate.scores.table import Score, Scores

TOP = 0.25  # share of the layers that is named beside a heatmap
FAINTEST = 0.06  # of a cell that has a value


class HeatCell(NamedTuple):
    """A layer of a heatmap: shade 0..1, and its tooltip."""

    shade: float
    text: str


class Heatmap(NamedTuple):
    """One score over the depth: its cells, its range, and the most important layers."""

    name: str
    cells: Sequence[HeatCell]
    range: str
    top: str
    note: str


class RunHeatmaps(NamedTuple):
    """The scores of a run, and the runs of the same depth whose regions stand above them."""

    run: str
    depth: int
    about: str
    regions: Sequence[ComparedRun]
    scores: Sequence[Heatmap]


class Correlations(NamedTuple):
    """Rank correlations between the scores of a run, by the numbers of two scores; NaN where there is none."""

    names: Sequence[str]
    table: Sequence[Sequence[float]]


def heatmaps(row: ComparedRun, rows: Sequence[ComparedRun]) -> RunHeatmaps:
    """The scores of `row` under the regions of all `rows` whose model is as deep, one heatmap per score."""
    assert row.scores is not None
    scores = row.scores
    regions = [other for other in rows if other.region is not None and other.region.depth == scores.depth]
    about = f"{scores.model}, {scores.samples} records{', stopped before the last one' * scores.partial}"
    return RunHeatmaps(row.name, scores.depth, about, regions, [_heatmap(score) for score in scores.scores.values()])


def correlations(scores: Scores) -> Correlations:
    """How far each two scores agree on which layers are important; see `rank_correlation`."""
    from striate.scores.table import rank_correlation  # late: brings in torch

    table = list(scores.scores.values())
    return Correlations(
        [score.name for score in table], [[rank_correlation(one, other) for other in table] for one in table]
    )


def figures(row: ComparedRun) -> Iterator[tuple[str, plot.Figure, str, list[dict[str, Any]]]]:
    """Title, figure, caption and numbers of the layer measurements of a run."""
    if row.scores:
        from striate.scores.figures import figures as score_figures  # late: brings in torch

        for figure in score_figures(row.scores, row.region):
            yield f"{figure.title}: {row.name}", figure.figure, figure.caption, _numbers(figure.name, row.scores)
    if row.reverted:
        caption = "Perplexity with layers reverted to the backbone: left is better."
        numbers = [
            {"data": data, "layers reverted": name, "perplexity": mean.value, "±": finite(mean.stderr)}
            for data, profile in row.reverted.items()
            for name, mean in {"none": profile.tuned, "all": profile.backbone, **profile.groups}.items()
        ]
        yield f"Layers reverted: {row.name}", plot.revert_profiles(row.reverted), caption, numbers


def _numbers(figure: str, scores: Scores) -> list[dict[str, Any]]:
    """The numbers of a figure of layer scores."""
    if figure == "scores":
        return [
            {"score": name, "layer": layer, "value": finite(value), "±": finite(error)}
            for name, score in scores.scores.items()
            for layer, (value, error) in enumerate(
                zip(score.values, score.stderr or [math.nan] * len(score.values), strict=True)
            )
        ]
    if figure == "tasks":
        return [
            {"score": name, "task": task, "layer": layer, "value": finite(value), "±": finite(error)}
            for name, score in scores.scores.items()
            for task, one in score.tasks.items()
            for layer, (value, error) in enumerate(
                zip(one.values, one.stderr or [math.nan] * len(one.values), strict=True)
            )
        ]
    score = scores.scores[figure]
    rows = score.samples if figure == "image_attention" else score.table
    names = ("sample", "layer") if figure == "image_attention" else ("first layer", "layers")
    return [
        {names[0]: i, names[1]: j if figure == "image_attention" else j + 1, "value": value}
        for i, row in enumerate(rows or ())
        for j, value in enumerate(row)
        if math.isfinite(value)
    ]


def _heatmap(score: Score) -> Heatmap:
    from striate.scores.table import order, shades  # late: brings in torch

    known = [value for value in score.values if math.isfinite(value)]
    cells = [_cell(layer, *shown) for layer, shown in enumerate(zip(score.values, shades(score), strict=True))]
    depth = len(score.values)
    most = [layer for layer in order(score) if math.isfinite(score.values[layer])][: max(1, round(TOP * depth))]
    note = f"{score.source}{f', n = {score.n}' if score.n else ''}{', low is important' * (score.direction == 'low')}"
    span = f"{min(known):.3g} to {max(known):.3g}" if known else "–"
    return Heatmap(score.name.replace("_", " "), cells, span, str(Region(tuple(most), depth)), note)


def _cell(layer: int, value: float, shade: float) -> HeatCell:
    if math.isnan(shade):
        return HeatCell(0.0, f"layer {layer}: not measured")
    return HeatCell(FAINTEST + (1 - FAINTEST) * shade, f"layer {layer}: {value:.4g}")
